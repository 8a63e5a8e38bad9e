"""Text out of tokens as they come: whole characters, nothing of a text at which it stops."""

import random
from typing import Any

import pytest
from test_templates import llama

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.llms import load_tokenizer
from aimv2_mllm.model.sampling import GREEDY, Sampling
from aimv2_mllm.model.speech import Speech

TEXT = "What is it? A 🐈‍⬛ on a  wall, ​中文 naïve…\n\n and so on. "


def pieces(speech: Speech, tokens: list[int]) -> list[str]:
    said = []
    for token in tokens:
        said.append(speech.push(token))
        if speech.ended:
            break
    return [*said, speech.rest()]


@pytest.fixture(scope="module", params=["bytes", "words"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return load_tokenizer("tiny_llm") if request.param == "bytes" else llama()


def test_pieces_are_whole_characters_and_make_up_the_text(tokenizer: Any) -> None:
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    said = pieces(Speech(tokenizer), tokens)
    assert "".join(said) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert len([piece for piece in said if piece]) > 10
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in said)


def test_special_tokens_are_not_said(tokenizer: Any) -> None:
    [word] = tokenizer.encode("it", add_special_tokens=False)[-1:]
    end = tokenizer.eos_token_id
    said = pieces(Speech(tokenizer), [word, end, word])
    assert "".join(said) == tokenizer.decode([word, end, word], skip_special_tokens=True)


def test_half_a_character_comes_at_the_end_alone() -> None:
    tokenizer = load_tokenizer("tiny_llm")
    tokens = tokenizer.encode("🐈", add_special_tokens=False)
    speech = Speech(tokenizer)
    assert [speech.push(token) for token in tokens[:-1]] == [""] * (len(tokens) - 1)
    assert set(speech.rest()) == {"\N{REPLACEMENT CHARACTER}"}


def test_a_text_to_stop_at_is_found_wherever_it_stands_and_never_said(tokenizer: Any) -> None:
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    draw = random.Random(0)
    for _ in range(200):
        begin = draw.randrange(len(whole))
        stops = [whole[begin : begin + draw.randrange(1, 9)], "not there", whole[begin + 1 :] + "!"]
        speech = Speech(tokenizer, stops)
        assert "".join(pieces(speech, tokens)) == whole.partition(stops[0])[0], stops
        assert speech.ended


def test_what_only_begins_like_it_is_said_in_the_end(tokenizer: Any) -> None:
    tokens = tokenizer.encode("it is a", add_special_tokens=False)
    speech = Speech(tokenizer, ["a wall", "s a wall"])
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(speech.push(token) for token in tokens) == whole[: whole.index("s a")]
    assert speech.rest() == "s a"
    assert not speech.ended


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, must be 0 .always the likeliest., or 0.01"),
        ({"temperature": 2.5}, "temperature is 2.5, must be"),
        ({"temperature": float("nan")}, "temperature is NaN, must be"),
        ({"temperature": "hot"}, 'temperature is "hot", must be'),
        ({"temperature": True}, "temperature is true, must be"),
        ({"top_p": 0}, "top_p is 0, must be above 0, up to 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_k": -1}, "top_k is -1, must be 0 .all., or a whole number"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, must be 0.1 to 10"),
        ({"seed": -1}, "seed is -1, must be a whole number from 0 on"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"stop": ("a", "")}, "stop has an empty text"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        Sampling(**setting)
    assert "\n" not in str(error.value)


def test_settings_at_the_ends_of_their_ranges_are_taken() -> None:
    Sampling(temperature=0.01, top_p=1e-6, top_k=1, repetition_penalty=0.1, seed=0, stop=("a",))
    Sampling(temperature=2, top_p=1, repetition_penalty=10, seed=2**63 - 1)
    assert GREEDY.is_plain
    assert not Sampling(temperature=1).is_plain
    assert not Sampling(repetition_penalty=1.1).is_plain
