"""Inside a model: the tower's view of a picture, where an answer looked, what a decoder paints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from aimv2_mllm.chat.chat import load_model, stream
from aimv2_mllm.chat.chatbot import Chatbot
from aimv2_mllm.chat.prompts import pixels_of
from aimv2_mllm.data.talks.conversations import said
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation import dreams, painter
from aimv2_mllm.evaluation.painter import Painter
from aimv2_mllm.folders import talking_folder
from aimv2_mllm.visitors import insight
from aimv2_mllm.visitors.showroom import sheet

PICTURE = sheet(5)[0]
ASKED = [said("user", "Describe the sheet.", pictures=1)]


@pytest.fixture(scope="module")
def bot(tiny_run: Path) -> Chatbot:
    return load_model(tiny_run)


def test_the_view_is_what_the_tower_gets_and_makes_of_it(bot: Chatbot) -> None:
    seen = insight.view(bot, PICTURE)
    assert seen.grid == (4, 4)
    resized = np.asarray(PICTURE.resize((56, 56), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(seen.pixels.astype(int) - resized).max() <= 1
    pixels = pixels_of(bot.processor, [PICTURE], bot.data)["pixel_values"]
    with torch.inference_mode():
        expected = bot.model.model.vision_tower(pixels).last_hidden_state[0]
    torch.testing.assert_close(seen.tokens, expected)
    assert insight.gridded(seen).size == insight.coloured(seen).size == (448, 448)


def test_lines_stand_between_patches(bot: Chatbot) -> None:
    seen = insight.view(bot, Image.new("RGB", (56, 56)))  # black
    bright = np.asarray(insight.gridded(seen)).max(-1) > 0
    assert np.flatnonzero(bright[1]).tolist() == [112, 224, 336]
    assert np.flatnonzero(bright[:, 1]).tolist() == [112, 224, 336]


def ids_of(bot: Chatbot, text: str) -> list[int]:
    return list(bot.processor.tokenizer(text, add_special_tokens=False).input_ids)


def test_the_tokens_looked_at_are_those_that_were_made(bot: Chatbot) -> None:
    reply = stream(bot, ASKED, [PICTURE], max_new_tokens=4)
    "".join(reply)
    assert 1 <= len(reply.tokens) == len(insight.where(bot, ASKED, [PICTURE], reply.tokens).texts)
    spelt = bot.processor.tokenizer.convert_tokens_to_ids([*"red"])
    assert spelt != ids_of(bot, "red")  # a model may write in other tokens than its tokenizer
    assert insight.where(bot, ASKED, [PICTURE], spelt).texts == [*"red"]


def test_where_it_looked_is_what_an_eager_model_says(bot: Chatbot, tiny_run: Path) -> None:
    text = " a red 3"
    found = insight.where(bot, ASKED, [PICTURE], ids_of(bot, text))
    assert "".join(found.texts) == text
    assert np.allclose(found.shares.sum((1, 2)), 1)
    other = AutoModelForImageTextToText.from_pretrained(
        talking_folder(tiny_run), attn_implementation="eager", dtype=torch.float32
    ).eval()
    pixels = pixels_of(bot.processor, [PICTURE], bot.data)["pixel_values"]
    prompt = "<s><|user|>" + "<image>" * 16 + " Describe the sheet.<|end|><|assistant|>" + text
    ids = bot.processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        made = other(input_ids=ids, pixel_values=pixels, output_attentions=True)
    weights = torch.stack(made.attentions).mean((0, 1, 2))  # (T, T), of all layers and heads
    rows = weights[-len(found.texts) - 1 : -1]
    marks = (ids[0] == other.config.image_token_id).nonzero()[:, 0]
    expected = rows[:, marks] / rows[:, marks].sum(-1, keepdim=True)
    np.testing.assert_allclose(found.shares.reshape(len(rows), -1), expected, rtol=1e-4)


def test_looking_leaves_the_model_as_it_was(bot: Chatbot) -> None:
    config = bot.model.model.language_model.config
    before = config._attn_implementation
    insight.where(bot, ASKED, [PICTURE], [3])
    assert config._attn_implementation == before == "sdpa"


def test_without_an_answer_or_a_picture_nothing_is_looked_at(bot: Chatbot) -> None:
    for images, ids in (([PICTURE], []), ([], [3])):
        with pytest.raises(UsageError, match="no answer about a picture"):
            insight.where(bot, ASKED, images, ids)


def test_a_connector_without_places_is_refused(
    bot: Chatbot, monkeypatch: pytest.MonkeyPatch
) -> None:
    projector: Any = bot.model.model.multi_modal_projector
    monkeypatch.setattr(projector, "out_grid", lambda grid: None, raising=False)
    with pytest.raises(UsageError, match="lie nowhere in the picture"):
        insight.where(bot, ASKED, [PICTURE], [3])
    monkeypatch.setattr(projector, "out_grid", lambda grid: (3, 3), raising=False)
    with pytest.raises(UsageError, match="lie nowhere in the picture"):
        insight.where(bot, ASKED, [PICTURE], [3])


def test_heat_is_reddest_where_the_share_is_largest(bot: Chatbot) -> None:
    shares = np.zeros((2, 2))
    shares[0, 1] = 1
    heat = np.asarray(insight.heated(insight.view(bot, PICTURE), shares)).astype(int)
    red = heat[..., 0] - heat[..., 2]
    assert red[:224, 224:].min() > 200
    assert red[:, :224].max() == red[224:].max() == 0


def test_a_painter_paints_what_dream_does(tiny_run: Path) -> None:
    here = Painter(tiny_run / "pretrain" / "model")
    shown, painted, caption = insight.painted(here, PICTURE, 6)
    model, tokenizer, preprocessing = dreams.load_pretrainer(tiny_run / "pretrain" / "model")
    pixels = preprocessing.prepare([PICTURE])
    [expected] = preprocessing.restore(dreams.paint(model, pixels, 6))
    assert np.array_equal(np.asarray(painted)[::8, ::8], expected)
    assert caption == dreams.write_caption(model, pixels, tokenizer)[0]
    same = np.asarray(shown) == np.asarray(painted)
    assert same[:112].all(), "the first row of patches was shown"
    assert not same.all()


@pytest.mark.parametrize(
    ("prefix", "statistics", "words"),
    [(0, "true", "1 to 15"), (16, "true", "1 to 15"), (3, "guessed", "true, previous, prefix")],
)
def test_a_painter_says_what_it_takes(
    tiny_run: Path, prefix: int, statistics: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Painter(tiny_run / "pretrain" / "model").check(prefix, statistics)


def test_what_a_decoder_never_learned_is_not_asked_of_it(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        painter, "stage_record", lambda _: {"recipe": {"alpha": 0, "text_weight": 0}}
    )
    here = Painter(tiny_run / "pretrain" / "model")
    shown, painted, caption = insight.painted(here, PICTURE, 6)
    assert shown.tobytes() == painted.tobytes()
    assert caption == painter.UNWRITTEN
