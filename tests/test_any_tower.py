"""Whole runs on any tower and connector: aligned, tuned, judged, and asked."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_towers import picture, saved

from aimv2_mllm.chat.chat import answer, load_model
from aimv2_mllm.chat.chatbot import look, prompt_of
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.weights import save_encoder
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.runs.run import run
from aimv2_mllm.stages.table import check_inputs

TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-2, "log_every": 1}
ASKED = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is on it?"}]}
]


def recipe(folder: Path, tower: Path, connector: Any) -> Recipe:
    align = {
        "kind": "align",
        "tower": str(tower),
        "llm": "tiny_llm",
        "connector": connector,
        "train": TRAIN,
    }
    stages = {"align": align, "tune": {"kind": "tune", "start": "align", "train": TRAIN}}
    plain = {"name": "any", "output": folder / "run", "stages": stages}
    plain["evaluation"] = {"questions": 14, "sheets": 2}
    return Recipe.model_validate(plain)


def native(folder: Path) -> Path:
    torch.manual_seed(0)
    save_encoder(AIMv2Encoder(EncoderConfig(16, 24, 2, 2, image_size=56, native=True)), folder)
    Preprocessing(56, native=True).save(folder)
    return folder


@pytest.mark.parametrize(
    ("tower", "connector", "num_tokens", "model_type"),
    [
        ("siglip", "mlp", 16, "llava"),
        ("dinov3_vit", {"name": "average_pool", "target": 2}, 4, "aimv2_mllm_llava"),
        ("native", {"name": "pixel_shuffle", "factor": 2}, 4, "aimv2_mllm_llava"),
    ],
)
def test_a_run_is_aligned_tuned_judged_and_asked(
    tower: str, connector: Any, num_tokens: int, model_type: str, tmp_path: Path
) -> None:
    if tower == "native":
        native(tmp_path / "tower")
    else:
        saved(tower, tmp_path / "tower")
    done = run(recipe(tmp_path, tmp_path / "tower", connector), lambda _: None)
    for stage in ("align", "tune"):
        folder = done / stage / "model"
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == model_type
        bot = load_model(folder)
        [one] = prompt_of(bot, ASKED, [picture(56, 56)], 3, {}).pictures
        assert one.num_tokens == num_tokens
        assert look(bot, [one], {})[one.key].shape == (num_tokens, 128)
    align, tune = ((done / stage / "metrics.jsonl").read_text() for stage in ("align", "tune"))
    assert align != tune
    assert (done / "report.md").is_file()
    bot = load_model(done)
    for shape in ((90, 30), (30, 90), (28, 28)):
        assert isinstance(answer(bot, ASKED, [picture(*shape)], max_new_tokens=3), str)
    if tower == "dinov3_vit":  # a new process knows our models of the hub too
        code = (
            "import sys; from aimv2_mllm.evaluation.answerers import Foreign; Foreign(sys.argv[1])"
        )
        subprocess.run([sys.executable, "-c", code, str(done / "tune" / "model")], check=True)


def test_a_native_tower_that_saw_squares_sees_a_chats_picture_as_one(tmp_path: Path) -> None:
    from aimv2_mllm.chat.prompts import pixels_of

    done = run(recipe(tmp_path, native(tmp_path / "tower"), "mlp"), lambda _: None)
    bot = load_model(done)
    for shape in ((120, 30), (28, 28)):
        pixels = pixels_of(bot.processor, [picture(*shape)], bot.data)
        assert pixels["image_sizes"].tolist() == [[56, 56]]


@pytest.mark.parametrize(
    ("connector", "says"),
    [
        ({"name": "pixel_shuffle", "factor": 3}, "stage align: .*multiples of 3, not 4 x 4"),
        ({"name": "c_abstractor", "target": 9}, "stage align: .*at least .* not 4 x 4"),
        ({"name": "resampler", "num_heads": 7}, "stage align: a resampler into 128 features"),
    ],
)
def test_a_connector_that_does_not_fit_is_said_before_anything_is_trained(
    connector: Any, says: str, tmp_path: Path
) -> None:
    saved("siglip", tmp_path / "tower")
    plan = recipe(tmp_path, tmp_path / "tower", connector)
    with pytest.raises(UsageError, match=says):
        check_inputs(Place(plan, tmp_path / "run"))


def test_a_tower_that_is_none_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text('{"model_type": "vit"}')
    plan = recipe(tmp_path, tmp_path / "tower", "mlp")
    with pytest.raises(UsageError, match=r"stage align: .*'vit'; the known towers are aimv2, "):
        check_inputs(Place(plan, tmp_path / "run"))
