"""What a plan says: of each stage its sources, sizes, memory and operations, and all problems."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from aimv2_mllm.engine.accelerators import Accelerator
from aimv2_mllm.planning.problems import Problem
from aimv2_mllm.recipe.train import TrainConfig


@dataclass(frozen=True)
class Beside:
    """Bytes that a process on a processor holds beside the tensors of a micro-batch."""

    libraries: int = 0  # the interpreter, and the packages that are imported
    batches: int = 0  # the others of a step, and those made ahead
    aside: int = 0  # weights that no step needs: a tower's, whose features are kept, or quantised
    unused: int = 0  # freed, and not given back

    @property
    def total(self) -> int:
        """All of it."""
        return self.libraries + self.batches + self.aside + self.unused


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment when most are held; logits are part of activations."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    beside: Beside = Beside()

    @property
    def tensors(self) -> int:
        """Those of a micro-batch, with what is kept between steps."""
        return self.weights + self.gradients + self.optimiser + self.activations

    @property
    def total(self) -> int:
        """All of it: on a processor, the whole process."""
        return self.tensors + self.beside.total


@dataclass(frozen=True)
class SourceUse:
    """A source of samples: its kind, its rows (None: no end, or not known), passes over them."""

    kind: str
    rows: int | None
    epochs: float | None


@dataclass(frozen=True)
class StagePlan:
    """What one stage would do; no table, shapes, memory and operations where a model is missing."""

    name: str
    kind: str
    train: TrainConfig
    micro_batch: int  # samples; those of a step, on one device, where tokens are counted
    num_micro_batches: int  # of a step, on one device; 0: not known
    sources: Sequence[SourceUse]
    table: Sequence[tuple[str, int, bool]] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    memory: Memory | None = None
    flops: float = 0.0  # of one sample, forward and backward
    checkpoint: int = 0  # bytes
    loaded: int = 0  # bytes that a process holds of the model before any of it is on its device
    num_loading: int = 1  # processes that do so
    notes: Sequence[str] = ()

    @property
    def samples(self) -> int:
        """How many are drawn in all."""
        return self.train.steps * self.train.batch_size

    def hours(self, device: Accelerator, num_devices: int, utilisation: float) -> float:
        """How long it takes where that share of the devices' operations is reached."""
        rate = device.peak(self.train.precision) * num_devices * utilisation
        return self.flops * self.samples / rate / 3600


@dataclass(frozen=True)
class Plan:
    """What a recipe would do, and all that would stop it."""

    stages: Sequence[StagePlan]
    problems: Sequence[Problem]
