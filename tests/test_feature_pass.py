"""Features of a frozen tower, computed once: what is kept, for whom, within which bound, and that
nobody can tell the difference in what is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_talk_run import results, run, world  # noqa: F401  (a fixture)

KEPT = ["stages.align.data.features.folder={}", "stages.tune.data.features.folder={}"]


def kept(folder: Path) -> list[str]:
    return [word.format(folder) for word in KEPT]


def told(folder: Path, stage: str) -> dict[str, Any]:
    """What a finished stage's record says of its features."""
    record = json.loads((folder / stage / "model" / "stage.json").read_text())
    return dict(record["features"])


def test_a_run_with_kept_features_learns_what_it_learns_without(world: Path) -> None:  # noqa: F811
    run(world, "without")
    run(world, "with", *kept(world / "cache"))
    run(world, "again", *kept(world / "cache"), "stages.align.data.workers=2")
    without, first, again = (results(world / name) for name in ("without", "with", "again"))
    assert first == again
    for stage in ("align", "tune"):
        for line, other in zip(first[stage][0], without[stage][0], strict=True):
            assert line == pytest.approx(other, rel=1e-4)
    print(
        told(world / "with", "align"), told(world / "with", "tune"), told(world / "again", "tune")
    )
    assert told(world / "with", "align")["computed"] == 0
