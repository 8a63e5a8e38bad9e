"""Every way of tuning on a folder of photos with questions.csv, by the commands that a newcomer
types: killed with SIGKILL, gone on with to the bit, exported, verified; an export killed too."""

import csv
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_doctor import tower
from test_run import files, metrics, record

from aimv2_mllm import __main__ as command
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.runs import run as runs

RECIPE = """\
name: photos
stages:
  {kind}:
    kind: {kind}
    {source}
    data: {{sources: [{{kind: questions, folder: {folder}/photos}}]}}
    train: {{steps: {steps}, batch_size: 4, micro_batch_size: 2, lr: 3e-3, log_every: 1,
            checkpoint_every: 4}}
"""
STEPS = 40
MODES = {
    "connector": ["trains=connector"],
    "lora": [],
    "nf4": ["quantise=nf4"],
    "full": ["trains=llm", "tower_blocks=all"],
}


def take_photos(folder: Path) -> None:
    """Crops of two real photos in `folder`, and questions about them."""
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    rows = [("image", "question", "answer")]
    for what, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for left, top in ((0, 0), (0, 150), (200, 0), (200, 150)):
            name = f"{what} {left} {top}.jpg"
            Image.fromarray(photo[top : top + 250, left : left + 400]).save(folder / name)
            rows += [(name, "What is it?", what), (name, "Is it a flower?", str(what == "flower"))]
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, a Llava aligned on them in `aligned`, and recipe.yaml, which tunes that."""
    folder = tmp_path_factory.mktemp("world")
    take_photos(folder / "photos")
    tower(folder / "tower")
    recipe, source = folder / "recipe.yaml", f"tower: {folder}/tower\n    llm: tiny_llm"
    recipe.write_text(RECIPE.format(kind="align", source=source, folder=folder, steps=4))
    runs.run(load_recipe(recipe, [f"output={folder / 'aligned'}"]), lambda _: None)
    source = f"start: {folder}/aligned/align/model"
    recipe.write_text(RECIPE.format(kind="tune", source=source, folder=folder, steps=STEPS))
    return folder


def killed(words: list[str], folder: Path, sign: str) -> str:
    """What `aimv2-mllm` with these words says until SIGKILL, when `folder` has a file like `sign`;
    AssertionError where it ends before."""
    process = subprocess.Popen(
        [sys.executable, "-m", "aimv2_mllm", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list(folder.glob(sign)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == -9, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_tuning_on_photos_survives_sigkill_and_is_exported(
    world: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, words = world / "recipe.yaml", [f"stages.tune.{word}" for word in MODES[mode]]
    whole = runs.run(load_recipe(recipe, [f"output={tmp_path / 'whole'}", *words]), lambda _: None)
    assert whole is not None
    folder = tmp_path / "killed"
    typed = ["run", str(recipe), f"output={folder}", *words]
    killed(typed, folder, "tune/checkpoints/step-??????")
    assert not (folder / "tune" / "model").exists()
    again = subprocess.run(
        [sys.executable, "-m", "aimv2_mllm", *typed], check=True, capture_output=True, text=True
    )
    found = re.search(r"continuing from step (\d+)", again.stderr)
    assert found
    assert 4 <= int(found[1]) < STEPS
    assert metrics(folder, "tune") == metrics(whole, "tune")
    assert len(metrics(folder, "tune")) == STEPS
    assert files(folder, "tune") == files(whole, "tune")
    first, last = (metrics(folder, "tune")[place]["total"] for place in (0, -1))
    assert last < first
    exported = tmp_path / "exported"
    assert command.main(["export", str(folder), str(exported), "--format", "llava"]) == 0
    assert command.main(["verify-export", str(exported), str(folder)]) == 0
    assert capsys.readouterr().out.endswith("exported: all 14 checks passed\n")
    before, after = (load_file(p / "model.safetensors") for p in (start_of(world), exported))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    parts = {name.partition(".")[0] for name in moved}
    assert ("language_model" in parts, "vision_tower" in parts) == (
        mode != "connector",
        mode == "full",
    )
    if mode in ("lora", "nf4"):
        assert_merged_onto(before, after, folder / "tune" / "model" / "adapter")
        assert record(folder, "tune")["quantised"] == ("nf4" if mode == "nf4" else None)


def start_of(world: Path) -> Path:
    return world / "aligned" / "align" / "model"


def assert_merged_onto(
    base: dict[str, torch.Tensor], merged: dict[str, torch.Tensor], adapter: Path
) -> None:
    """Every adapted weight of `merged` is that of `base`, never quantised, plus 2 B A (alpha 16,
    rank 8); and the LLM's other weights are those of `base`."""
    added = load_file(adapter / "adapter_model.safetensors")
    before = "base_model.model.model.language_model."
    adapted = {n.removeprefix(before).partition(".lora_")[0] for n in added}
    for name, weight in base.items():
        if not name.startswith("language_model."):
            continue
        layer = name.removeprefix("language_model.model.").removesuffix(".weight")
        if layer in adapted:
            a, b = (added[f"{before}{layer}.lora_{which}.weight"] for which in "AB")
            torch.testing.assert_close(merged[name], weight + 2 * b @ a, rtol=1e-5, atol=1e-6)
            adapted.remove(layer)
        else:
            assert torch.equal(merged[name], weight), name
    assert not adapted


def test_an_export_that_was_killed_leaves_no_half_folder_and_is_made_by_the_same_words(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = tmp_path / "exported"
    typed = ["export", str(start_of(world)), str(exported)]
    said = killed(typed, tmp_path, ".*.part/model.safetensors")
    assert "wrote" not in said
    [half] = tmp_path.iterdir()
    assert half.name.startswith(".exported")
    assert command.main(typed) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert command.main(["verify-export", str(exported), str(start_of(world))]) == 0
    assert capsys.readouterr().out.endswith("exported: all 14 checks passed\n")
