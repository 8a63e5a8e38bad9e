"""What LLaVA's own dataset makes of a run's samples: pictures that are there, words that are
learned."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.connectors import Connector
from .examined import IGNORED, shown
from .llava_images import project

IMAGE = -200  # LLaVA's IMAGE_TOKEN_INDEX
SHOWN = 3  # names in a line
Say = Callable[[str, str], None]


class Sample(NamedTuple):
    """A sample as LLaVA would train on it."""

    input_ids: Tensor  # (T,) with IMAGE where an image goes
    labels: Tensor  # (T,)
    num_image_tokens: int
    said: str  # what LLaVA printed meanwhile

    def expanded(self, longest: int) -> tuple[int, int, int]:
        """Tokens, tokens that are learned, and learned ones cut off behind `longest`."""
        tokens = learned = cut = 0
        for token, label in zip(self.input_ids.tolist(), self.labels.tolist(), strict=True):
            tokens += self.num_image_tokens if token == IMAGE else 1
            if label != IGNORED:
                learned += tokens <= longest
                cut += tokens > longest
        return tokens, learned, cut


def examine_images(data: Any, tell: Say) -> None:
    """That every image file that is named is there."""
    named = [row["image"] for row in data.list_data_dict if isinstance(row.get("image"), str)]
    folder = Path(data.data_args.image_folder or ".")
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        tell(
            "FAULT", f"images: {len(missing)} of {len(named)} are not in {folder}: {_some(missing)}"
        )
    else:
        tell("ok", f"images: {len(named)} named, all there; {len(data) - len(named)} rows without")


def examine_samples(model: Any, data: Any, *, num_samples: int, tell: Say) -> None:
    """What is learned of up to `num_samples` samples, spread evenly; the first is shown."""
    longest = data.tokenizer.model_max_length
    places = sorted({i * len(data) // num_samples for i in range(num_samples)})
    samples, unusable, silent, cut = list[Sample](), list[str](), list[str](), 0
    learned = total = 0
    for place in places:
        row = data.list_data_dict[place]
        where = f"row {place} ({row.get('image', 'no image')})"
        try:
            sample = _sample(model, data, place)
        # LLaVA's reading of a row may fail in any way: pictures, roles, missing keys, assertions.
        except Exception as error:
            unusable.append(f"{where}: {type(error).__name__} {error}".strip())
            continue
        tokens, here, beyond = sample.expanded(longest)
        if not here:
            reason = "tokenisation mismatch" if "mismatch" in sample.said else (
                f"its answer lies beyond model_max_length {longest}" if beyond else "no answer"
            )  # fmt: skip
            silent.append(f"{where}: {reason}")
        cut += beyond > 0
        learned, total = learned + here, total + min(tokens, longest)
        samples.append(sample)
    _report(len(places), unusable, silent, tell)
    if cut:
        tell("note", f"samples: the answers of {cut} are cut at model_max_length {longest}")
    if samples:
        share = 100 * learned / max(total, 1)
        tell("ok", f"samples: {share:.1f} % of the tokens of {len(samples)} are learned")
        _examine_features(model, data, tell)
        first, decode = samples[0], data.tokenizer.decode
        ids, labels, each = first.input_ids.tolist(), first.labels.tolist(), first.num_image_tokens
        for line in shown(ids, labels, decode, image=IMAGE, stands_for=each):
            tell("show", line)


def _report(count: int, unusable: list[str], silent: list[str], tell: Say) -> None:
    if unusable:
        tell("FAULT", f"samples: {len(unusable)} of {count} cannot be read: {_some(unusable)}")
    if silent:
        tell("FAULT", f"samples: {len(silent)} of {count} teach nothing: {_some(silent)}")


def _sample(model: Any, data: Any, place: int) -> Sample:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        item = data[place]
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    count = tower.num_patches
    image = item.get("image")
    if isinstance(projector, Connector) and hasattr(tower, "grid") and image is not None:
        count = projector.num_tokens(tower.grid(image))
    elif hasattr(tower, "grid") and image is not None:
        rows, columns = tower.grid(image)
        count = rows * columns
    return Sample(item["input_ids"], item["labels"], count, printed.getvalue())


@torch.no_grad()
def _examine_features(model: Any, data: Any, tell: Say) -> None:
    """The way of one image through tower and projector."""
    place = next((i for i, row in enumerate(data.list_data_dict) if "image" in row), None)
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    if place is None or not hasattr(tower, "grid"):
        return
    image = data[place]["image"][None]
    features = tower(image)
    dtype = next(projector.parameters()).dtype
    embedded = project(projector, features.to(dtype), tower.grid(image))
    rows, columns = tower.grid(image)
    text = (
        f"image: {image.shape[-2]} x {image.shape[-1]} pixels, {rows} x {columns} patches, "
        f"{features.shape[-1]} wide, become {embedded.shape[1]} tokens, {embedded.shape[2]} wide"
    )
    tell("ok" if bool(torch.isfinite(embedded).all()) else "FAULT", text)


def _some(names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
