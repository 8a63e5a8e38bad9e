"""Checkpoints on disk: whole or not there, whatever happens while they are written."""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aimv2_mllm.engine import checkpoint
from aimv2_mllm.errors import RunFailed, UsageError

STATE = {"fingerprint": "f", "note": 0.1}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kill loses nothing of what was written, only a power cut would.
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def tensors(value: float) -> dict[str, Tensor]:
    return {"model/a": torch.full((3, 5), value), "optimizer/a/step": torch.tensor(value)}


def saved(folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        checkpoint.save(folder, step, tensors(float(step)), STATE, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def latest(folder: Path) -> str:
    return (folder / "latest").read_text().strip()


def load(folder: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = checkpoint.load_newest(folder, "f", said.append)
    if found is None:
        return None, said
    step, read, state = found
    wanted = tensors(float(step))
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[k], wanted[k]) for k in wanted)
    assert (state["note"], state["step"]) == (0.1, step)
    return step, said


def test_every_type_and_shape_comes_back_bit_for_bit_also_through_the_library(
    tmp_path: Path,
) -> None:
    whole = {
        "flag": torch.tensor([True, False, True]),
        "byte": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3).bfloat16(),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "count": torch.tensor(7),
        "none": torch.empty(0, 4),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "strided": torch.randn(6)[::2],
        "turned": torch.randn(4, 3).T,
        "weight": torch.nn.Parameter(torch.randn(2, 3)),
    }
    checkpoint.save(tmp_path, 1, whole, STATE, keep=1)
    found = checkpoint.load_newest(tmp_path, "f", print)
    assert found is not None
    for read in (found[1], load_file(tmp_path / "step-000001" / "tensors.safetensors")):
        assert read.keys() == whole.keys()
        for name, tensor in whole.items():
            assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
            bits = [
                t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (read[name], tensor)
            ]
            assert torch.equal(*bits), name


def test_every_tensor_lies_on_a_multiple_of_its_width(tmp_path: Path) -> None:
    mixed = {"flag": torch.tensor([True] * 3), "wide": torch.ones(2), "half": torch.ones(3).half()}
    checkpoint.save(tmp_path, 1, mixed, STATE, keep=1)
    content = (tmp_path / "step-000001" / "tensors.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in mixed.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name


def test_the_newest_is_loaded_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 999_998, 999_999, 1_000_000, keep=2)
    assert names(tmp_path) == ["latest", "step-1000000", "step-999999"]
    assert latest(tmp_path) == "step-1000000"
    assert load(tmp_path) == (1_000_000, [])


def test_a_folder_without_checkpoints_or_no_folder_at_all_gives_none(tmp_path: Path) -> None:
    assert load(tmp_path) == (None, [])
    assert load(tmp_path / "nowhere") == (None, [])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(content)


