"""Many conversations answered together: what each is answered alone."""

from typing import Any

import pytest
from test_session import (
    DRAWN,
    NATIVE,
    PICTURES,
    ROOM,
    bot_of,
    llm,
    said_alone,
    talk_of,
    tower_counted,
)

from aimv2_mllm.chat.chat import answer, answer_all
from aimv2_mllm.chat.chatbot import Chatbot
from aimv2_mllm.chat.session import ChatSession
from aimv2_mllm.data.talks.conversations import Message, said
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.sampling import Sampling


@pytest.fixture(scope="module")
def bot() -> Chatbot:
    return bot_of(llm())


def conversations(bot: Chatbot) -> list[tuple[list[Message], Any]]:
    """Nine conversations of different lengths, with no picture, one and two."""
    talks = [(messages, images) for messages, images, _, _ in talk_of(ChatSession(bot))]
    talks += [([said_alone()], []), ([said("user", "Name this.", pictures=1)], PICTURES[1:])]
    return [*talks, *talks[::2]]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "native"])
def test_answers_in_batches_are_those_given_one_by_one(kind: str) -> None:
    bot = bot_of(llm(), native=True, **NATIVE) if kind == "native" else bot_of(llm(kind))
    # Some token that comes up in the middle of some answers ends them.
    talks = conversations(bot)
    bot.model.generation_config.eos_token_id = [
        bot.processor.tokenizer.encode(answer(bot, *talks[0], max_new_tokens=ROOM))[-1]
    ]
    alone = [answer(bot, *talk, max_new_tokens=ROOM) for talk in talks]
    together = answer_all(bot, talks, max_new_tokens=ROOM)
    assert together == alone
    assert len(set(together)) > 2
    for sampling in (Sampling(**DRAWN, seed=3), Sampling(stop=("e", "a"))):
        words = {"max_new_tokens": ROOM, "sampling": sampling}
        assert answer_all(bot, talks, **words) == [answer(bot, *talk, **words) for talk in talks]


def test_a_batch_looks_once_at_a_picture_that_many_ask_about(bot: Chatbot) -> None:
    talks = [([said("user", f"Where is {n}?", pictures=1)], PICTURES[:1]) for n in range(5)]
    with tower_counted(bot) as seen:
        answer_all(bot, talks, max_new_tokens=2)
        assert seen == [1]
        kept = dict[str, Any]()
        first = answer_all(bot, talks, max_new_tokens=2, seen=kept)
        assert answer_all(bot, talks, max_new_tokens=2, seen=kept) == first
    assert seen == [1, 1]


def test_of_a_batch_the_conversation_that_is_wrong_is_named(bot: Chatbot) -> None:
    talks = [([said_alone()], []), ([said_alone()], PICTURES[:1])]
    with pytest.raises(UsageError, match="conversation 1: the messages speak of 0 pictures, and 1"):
        answer_all(bot, talks)
    for ask in (answer, lambda bot, *talk, **words: answer_all(bot, [talk], **words)):
        with pytest.raises(UsageError, match="max_new_tokens is 0, must be 1 or more"):
            ask(bot, [said_alone()], [], max_new_tokens=0)
    assert answer_all(bot, []) == []
