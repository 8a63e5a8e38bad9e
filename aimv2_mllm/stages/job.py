"""What a stage is, ready to be trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.optimizer import Parts
from aimv2_mllm.model.quantising import num_weights
from aimv2_mllm.recipe.stages import Stage

# What a frozen parameter belongs to, by a piece of its name.
FROZEN_PARTS = {
    "image_encoder": "tower",
    "vision_tower": "tower",
    "multi_modal_projector": "connector",
    "language_model": "LLM",
    "lm_head": "LLM",
}


@dataclass(frozen=True)
class DataFacts:
    """What of a stage's samples the loop must know, and the user: how many processes prepare them,
    how many may be unusable, which they are (by a digest), what is odd about them, and how many
    rows each source has, None for one without end."""

    workers: int = 0
    max_skipped: float = 1.0
    digest: str = ""
    notes: Sequence[str] = ()
    rows: Sequence[int | None] = ()


Ended = Callable[[], dict[str, Any]]


@dataclass
class Job:
    """A stage ready to be trained: a model, its trainable parts by name, what is minimised, on
    which batches.

    `save` writes the result into a folder; it may change the model, for nothing comes after it.
    `record` is what its stage.json says besides.
    `prepare` is called right before the training, on every rank, with a function that narrates; it
    may change the job, and returns a function that undoes it after training and returns facts to be
    recorded.
    """

    model: nn.Module
    parts: Parts
    objective: Any
    batches: Callable[[int], list[Any]]
    save: Callable[[Path], None]
    data: DataFacts = DataFacts()
    record: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[["Job", Ranks, Callable[[str], None]], Ended] | None = None

    def table(self) -> list[tuple[str, int, bool]]:
        """The parts of the model as (name, number of parameters, trainable or not)."""
        trained = {id(p): part for part, named in self.parts.items() for _, p in named}
        counts: dict[tuple[str, bool], int] = {}
        for name, parameter in self.model.named_parameters():
            frozen = (part for piece, part in FROZEN_PARTS.items() if piece in name.split("."))
            part = trained.get(id(parameter)) or next(frozen, "model")
            key = (part, id(parameter) in trained)
            counts[key] = counts.get(key, 0) + num_weights(parameter)
        return [(part, count, trainable) for (part, trainable), count in counts.items()]


def is_loaded_once(stage: Stage, num_ranks: int) -> bool:
    """Whether of so many ranks the first alone has weights before they are sharded, and the others
    shapes; what is quantised is not sharded."""
    is_quantised = getattr(stage, "quantise", None) is not None
    return num_ranks > 1 and stage.train.strategy == "fsdp2" and not is_quantised


def named_parts(model: nn.Module, pieces: dict[str, tuple[str, ...]]) -> Parts:
    """The parameters of `model` by part: a part has those whose names begin with one of its
    pieces."""
    named = list(model.named_parameters())
    return {
        part: [(name, p) for name, p in named if name.startswith(begins)]
        for part, begins in pieces.items()
    }
