"""Trackers of experiments, fed with the lines of `metrics.jsonl`; accelerate speaks to them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aimv2_mllm.errors import UsageError

# The name in a recipe -> accelerate's class, and the package that it needs.
TRACKERS = {
    "tensorboard": ("TensorBoardTracker", "tensorboard"),
    "wandb": ("WandBTracker", "wandb"),
    "trackio": ("TrackioTracker", "trackio"),
}


class Trackers:
    """The trackers of one stage of a run, in progress."""

    def __init__(self, running: Sequence[Any]) -> None:
        self._running = running

    def log(self, line: dict[str, Any]) -> None:
        """Give a line of metrics to all of them, at its step."""
        values = {name: value for name, value in line.items() if name != "step"}
        for tracker in self._running:
            tracker.log(values, step=line["step"])


def require(names: Sequence[str]) -> None:
    """Raise `UsageError` unless the packages of the trackers called `names` are installed."""
    packages = [TRACKERS[name][1] for name in names]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"train.trackers: {', '.join(missing)} is not installed: pip install"
            f" {' '.join(missing)}"
        )


@contextmanager
def tracked(names: Sequence[str], folder: Path, settings: dict[str, Any]) -> Iterator[Trackers]:
    """The trackers called `names`, told `settings`, until the stage in `folder` is done.

    TensorBoard writes to `folder/tensorboard`; to the others the run is `RUN-STAGE`.
    """
    running = [_started(name, folder, settings) for name in names]
    try:
        yield Trackers(running)
    finally:
        for tracker in running:
            tracker.finish()


def _started(name: str, folder: Path, settings: dict[str, Any]) -> Any:
    from accelerate import tracking

    make = getattr(tracking, TRACKERS[name][0])
    if name == "tensorboard":
        tracker = make("tensorboard", folder)
    else:
        tracker = make(f"{folder.absolute().parent.name}-{folder.name}")
    tracker.main_process_only = False  # only rank 0 is here; it would look for the others
    tracker.start()
    simple = {k: v for k, v in settings.items() if isinstance(v, bool | str | int | float)}
    tracker.store_init_configuration(simple)
    return tracker
