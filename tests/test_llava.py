"""The real LLaVA with our towers in two environments: its own libraries of 2024, and current ones.

`llava_driver.py` runs once in each; the tests look at what it found. The old environment is made by
`make test` (`make .venv-llava437/installed`); without it its half is skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llava_world import make_world

HOME = Path(__file__).parents[1]
OLD = Path(os.environ.get("AIMV2_LLAVA437", HOME / ".venv-llava437/bin/python"))
PYTHONS = {"current": Path(sys.executable), "4.37.2": OLD}
Found = dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("llava") / "world")


@pytest.fixture(scope="module")
def both(world: Path) -> dict[str, Found]:
    """What the driver found in each environment that is there."""
    found = {}
    for name in ("4.37.2", "current"):  # which then reads what the old one wrote
        if PYTHONS[name].exists():
            found[name] = drive(PYTHONS[name], world, world.parent / name)
    return found


@pytest.fixture(params=PYTHONS)
def found(request: pytest.FixtureRequest, both: dict[str, Found]) -> Found:
    if request.param not in both:
        pytest.skip(f"there is no {OLD}: make .venv-llava437/installed")
    return both[request.param]


def drive(python: Path, world: Path, out: Path) -> Found:
    script = HOME / "tests/llava_driver.py"
    env = {**os.environ, "PYTHONPATH": f"{HOME}", "OMP_NUM_THREADS": "1"}
    command = [str(python), str(script), str(world), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-3000:]
    found: Found = json.loads((out / "found.json").read_text())
    return found


def test_the_environments_are_what_they_are_called(found: Found, both: dict[str, Found]) -> None:
    version = found["versions"]["transformers"]
    assert version == "4.37.2" if found is both.get("4.37.2") else int(version.split(".")[0]) >= 5


def test_projector_and_lora_stages_learn(found: Found) -> None:
    assert len(found["stages"]) == 4
    for stage in found["stages"].values():
        for losses in (stage["projector"]["losses"], stage["lora"]["losses"]):
            assert len(losses) == 3
            assert losses[0] > losses[1] > losses[2] > 1


def test_losses_and_greedy_tokens_are_equal_in_both_environments(both: dict[str, Found]) -> None:
    if len(both) < 2:
        pytest.skip(f"there is no {OLD}: make .venv-llava437/installed")
    now, then = both["current"]["stages"], both["4.37.2"]["stages"]
    assert now.keys() == then.keys()
    for name in now:
        for stage in ("projector", "lora"):
            # The old trainer logs four decimals; and SigLIP is transformers' own, whose attention
            # rounds otherwise now (LLaVA runs towers in float16).
            near = 2e-3 if name.startswith("siglip") else 2e-4
            expected = pytest.approx(then[name][stage]["losses"], abs=near)
            assert now[name][stage]["losses"] == expected, (name, stage)
        assert now[name]["tokens"] == then[name]["tokens"], name
        assert len(set(now[name]["tokens"])) > 1
    key = "aimv2-pixel_shuffle"
    assert now[key]["chat"] == then[key]["chat"]


def test_each_stage_trains_what_it_says(found: Found) -> None:
    for stage in found["stages"].values():
        trained = {part: n for part, (_, n) in stage["projector"]["parts"].items() if n}
        assert list(trained) == ["mm_projector"]
        trained = {part: n for part, (_, n) in stage["lora"]["parts"].items() if n}
        assert sorted(trained) == ["lora in llm", "mm_projector"]
        assert "lora in vision_tower" not in stage["lora"]["parts"]


def test_llavas_own_cli_answers_after_either_stage(found: Found) -> None:
    stage = found["stages"]["aimv2-pixel_shuffle"]
    for said in (stage["chat"], stage["pre_chat"]):
        answer = said.split("ASSISTANT:")[1].split("\n")[0]
        assert len(answer.strip()) > 3


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_tower_that_is_trained_is_saved_and_loaded_again(found: Found, kind: str) -> None:
    tuned = found["tuned"][kind]
    assert tuned["moved"] == tuned["count"] > 20
    assert tuned["kept"]
    assert tuned["origin"] == "checkpoint"
    assert tuned["frozen_again"]
    count, trained = tuned["parts"]["vision_tower"]
    assert count == trained
    assert tuned["losses"][0] > tuned["losses"][-1]


def test_every_way_of_saving_and_loading_gives_the_right_tower_frozen(found: Found) -> None:
    assert len(found["matrix"]) == 2 * 42
    wrong = {name: row for name, row in found["matrix"].items() if not row["right"]}
    assert not wrong
    assert not [name for name, row in found["matrix"].items() if not row["frozen"]]
    kinds = {name.split(",")[1].strip() for name in found["matrix"]}
    assert kinds == {
        "frozen", "tuned", "sharded", "absent", "adapter", "tuned adapter", "partly tuned adapter",
    }  # fmt: skip


def test_a_tower_tuned_on_the_old_libraries_is_found_by_the_current_ones(
    both: dict[str, Found],
) -> None:
    if len(both) < 2:
        pytest.skip(f"there is no {OLD}: make .venv-llava437/installed")
    across = both["current"]["across"]
    assert across == {"aimv2:aimv2": 0.0, "hf:siglip": 0.0, "hf:clip": 0.0}


def test_images_of_different_sizes_give_in_a_batch_what_they_give_alone(found: Found) -> None:
    # 4 x 6, 8 x 4 and 2 x 2 patches, between two words.
    lengths = {name: row["lengths"] for name, row in found["native"].items()}
    assert lengths == {
        "mlp2x_gelu": [26, 34, 6],
        "pixel_shuffle": [8, 10, 3],
        "resampler:num_queries=5,num_heads=4": [7, 7, 7],
    }
    assert max(row["off"] for row in found["native"].values()) < 2e-6


def test_tiles_are_merged_on_the_grid_that_the_connector_leaves(found: Found) -> None:
    # Two tiles and the whole, of 16 patches each or of 4 squares, between two words.
    assert found["tiles"] == {
        "flat, mlp2x_gelu": 2 + 3 * 16,
        "flat, pixel_shuffle": 2 + 3 * 4,
        "spatial, mlp2x_gelu": 2 + 3 * 16,
        "spatial, pixel_shuffle": 2 + 3 * 4,
        "spatial_unpad, mlp2x_gelu": 2 + 3 * 16 + 4,  # a newline for each row
        "spatial_unpad, pixel_shuffle": 2 + 3 * 4 + 2,
    }


def test_lora_stays_out_of_a_tower_that_is_already_there(found: Found) -> None:
    places = found["places_of_lora"]
    assert places["clip, llava"] > 0  # the trap
    assert places["clip, ours"] == places["aimv2, ours"] == places["aimv2, llava"] == 0
    assert places["llm beside clip, ours"] == places["llm beside clip, llava"] > 0


def test_pixels_are_those_of_transformers_with_pillow(found: Found) -> None:
    assert found["pixels"] < 1e-6


def test_clip_stays_llavas_and_other_folders_are_refused(found: Found) -> None:
    assert found["stock"]["clip"] == "CLIPVisionTower"
    assert "type aimv2:" in found["stock"]["aimv2"]
    assert "type hf:" in found["stock"]["siglip"]


def test_llavas_evaluation_scripts_run(found: Found) -> None:
    assert len(found["evaluated"]) > 3


def test_the_doctor_finds_a_sound_run_sound(found: Found) -> None:
    sound = found["doctor"]["sound"]
    assert sound["faults"] == 0
    text = "\n".join(sound["lines"])
    assert "tower: 26 tensors, finite, equal to aimv2:" in text
    assert "LoRA: none in the vision tower" in text
    assert "4 x 4 patches, 24 wide, become 4 tokens, 32 wide" in text
    assert "part: vision_tower                 31,992 parameters, frozen" in text
    assert "show  image       <image> (4 tokens)" in text


def test_the_doctor_finds_what_is_wrong_with_the_samples(found: Found) -> None:
    sick = found["doctor"]["sick"]
    assert sick["faults"] == 3
    images, unusable, silent = [line for line in sick["lines"] if line.startswith("FAULT")]
    assert "images: 1 of 12 are not in" in images
    assert "gone.png" in images
    assert "samples: 2 of 13 cannot be read" in unusable
    assert "gone.png" in unusable
    assert "cut.png" in unusable
    assert "samples: 2 of 13 teach nothing" in silent
    assert "row 8 (0.png): tokenisation mismatch" in silent
    assert "row 11 (1.png): its answer lies beyond model_max_length 256" in silent
    assert "the answers of 2 are cut" in "\n".join(sick["lines"])


def test_a_run_of_lora_and_tower_goes_on_where_it_stopped(both: dict[str, Found]) -> None:
    resumed = both["current"]["resumed"]
    assert resumed["again"] == pytest.approx(resumed["whole"][2:], abs=1e-5)
    assert resumed["off"] < 1e-5
