"""Where an answer looked: the model's own attention, on the picture as its tower got it."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_session import LLMS, NATIVE, PICTURES, ROOM, bot_of, llm, said_alone

from aimv2_mllm.chatbot import Chatbot
from aimv2_mllm.errors import UsageError
from aimv2_mllm.looking import as_seen, attention, heat_map, with_grid, words_of
from aimv2_mllm.prompts import Message, said
from aimv2_mllm.session import ChatSession, Record

TALK: list[Message] = [
    said("user", "What is it?", pictures=1),
    said("assistant", "A cat."),
    said("user", "And this?", pictures=1),
]


def answered(bot: Chatbot) -> tuple[str, Record]:
    reply = ChatSession(bot).stream(TALK, PICTURES, max_new_tokens=ROOM)
    return "".join(reply), reply.record


def by_hand(bot: Chatbot, record: Record, index: int) -> list[np.ndarray]:
    """The same by one pass of a model that attends plainly, over all tokens at once."""
    model = bot.model
    ids = torch.tensor([[*record.prompt.ids, *record.tokens[:index]]])
    pixels = bot.processor.image_processor(PICTURES, return_tensors="pt")
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(input_ids=ids, **pixels, output_attentions=True).attentions
    model.set_attn_implementation(usual)
    shares = torch.stack([layer[0, :, -1].mean(0) for layer in layers]).mean(0)
    counts = [len(picture) for picture in record.pictures]
    marks = ids[0] == model.config.image_token_id
    assert marks.sum() == sum(counts), "another seed is needed: the answer has an image mark"
    return [part.numpy() for part in shares[marks].split(counts)]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "native"])
def test_the_shares_are_those_of_a_pass_over_everything(kind: str) -> None:
    bot = bot_of(llm(), native=True, **NATIVE) if kind == "native" else bot_of(llm(kind))
    text, record = answered(bot)
    for index in (0, 5, ROOM - 1):
        found = attention(bot, record, index)
        for ours, theirs in zip(found, by_hand(bot, record, index), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert "sdpa" in str(bot.model.config.text_config._attn_implementation)
    assert answered(bot)[0] == text


@pytest.fixture(scope="module")
def bot() -> Chatbot:
    return bot_of(llm("llama", **LLMS["llama"]))


def test_looking_leaves_the_model_as_it_was(bot: Chatbot) -> None:
    _, record = answered(bot)
    language = bot.model.model.language_model
    before = dict(language.named_parameters())
    attention(bot, record, 0)
    after = dict(language.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert language.config._attn_implementation == "sdpa"
    assert bot.model.config.text_config is language.config


def test_the_words_of_the_tokens_make_up_the_answer(bot: Chatbot) -> None:
    text, record = answered(bot)
    words = words_of(bot, record.tokens)
    assert len(words) == len(record.tokens) == ROOM
    assert "".join(words).strip() == text
    assert words_of(bot, []) == []


def test_where_there_is_nothing_to_look_at_is_said(bot: Chatbot) -> None:
    _, record = answered(bot)
    for index in (-1, ROOM):
        with pytest.raises(UsageError, match=f"has 12 tokens, 0 to 11: there is no token {index}"):
            attention(bot, record, index)
    reply = ChatSession(bot).stream([said_alone()], [], max_new_tokens=2)
    list(reply)
    with pytest.raises(UsageError, match="no picture, so the answer looked nowhere"):
        attention(bot, reply.record, 0)


def test_the_heat_lies_where_the_share_is() -> None:
    bot = bot_of(llm(), native=True, **NATIVE)
    wide = Image.new("RGB", (240, 60), (10, 20, 250))
    seen = as_seen(bot, wide)
    assert seen.picture.size == (112, 28)
    assert (seen.patches, seen.tokens) == ((2, 8), (1, 4))
    shares = np.float32([0.0, 0.1, 0.4, 0.0])
    picture = np.asarray(heat_map(seen, shares)).astype(int)
    assert picture.shape == (112, 448, 3)
    bright = picture.sum(-1)
    assert (bright[:, 224:336] > 450).all()
    assert (bright[:, :112] < 150).all()
    assert picture[50, 150, 0] > picture[50, 150, 2] + 50  # red


def test_the_picture_is_shown_as_the_tower_gets_it(bot: Chatbot) -> None:
    seen = as_seen(bot, PICTURES[0])
    assert seen.picture.size == (56, 56)
    assert seen.patches == seen.tokens == (4, 4)
    expected = PICTURES[0].resize((84, 56), Image.Resampling.BICUBIC).crop((14, 0, 70, 56))
    difference = np.asarray(seen.picture).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1
    grid = np.asarray(with_grid(seen))
    assert grid.shape == (448, 448, 3)
    assert (grid[112] == 128).all()
    assert (grid[:, 336] == 128).all()
    assert not (grid[100] == 128).all()


def test_tokens_without_places_are_not_shown_in_any() -> None:
    words: dict[str, Any] = {"connector": "resampler", "options": {"num_queries": 5}}
    bot = bot_of(llm(), **words)
    seen = as_seen(bot, PICTURES[0])
    assert (seen.patches, seen.tokens) == ((4, 4), None)
    _, record = answered(bot)
    shares = attention(bot, record, 3)
    assert [part.shape for part in shares] == [(5,), (5,)]
    with pytest.raises(UsageError, match="tokens without a place"):
        heat_map(seen, shares[0])
