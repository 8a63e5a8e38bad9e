"""A conversation that is remembered: answers are those of a model that forgets, and no picture is
looked at twice."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from test_mllm import LLMS, SIZES, assembled, tower
from tiny_towers import picture

from aimv2_mllm.chat.chat import answer
from aimv2_mllm.chat.chatbot import Chatbot, prompt_of
from aimv2_mllm.chat.session import ChatSession
from aimv2_mllm.data.talks.conversations import Message, said
from aimv2_mllm.model.sampling import Sampling

ROOM = 12
NATIVE = {"connector": "pixel_shuffle", "options": {"factor": 2}}
PICTURES = [picture(60, 40), picture(40, 44)]


def llm(kind: str = "llama", **words: Any) -> Any:
    """A random LLM; tied embeddings would make it say its last token again and again."""
    torch.manual_seed(0)
    settings = {**SIZES, **LLMS.get(kind, {}), "tie_word_embeddings": False, **words}
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # as drawn, whatever it sees would change little
        parameter.data *= 3
    return model


def bot_of(llm: Any, *, native: bool = False, **connector: Any) -> Chatbot:
    model, processor = assembled(tower(native=native), llm, **connector)
    model.generation_config.eos_token_id = None  # answers are as long as they may be
    return Chatbot(model, processor)


@pytest.fixture(scope="module")
def bot() -> Chatbot:
    return bot_of(llm())


def talk_of(session: ChatSession, **words: Any) -> Iterator[tuple[list[Message], Any, str, Any]]:
    """A conversation of four turns, the third of which brings a second picture: at each turn the
    messages, the pictures, the answer and its counts."""
    messages: list[Message] = []
    turns = [("What is it?", 1), ("Where is it?", 0), ("And this?", 1), ("What is red?", 0)]
    num_pictures = 0
    for text, new in turns:
        messages.append(said("user", text, pictures=new))
        num_pictures += new
        reply = session.stream(messages, PICTURES[:num_pictures], max_new_tokens=ROOM, **words)
        text = "".join(reply)
        yield list(messages), PICTURES[:num_pictures], text, reply.counts
        messages.append(said("assistant", text))


def generated(bot: Chatbot, messages: list[Message], images: Any, **words: Any) -> str:
    """The answer of transformers' own `generate`, from nothing."""
    ids = torch.tensor([prompt_of(bot, messages, images, ROOM, {}).ids])
    pixels = bot.processor.image_processor(images, return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": ROOM, **words}
    tokens = bot.model.generate(input_ids=ids, attention_mask=ids * 0 + 1, **pixels, **settings)
    tokenizer = bot.processor.tokenizer
    return str(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@contextmanager
def tower_counted(bot: Chatbot) -> Iterator[list[int]]:
    """How many pictures the tower sees at each run."""
    seen: list[int] = []
    hook = bot.model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, words: seen.append(len(args[0] if args else words["pixel_values"])),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        hook.remove()


def check(bot: Chatbot) -> list[str]:
    """Each turn's answer is that of generate on the whole conversation; a picture is seen once."""
    answers = []
    with tower_counted(bot) as seen:
        turns = list(talk_of(ChatSession(bot)))
        assert seen == [1, 1]
    for number, (messages, images, text, counts) in enumerate(turns):
        assert text == generated(bot, messages, images), number
        asked = prompt_of(bot, messages, images, ROOM, {})
        assert counts.prompt_tokens == len(asked.ids)
        assert counts.image_tokens == sum(one.num_tokens for one in asked.pictures)
        if number:
            # But for the end of the last answer, which is written anew, only what is new is run.
            assert counts.cached_tokens >= turns[number - 1][3].prompt_tokens - 1
        answers.append(text)
    return answers


@pytest.mark.parametrize("kind", LLMS)
def test_a_remembered_conversation_goes_on_as_if_it_were_not(kind: str) -> None:
    answers = check(bot_of(llm(kind)))
    assert len(set(answers)) > 2, answers


def test_a_native_tower_with_fewer_tokens_is_remembered_alike() -> None:
    bot = bot_of(llm(), native=True, **NATIVE)
    assert bot.model.config.model_type == "aimv2_mllm_llava"
    assert len(set(check(bot))) > 2


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_a_sliding_window_that_is_long_full_can_be_cut_back(kind: str) -> None:
    bot = bot_of(llm(kind, sliding_window=8))
    check(bot)
    session = ChatSession(bot)
    [*_, last] = talk_of(session)
    again = session.stream(last[0][:3], PICTURES[:1], max_new_tokens=ROOM)
    assert "".join(again) == generated(bot, last[0][:3], PICTURES[:1])
    assert again.counts.cached_tokens == again.counts.prompt_tokens - 1


def test_a_model_with_recurrent_layers_begins_anew_where_it_must() -> None:
    bot = bot_of(llm("lfm2", layer_types=["conv", "full_attention"]))
    for messages, images, text, counts in talk_of(ChatSession(bot)):
        assert text == generated(bot, messages, images)
        assert counts.cached_tokens == 0


def history(bot: Chatbot) -> tuple[ChatSession, list[Message]]:
    """A session after four turns, and the messages up to the fourth question."""
    session = ChatSession(bot)
    *_, (messages, _, _, _) = talk_of(session)
    return session, messages


def test_a_retry_runs_one_token_and_says_the_same(bot: Chatbot) -> None:
    session, messages = history(bot)
    first = "".join(session.stream(messages, PICTURES, max_new_tokens=ROOM))
    again = session.stream(messages, PICTURES, max_new_tokens=ROOM)
    assert "".join(again) == first == answer(bot, messages, PICTURES, max_new_tokens=ROOM)
    assert again.counts.cached_tokens == again.counts.prompt_tokens - 1


def test_what_is_said_otherwise_is_computed_from_there_on(bot: Chatbot) -> None:
    session, messages = history(bot)
    edited = [*messages[:2], said("user", "How many are there?")]
    with tower_counted(bot) as seen:
        reply = session.stream(edited, PICTURES[:1], max_new_tokens=ROOM)
        assert "".join(reply) == generated(bot, edited, PICTURES[:1])
        assert seen == [1]  # by generate alone
    common = prompt_of(bot, messages[:1], PICTURES[:1], ROOM, {})
    assert common.room == ROOM
    assert len(common.ids) <= reply.counts.cached_tokens < reply.counts.prompt_tokens - 3


def test_another_picture_in_its_place_is_another_conversation(bot: Chatbot) -> None:
    session, question = ChatSession(bot), [said("user", "What is it?", pictures=1)]
    one, other = (session.stream(question, [image], max_new_tokens=ROOM) for image in PICTURES)
    before, text = "".join(one), "".join(other)
    assert text == generated(bot, question, PICTURES[1:]) != before
    assert other.counts.cached_tokens < 5  # what stands before it


def test_the_same_picture_twice_is_looked_at_once(bot: Chatbot) -> None:
    question = [said("user", "Which differs?", pictures=2)]
    images = [PICTURES[0], PICTURES[0].copy()]
    with tower_counted(bot) as seen:
        text = answer(bot, question, images, max_new_tokens=ROOM)
        assert seen == [1]
    assert text == generated(bot, question, images)


def test_turns_left_out_for_room_leave_the_answers_right(
    bot: Chatbot, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Chatbot, "limit", 120)
    session, messages = ChatSession(bot), [said("user", "What is it?", pictures=1)]
    with tower_counted(bot) as seen:
        for number in range(6):
            text = "".join(session.stream(messages, PICTURES[:1], max_new_tokens=ROOM))
            assert text == answer(bot, messages, PICTURES[:1], max_new_tokens=ROOM)
            messages += [said("assistant", text), said("user", f"And where is {number}?")]
        assert seen == [1] * 7  # once by the session, six times by those who forget
    assert "turns are left out" in capsys.readouterr().err


def test_a_stopped_answer_is_gone_on_from(bot: Chatbot) -> None:
    session, question = ChatSession(bot), [said("user", "What is it?", pictures=1)]
    reply = session.stream(question, PICTURES[:1], max_new_tokens=ROOM)
    begun = next(reply)
    reply.close()
    assert list(reply) == []
    messages = [*question, said("assistant", begun), said("user", "Go on.")]
    after = session.stream(messages, PICTURES[:1], max_new_tokens=ROOM)
    assert "".join(after) == generated(bot, messages, PICTURES[:1])
    assert after.counts.cached_tokens > 16


def test_two_answers_at_a_time_are_both_right(bot: Chatbot) -> None:
    session, messages = history(bot)
    expected = answer(bot, messages, PICTURES, max_new_tokens=ROOM)
    one = session.stream(messages, PICTURES, max_new_tokens=ROOM)
    begun = next(one)
    other = session.stream(messages[:1], PICTURES[:1], max_new_tokens=ROOM)
    assert "".join(other) == answer(bot, messages[:1], PICTURES[:1], max_new_tokens=ROOM)
    assert begun + "".join(one) == expected


def test_after_an_error_it_begins_anew(bot: Chatbot, monkeypatch: pytest.MonkeyPatch) -> None:
    session, messages = history(bot)
    layer = bot.model.model.language_model.layers[-1]

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")  # when the first layer's cache has grown already

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(session.stream(messages, PICTURES))
    reply = session.stream(messages, PICTURES, max_new_tokens=ROOM)
    assert "".join(reply) == answer(bot, messages, PICTURES, max_new_tokens=ROOM)
    assert reply.counts.cached_tokens == 0


def num_tensors() -> int:
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_what_was_remembered_goes_with_the_conversation(bot: Chatbot) -> None:
    history(bot)
    gc.collect()
    before = num_tensors()
    gc.disable()
    try:
        for _ in range(2):
            session, messages = history(bot)
            reply = session.stream(messages, PICTURES)
            next(reply)
            assert num_tensors() > before
            del session, reply
            assert num_tensors() == before
        session, _ = history(bot)
        session.forget()
        assert num_tensors() == before
    finally:
        gc.enable()


def test_answers_are_counted(bot: Chatbot) -> None:
    *_, (_, _, _, counts) = talk_of(ChatSession(bot))
    assert counts.image_tokens == 32
    assert counts.answer_tokens == ROOM
    assert 0 < counts.first_token_seconds < 60
    assert counts.tokens_per_second == pytest.approx((ROOM - 1) / counts.later_seconds)
    said = f"prompt {counts.prompt_tokens} tokens (32 image, {counts.cached_tokens} cached); "
    assert str(counts).startswith(said)
    reply = ChatSession(bot).stream([said_alone()], [], max_new_tokens=1)
    assert list(reply)
    assert (reply.counts.answer_tokens, reply.counts.tokens_per_second) == (1, 0)


def said_alone() -> Message:
    return said("user", "Say a word.")


DRAWN = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3}


def test_a_seed_draws_what_transformers_draws_and_leaves_the_global_one_alone(
    bot: Chatbot,
) -> None:
    question = [said("user", "What is it?", pictures=1)]
    before = torch.get_rng_state()
    texts = [
        answer(
            bot, question, PICTURES[:1], max_new_tokens=ROOM, sampling=Sampling(**DRAWN, seed=seed)
        )
        for seed in (5, 5, 6)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1] != texts[2]
    for seed, text in ((5, texts[0]), (6, texts[2])):
        torch.manual_seed(seed)
        assert text == generated(bot, question, PICTURES[:1], do_sample=True, **DRAWN)


def test_without_a_seed_each_answer_is_drawn_anew(bot: Chatbot) -> None:
    sampling = Sampling(temperature=1.0)
    assert len({answer(bot, [said_alone()], [], sampling=sampling) for _ in range(4)}) > 1


def test_a_penalty_alone_is_still_greedy(bot: Chatbot) -> None:
    question = [said("user", "What is it?", pictures=1)]
    sampling = Sampling(repetition_penalty=1.5)
    text = answer(bot, question, PICTURES[:1], max_new_tokens=ROOM, sampling=sampling)
    assert text == generated(bot, question, PICTURES[:1], repetition_penalty=1.5)
    assert text != answer(bot, question, PICTURES[:1], max_new_tokens=ROOM)