def cut(name: str) -> Callable[[Path], None]:
    def halve(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return halve


DAMAGES = {
    "tensors.safetensors has another sha256": flip_a_bit,
    "tensors.safetensors has .* bytes instead of": cut("tensors.safetensors"),
    "state.json is no whole JSON": cut("state.json"),
    "state.json is missing": lambda folder: (folder / "state.json").unlink(),
    "tensors.safetensors is missing": lambda folder: (folder / "tensors.safetensors").unlink(),
    "no whole JSON: 'step'": lambda folder: (folder / "state.json").write_text("{}"),
    "is of step 2": lambda folder: (folder / "state.json").write_bytes(
        (folder.parent / "step-000002" / "state.json").read_bytes()
    ),
}


@pytest.mark.parametrize("why", DAMAGES)
def test_a_damaged_one_is_named_and_removed_and_the_one_before_is_used(
    tmp_path: Path, why: str
) -> None:
    saved(tmp_path, 1, 2, 3)
    DAMAGES[why](tmp_path / "step-000003")
    step, said = load(tmp_path)
    assert step == 2
    (line,) = said
    assert re.fullmatch(
        rf"checkpoint step-000003 is damaged \(.*{why}.*\): going on from step-000002", line
    )
    assert names(tmp_path) == ["latest", "step-000001", "step-000002"]
    assert latest(tmp_path) == "step-000002"
    assert load(tmp_path) == (2, [])


def test_when_all_are_damaged_the_run_starts_from_the_beginning_and_saves_again(
    tmp_path: Path,
) -> None:
    saved(tmp_path, 3, 6)
    for name in ("step-000003", "step-000006"):
        flip_a_bit(tmp_path / name)
    step, said = load(tmp_path)
    assert step is None
    assert [line.endswith("starting from the beginning") for line in said] == [True, True]
    assert names(tmp_path) == []
    saved(tmp_path, 3, keep=1)
    assert load(tmp_path) == (3, [])


def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-000002" / "state.json").write_text("{")
    before = names(tmp_path)
    with pytest.raises(
        UsageError, match=r"step-000001 belongs to another run .fingerprint f, this"
    ):
        checkpoint.load_newest(tmp_path, "g", print)
    assert names(tmp_path) == before


def test_a_checkpoint_that_may_not_be_read_is_refused_and_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    saved(tmp_path, 1)
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(UsageError, match="step-000001 cannot be read: Permission denied"):
        checkpoint.load_newest(tmp_path, "f", print)
    assert names(tmp_path) == ["latest", "step-000001"]


def test_leftovers_of_a_killed_save_are_removed_and_latest_is_put_right(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-000002.tmp-77").mkdir()
    (tmp_path / "step-000002.tmp-77" / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / "latest.77.part").write_text("step-00")
    (tmp_path / "latest").write_text("step-000002\n")
    assert load(tmp_path) == (1, [])
    assert names(tmp_path) == ["latest", "step-000001"]
    assert latest(tmp_path) == "step-000001"


class Killed(BaseException):
    """As a kill: nothing of ours may run any more after it."""


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "rmdir"])
@pytest.mark.parametrize("moment", range(6))
def test_killed_at_any_call_latest_names_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, moment: int
) -> None:
    saved(tmp_path, 1, 2)
    real, calls = getattr(os, call), 0

    def killed_once(*args: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if calls == moment + 1:
            raise Killed
        return real(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, killed_once)
        try:
            saved(tmp_path, 3, keep=2)
        except Killed:
            pass
        else:
            assert moment >= calls > 0
    for folder in tmp_path.glob("step-??????"):
        assert names(folder) == ["state.json", "tensors.safetensors"], folder
    named = latest(tmp_path)
    assert named in names(tmp_path)
    step, said = load(tmp_path)
    assert not said
    assert step in (2, 3)
    assert int(named.removeprefix("step-")) <= step
    assert latest(tmp_path) == f"step-00000{step}"
    assert not [name for name in names(tmp_path) if "tmp" in name or "part" in name]


def test_what_is_renamed_was_synced_before_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "rename", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    saved(tmp_path, 1)
    # Tensors, state, their folder; the folder around it. Then the same for `latest`.
    assert calls == ["fsync"] * 3 + ["replace", "fsync", "fsync", "replace", "fsync"]


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from aimv2_mllm.engine import checkpoint
from aimv2_mllm.errors import RunFailed

folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"a": torch.ones(9)}, {"fingerprint": "f"}, keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    checkpoint.save(folder, 2, {"a": torch.ones(50_000)}, {"fingerprint": "f"}, keep=1)
except RunFailed as error:
    print(type(error.__cause__).__name__, error)
"""


def test_a_full_disk_ends_the_run_and_leaves_the_last_whole_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.startswith("OSError checkpoint step-000002 (0.2 MiB) could not be written")
    for words in (
        f"File too large in {tmp_path}, where ",
        " MiB are free",
        "the last whole checkpoint, step-000001, is kept",
        "free some space there and run the same command",
    ):
        assert words in done.stdout, done.stdout
    assert names(tmp_path) == ["latest", "step-000001"]
    assert latest(tmp_path) == "step-000001"


def test_a_folder_that_cannot_be_made_is_a_failed_run_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=r"Not a directory.*no checkpoint yet.*folder writable"):
        saved(tmp_path / "file" / "checkpoints", 1)
