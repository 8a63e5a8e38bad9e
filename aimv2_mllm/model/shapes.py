"""Models by their shapes alone, for plans and for ranks that another gives the weights: none is
read, drawn, downloaded or written."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch


def shapes_only() -> bool:
    """Whether models are built on the meta device just now, where tensors hold no numbers."""
    return torch.get_default_device().type == "meta"


@contextmanager
def only_shapes() -> Iterator[None]:
    """While entered, models are built from their configs on the meta device, and saved as such.

    transformers refuses to load a model there: its two methods are replaced for that long, so that
    every loader and every stage that calls them can be planned as it stands.
    """
    with ExitStack() as held:
        try:
            from transformers import PreTrainedModel
        except ImportError:
            pass  # then nothing that is planned needs it
        else:
            held.enter_context(patch.object(PreTrainedModel, "from_pretrained", _FROM_CONFIG))
            held.enter_context(patch.object(PreTrainedModel, "save_pretrained", _save_config))
        held.enter_context(torch.device("meta"))
        yield


def _from_config(
    cls: Any,
    source: Any,
    *args: Any,
    config: Any = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    config = config or cls.config_class.from_pretrained(source, trust_remote_code=False)
    dtype = kwargs.get("dtype")
    said = dtype if isinstance(dtype, torch.dtype) else torch.float32  # and not as stored
    model = cls._from_config(config, dtype=said)
    whole: dict[str, list[str]] = {
        key: [] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    return (model, whole) if output_loading_info else model


_FROM_CONFIG: Any = classmethod(_from_config)  # type: ignore[arg-type]


def _save_config(self: Any, folder: Any, **kwargs: Any) -> None:
    self.config.architectures = [type(self).__name__]
    self.config.save_pretrained(folder)
