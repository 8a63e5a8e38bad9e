"""Where a stage stands among the others of its recipe, and where their results lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2_mllm.data.pairs.batches import EVERYTHING, Share
from aimv2_mllm.folders import result_of, stage_record
from aimv2_mllm.recipe.schema import Recipe


@dataclass(frozen=True)
class Place:
    """Where a stage stands: the whole recipe, the run folder with the results of the stages before
    it, which share of its samples this process trains on, and on what."""

    recipe: Recipe
    folder: Path
    share: Share = EVERYTHING
    has_bf16: bool | None = None  # whether what trains has it; None: as the device here

    def result(self, stage: str) -> Path:
        """The folder with the result of the stage of that name."""
        return result_of(self.folder, stage)

    def record(self, stage: str) -> dict[str, Any]:
        """What the record of that result says, empty where there is none."""
        return stage_record(self.result(stage))

    def source(self, name: str) -> str:
        """Where the model called `name` lies: a stage's result, or outside of the recipe as
        given."""
        return str(self.result(name)) if name in self.recipe.stages else name
