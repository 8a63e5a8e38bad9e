"""Conversations in tokens: LLaVA's own ways against LLaVA, and chat templates of many kinds."""

import copy
import json
from typing import Any

import llava_facts
import numpy as np
import pytest

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.talks.conversations import messages_of, turn
from aimv2_mllm.data.talks.templates import V1_CHAT_TEMPLATE, Writer
from aimv2_mllm.errors import UsageError
from aimv2_mllm.marks import UNSUPERVISED
from aimv2_mllm.model.llms import load_tokenizer

FACTS: dict[str, dict[str, list[int]]] = json.loads(llava_facts.FACTS.read_text())
ROLES = {"human": "user", "gpt": "assistant"}
LLAVA_IMAGE = -200  # its id of a picture's place

# As the LLMs of these names have them, without tools.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{% for m in messages %}{{ bos_token if loop.first else '' }}{{ '<|header|>' + m.role + "
    "'<|/header|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %} {{ p.text }}{% endif %}{% endfor %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TALK = [
    ("user", "<image>\nWhat is it?"),
    ("assistant", "A cat."),
    ("user", "Think. A cat.?"),
    ("assistant", "it"),
    ("user", "x"),
    ("assistant", "A cat. A cat."),
]


def llama(template: str | None = None, *, legacy: bool = True) -> Any:
    tokenizer = llava_facts.llama_tokenizer(legacy=legacy)
    special = ["<image>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def supervised(tokenizer: Any, talk: list[tuple[str, str]], template: str = "chat") -> str:
    encoded = Writer(tokenizer, template, num_image_tokens=3)(messages_of(talk, 1))
    assert ((encoded.labels == UNSUPERVISED) | (encoded.labels == encoded.ids)).all()
    return str(tokenizer.decode(encoded.labels[encoded.labels != UNSUPERVISED]))


@pytest.mark.parametrize("fact", FACTS)
def test_llavas_templates_are_those_of_its_own_preprocessing(fact: str) -> None:
    name, kind, row = fact.split(", ", 2)
    said = (llava_facts.ROWS if name == "v1" else llava_facts.PLAIN)[row]
    tokenizer = llama(legacy=kind == "legacy")
    pictures = int(any("<image>" in text for _, text in said))
    messages = messages_of([(ROLES[who], text) for who, text in said], pictures)
    ids, labels = Writer(tokenizer, name, num_image_tokens=1)(messages)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert np.where(ids == image, LLAVA_IMAGE, ids).tolist() == FACTS[fact]["input_ids"]
    if set(FACTS[fact]["labels"]) == {UNSUPERVISED}:
        # LLaVA warns of a "tokenization mismatch" and learns nothing from such a row.
        assert kind == "new"
        assert (labels != UNSUPERVISED).sum() > 8
    else:
        assert labels.tolist() == FACTS[fact]["labels"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "A cat.<|im_end|>it<|im_end|>A cat. A cat.<|im_end|>"),
        (HEADERS, "A cat.<|eot_id|>it<|eot_id|>A cat. A cat.<|eot_id|>"),
        (BRACKETS, "A cat.</s>it</s>A cat. A cat.</s>"),
        (PARTS, " A cat.</s> it</s> A cat. A cat.</s>"),
        (V1_CHAT_TEMPLATE, " A cat.</s> it</s> A cat. A cat.</s>"),
    ],
)
def test_what_the_assistant_says_is_found_in_any_template_with_its_end(
    template: str, expected: str
) -> None:
    # By the letters: this small tokenizer decodes ▁ at the beginning as nothing.
    said = supervised(llama(template), TALK).replace("<0x0A>", "\n")
    assert said.replace(" ", "") == expected.replace(" ", "")


@pytest.mark.parametrize("template", [CHATML, HEADERS, BRACKETS, PARTS])
def test_a_picture_stands_where_the_question_has_it(template: str) -> None:
    tokenizer = llama(template)
    encoded = Writer(tokenizer, num_image_tokens=3)(messages_of(TALK, 1))
    image = tokenizer.convert_tokens_to_ids("<image>")
    places = np.flatnonzero(encoded.ids == image)
    assert places.tolist() == list(range(places[0], places[0] + 3))
    assert "What" in tokenizer.decode(encoded.ids[places[-1] + 1 :][:12])


