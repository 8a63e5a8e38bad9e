"""Trackers get the lines of metrics, through accelerate's classes."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from aimv2_mllm.engine.trackers import TRACKERS, require, tracked
from aimv2_mllm.errors import UsageError


class Fake:
    """Notes what a tracker of accelerate is asked to do."""

    calls: list[tuple[Any, ...]]

    def __init__(self, *args: Any) -> None:
        Fake.calls = [("init", *args)]

    def start(self) -> None:
        self.calls.append(("start",))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("settings", values))

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append(("log", values, step))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_is_started_fed_and_finished_also_when_the_run_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert hasattr(tracking, TRACKERS[name][0])
    monkeypatch.setattr(tracking, TRACKERS[name][0], Fake)
    folder = tmp_path / "quick" / "pretrain"

    def failing() -> None:
        with tracked([name], folder, {"lr": 0.1, "part_lr": {}}) as to:
            to.log({"step": 3, "total": 0.5})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    place = ("tensorboard", folder) if name == "tensorboard" else ("quick-pretrain",)
    assert Fake.calls == [
        ("init", *place),
        ("start",),
        ("settings", {"lr": 0.1}),
        ("log", {"total": 0.5}, 3),
        ("finish",),
    ]


def test_no_trackers_are_no_work(tmp_path: Path) -> None:
    with tracked([], tmp_path, {}) as to:
        to.log({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install tensorboard trackio"):
        require(["tensorboard", "trackio"])


def test_tensorboard_writes_beside_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with tracked(["tensorboard"], tmp_path, {"lr": 0.1}) as to:
        to.log({"step": 1, "total": 0.5})
    assert list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))
