"""Models of transformers, loaded strictly: all of their weights, and none too many."""

from collections.abc import Iterator
from contextlib import contextmanager
from os.path import isdir
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError, first_line
from .families import TOWERS


def load_foreign(kind: str, folder: Path) -> nn.Module:
    """The network of transformers in `folder`, a tower of the family `kind`; UsageError, naming
    the tensors, where its weights do not fit it."""
    family = TOWERS[kind]
    try:
        import transformers
        from safetensors import SafetensorError
    except ImportError:
        raise UsageError(
            f"{folder}: a {kind} tower needs transformers: pip install 'aimv2-mllm[train]'"
        ) from None
    if not hasattr(transformers, family.model):
        raise UsageError(
            f"{folder}: transformers {transformers.__version__} has no {family.model}: "
            "pip install --upgrade transformers"
        )
    try:
        with silent_transformers():
            module, report = getattr(transformers, family.model).from_pretrained(
                folder,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
                use_safetensors=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"{folder}: no {kind} can be loaded from there ({first_line(error)})"
        ) from None
    left_over = [n for n in report["unexpected_keys"] if not n.startswith(family.other_parts)]
    demand_whole({**report, "unexpected_keys": left_over}, str(folder))
    network: nn.Module = module
    return network


def load_image_text(
    source: str | Path,
    refusal: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    **words: Any,
) -> tuple[Any, Any]:
    """The image-text model of transformers in a folder or of a hub id (org/name[@revision]), in
    `dtype` ("auto": as it is stored), on `device` (None: the GPU where there is one), and its
    processor; `words` go to both loaders.

    UsageError for weights that are damaged or not all there, and with `refusal` where none is.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name, _, revision = (source, "", "") if isdir(source) else str(source).partition("@")
    words = {"trust_remote_code": False, "revision": revision or None, **words}
    try:
        with silent_transformers():
            processor = AutoProcessor.from_pretrained(name, **words)
            model, report = AutoModelForImageTextToText.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
                **words,
            )
    except SafetensorError as error:
        raise UsageError(f"{source}: its weights are damaged or cut off ({error})") from None
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:300]
        raise UsageError(f"{source}: {refusal}: {said}") from None
    demand_whole(report, str(source))
    return model.to(device or best_device()).eval(), processor


def best_device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def demand_whole(report: dict[str, Any], where: str) -> None:
    """UsageError unless transformers' loading report says that weights and model fit exactly."""
    faults = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    faults += [f"{name} is left over" for name in sorted(report["unexpected_keys"])]
    faults += [f"{name} has another shape" for name, *_ in sorted(report["mismatched_keys"])]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UsageError(
            f"{where}: its weights do not fit its config.json: {', '.join(faults[:3])}{more}"
        )


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Without transformers' warnings, reports and bars: what matters is in its loading report."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