def test_marks_in_a_template_and_their_absence_give_the_same_labels() -> None:
    marked = load_tokenizer("tiny_llm")
    mute = copy.deepcopy(marked)
    for word in ("{% generation %}", "{% endgeneration %}"):
        mute.chat_template = mute.chat_template.replace(word, "")
    for talk in (messages_of(TALK, 1), turn("Where?", "here")):
        one, other = Writer(marked)(talk), Writer(mute)(talk)
        assert one.ids.tolist() == other.ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{% for m in messages %}{{ m.role }}{% endfor %}",  # writes nothing of what is said
        CHATML.replace("m.content", "m.content.upper()"),
        "{{ raise_exception('no') }}",
        # The end stands outside of what is marked, and nothing else tells where an answer begins.
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_tell_where_answers_end_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match="does not tell where an answer begins and ends"):
        Writer(llama(template))


def test_marks_that_leave_the_end_out_are_not_believed() -> None:
    template = CHATML.replace(
        "m.content +",
        "'' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{",
    )
    said = supervised(llama(template), TALK)
    assert said.count("<|im_end|>") == 3


def test_a_conversation_that_is_too_long_loses_its_last_turns_and_only_those() -> None:
    writer = Writer(llama(CHATML), num_image_tokens=3)
    messages = messages_of(TALK, 1)
    whole, left_out = writer.fitted(messages, 10_000)
    assert left_out == 0
    lengths = [len(writer(messages[: 2 * count]).ids) for count in (1, 2, 3)]
    assert lengths[2] == len(whole.ids)
    for most, count in ((lengths[2] - 1, 2), (lengths[1], 2), (lengths[1] - 1, 1), (lengths[0], 1)):
        encoded, left_out = writer.fitted(messages, most)
        assert (len(encoded.ids), left_out) == (lengths[count - 1], 3 - count)
    for most, cut in ((lengths[0] - 1, True), (lengths[2] - 1, False)):
        with pytest.raises(Unusable, match="max_tokens allows") as error:
            writer.fitted(messages, most, cut=cut)
        assert error.value.reason == "too_long"


@pytest.mark.parametrize(
    ("said", "pictures", "reason"),
    [
        ([("assistant", "a"), ("user", "b")], 0, "assistant_first"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], 0, "roles"),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], 0, "roles"),
        ([("user", "a"), ("tool", "b")], 0, "roles"),
        ([("system", "a")], 0, "roles"),
        ([], 0, "roles"),
        ([("user", "a"), ("assistant", " \n")], 0, "empty_answer"),
        ([("user", "<image> <image>"), ("assistant", "b")], 1, "marks"),
        ([("user", "<image>"), ("assistant", "b")], 2, "marks"),
        ([("user", "<image>"), ("assistant", "b")], 0, "marks"),
        ([("user", "a"), ("assistant", "<image>")], 1, "marks"),
    ],
)
def test_what_is_no_conversation_is_told(
    said: list[tuple[str, str]], pictures: int, reason: str
) -> None:
    with pytest.raises(Unusable) as error:
        messages_of(said, pictures)
    assert error.value.reason == reason


def test_pictures_without_marks_stand_before_the_first_question() -> None:
    asked = messages_of([("system", "s"), ("user", "a"), ("assistant", "b")], 2)[1]
    assert [part["type"] for part in asked["content"]] == ["image", "image", "text"]


def test_plain_takes_one_question_about_one_picture_and_words_no_special_token() -> None:
    tokenizer = llama()
    for talk, pictures in ((TALK, 1), ([("user", "a"), ("assistant", "b")], 0)):
        with pytest.raises(Unusable) as error:
            Writer(tokenizer, "plain")(messages_of(talk, pictures))
        assert error.value.reason == "not_plain"
    with pytest.raises(Unusable) as error:
        Writer(tokenizer, "v1")(messages_of([("user", "is </s> html?"), ("assistant", "b")], 0))
    assert error.value.reason == "special_token"


def test_the_v1_chat_template_gives_the_tokens_that_were_trained_on() -> None:
    tokenizer = llama(V1_CHAT_TEMPLATE + "{# not known to the letter #}")
    for talk, pictures in ((TALK, 1), ([("user", "What is a cat?"), ("assistant", "Yes")], 0)):
        messages = messages_of(talk, pictures)
        chat, v1 = Writer(tokenizer)(messages), Writer(tokenizer, "v1")(messages)
        words = [
            [token for token in tokenizer.convert_ids_to_tokens(ids) if token != "▁"]
            for ids in (chat.ids, v1.ids)
        ]
        assert "".join(words[0]).replace("▁", "") == "".join(words[1]).replace("▁", "")
