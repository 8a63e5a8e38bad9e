"""What every section of a recipe is made of: strict mappings, numbers, names, switches."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from aimv2_mllm.model.sampling import MOST_SEED


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 (no dot, or no sign in the exponent) as text.
    is_number = isinstance(value, str) and re.fullmatch(
        r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value
    )
    return float(value) if is_number else value


def _switch(value: Any) -> Any:
    words = {"on": True, "yes": True, "off": False, "no": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_number)]
Switch = Annotated[bool, BeforeValidator(_switch)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}$")]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Count = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A mapping that refuses unknown keys and values of another type, and never changes."""

    # validate_default: a default can clash with a given value (warmup_steps, num_attention_heads).
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )
