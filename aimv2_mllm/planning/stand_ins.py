"""What stands in a plan, or before a doctor, for what is not at hand, and few samples for many."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from aimv2_mllm.model.llms import TINY_LLM
from aimv2_mllm.model.shapes import only_shapes
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.data import HandwritingSource, HandwritingTalks
from aimv2_mllm.recipe.stages import LitStage, PretrainStage, Stage, StartChoice
from aimv2_mllm.stages.job import Job
from aimv2_mllm.stages.table import STAGES

MOST_SAMPLES, MOST_MICRO_BATCHES = 32, 4  # read for a plan
BY_ITEM = ("lengths", "pixel_values")  # of a packed batch; the others have a token per column
# Words of the tokenizers with which AIMv2 was trained, where a recipe's own cannot be had.
WORDS = {"pretrain": 32_000, "lit": 49_408}


def sketched(name: str, stage: Stage, sketch: Place, *, wrong: set[str], micro: int) -> Job:
    """The stage as for training, with shapes alone and `stood_in`; its result, with which the next
    one begins, is saved into the folder of `sketch`. UsageError or RunFailed where it cannot be."""
    standing = stood_in(f"stages.{name}", stage, wrong, micro, sketch.folder)
    with only_shapes():
        job = STAGES[stage.kind].build(standing, sketch)
        if name != list(sketch.recipe.stages)[-1]:
            folder = sketch.result(name)
            folder.mkdir(parents=True)
            job.save(folder)
    return job


def stood_in(here: str, stage: Stage, wrong: set[str], micro: int, folder: Path) -> Stage:
    """The stage with what is at hand in place of what is missing, and few samples a step."""
    update: dict[str, Any] = {}
    size = min(micro, MOST_SAMPLES)
    few = min(stage.train.batch_size, MOST_MICRO_BATCHES * size, max(MOST_SAMPLES, size))
    is_native = isinstance(stage, PretrainStage) and stage.encoder.native
    if is_native:  # what a micro-batch holds follows from its size
        size = few = micro
    few -= few % size
    sizes = {"batch_size": few, "micro_batch_size": size}
    if stage.train.micro_batch_tokens is not None:
        del sizes["micro_batch_size"]
    update["train"] = stage.train.model_copy(update=sizes)
    listed = enumerate(stage.data.sources)
    there: list[Any] = [s for i, s in listed if f"{here}.data.sources.{i}" not in wrong]
    if not there:
        reads = isinstance(stage, PretrainStage | LitStage)
        there = [HandwritingSource() if reads else HandwritingTalks()]
    update["data"] = stage.data.model_copy(update={"sources": there})
    if f"{here}.tokenizer" in wrong and stage.kind in WORDS:
        update["tokenizer"] = str(_tokenizer_of(WORDS[stage.kind], folder / "tokenizer"))
    if isinstance(stage, PretrainStage):
        update["start"] = StartChoice()  # sizes are the recipe's own
    return stage.model_copy(update=update)


def _tokenizer_of(words: int, folder: Path) -> Path:
    """A tokenizer that tells as many words apart: the shipped one, with words never used."""
    folder.mkdir(exist_ok=True)
    for path in TINY_LLM.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "tokenizer.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = plain["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in plain["added_tokens"])}
    vocabulary |= {f"unused{i}": i for i in range(words) if i not in taken}
    path.write_text(json.dumps(plain), encoding="utf-8")
    return folder


def longest_caption(stage: Stage) -> int:
    """The most tokens of a caption that a stage reads."""
    if isinstance(stage, LitStage):
        return stage.text.max_position_embeddings - 1
    return stage.decoder.max_text_tokens if isinstance(stage, PretrainStage) else 0


def grown(batch: dict[str, Any], size: int, longest: int | None) -> dict[str, Any]:
    """`batch` with its samples over and over up to `size`, captions as long as `longest`."""
    for name in ("skipped", "skipped_rows"):
        batch.pop(name, None)
    if isinstance(batch.get("pixel_values"), list):
        return batch
    if "position_ids" in batch:
        return _packed_again(batch, size)
    count = len(next(iter(batch.values())))
    if longest and "caption_ids" in batch:
        batch["caption_ids"] = torch.zeros(count, longest, dtype=torch.int64)
        batch["caption_length"] = torch.full((count,), longest)
    # Pixels are no more than a shape.
    onto = {k: v.to("meta") if v.is_floating_point() else v for k, v in batch.items()}
    rows = {k: torch.arange(size * len(v) // count) % len(v) for k, v in onto.items()}
    return {k: v[rows[k].to(v.device)] for k, v in onto.items()}


def _packed_again(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """A batch of conversations, whole and over and over, until there are at least `size`."""
    times = math.ceil(size / len(batch["lengths"]))
    # Pixels are no more than a shape.
    onto = {k: v.to("meta") if v.is_floating_point() else v for k, v in batch.items()}
    return {k: torch.cat([v] * times, 0 if k in BY_ITEM else 1) for k, v in onto.items()}
