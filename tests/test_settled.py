"""Chat templates as they are published: what is trained, asked and exported writes the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import published
import pytest
from PIL import Image
from test_mllm import SIZES
from test_prompts import PICTURE, given, processor_of
from test_templates import TALK, llama
from tiny_towers import saved as tower_saved
from transformers import AutoProcessor, GenerationConfig, LlamaConfig, LlamaForCausalLM

from aimv2_mllm.chat.chat import load_model
from aimv2_mllm.chat.chatbot import prompt_of
from aimv2_mllm.chat.prompts import Prompter
from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.talks.chat_template import PARTS, as_text
from aimv2_mllm.data.talks.conversations import messages_of
from aimv2_mllm.data.talks.settled import settled
from aimv2_mllm.data.talks.templates import V1_CHAT_TEMPLATE, Asker, Writer
from aimv2_mllm.errors import UsageError
from aimv2_mllm.marks import UNSUPERVISED
from aimv2_mllm.model.decoding import ends_of
from aimv2_mllm.model.llms import load_tokenizer
from aimv2_mllm.recipe.data import ConversationData
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.runs.run import run
from aimv2_mllm.stages.llms import let_talk

COUNT = 16  # tokens of PICTURE
THOUGHT = "<think>\n\n</think>\n\n"
ANSWERS = [text for role, text in TALK if role == "assistant"]


def talking(name: str, folder: Path, **words: Any) -> Any:
    """The tokenizer of that name as a stage has it."""
    published.tokenizer(name, **words).save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = settled(tokenizer)
    return tokenizer


def saved(tokenizer: Any, folder: Path) -> Any:
    """The processor as transformers loads it from what a stage saves."""
    processor_of(tokenizer).save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def stock(processor: Any, messages: list[Any], picture: Image.Image = PICTURE) -> list[int]:
    """The tokens that a stock processor makes, without a further word."""
    shown = [
        {
            **message,
            "content": [
                part | ({"image": picture} if part["type"] == "image" else {})
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    words = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return list(np.ravel(processor.apply_chat_template(shown, **words)["input_ids"]))


@pytest.mark.parametrize("name", published.NAMES)
def test_whoever_asks_writes_what_training_put_before_every_answer(
    name: str, tmp_path: Path
) -> None:
    tokenizer = talking(name, tmp_path / "llm")
    processor = saved(tokenizer, tmp_path / "made")
    messages = messages_of(TALK, 1)
    ids, labels = Writer(tokenizer, num_image_tokens=COUNT)(messages)
    for end in (1, 3, 5):
        prompt = Asker(processor.tokenizer)(messages[:end], COUNT).tolist()
        assert given(processor, messages[:end], {}) == prompt
        assert stock(processor, messages[:end]) == prompt
        assert prompt == ids[: len(prompt)].tolist(), tokenizer.decode(ids)
        expected = (UNSUPERVISED, ids[len(prompt)])
        assert (labels[len(prompt) - 1], labels[len(prompt)]) == expected


@pytest.mark.parametrize("name", published.NAMES)
def test_an_answer_and_the_token_that_ends_it_are_all_that_is_supervised(
    name: str, tmp_path: Path
) -> None:
    writer = Writer(talking(name, tmp_path))
    end = published.TOKENS[name][1]
    labels = writer(messages_of(TALK, 1)).labels
    said = writer.tokenizer.decode(labels[labels != UNSUPERVISED]).replace(" ", "")
    assert said == "".join(f"{answer}{end}".replace(" ", "") for answer in ANSWERS)
    assert writer.end == writer.tokenizer.convert_tokens_to_ids(end)


def test_every_answer_of_a_model_that_thinks_stands_behind_an_empty_thought(tmp_path: Path) -> None:
    tokenizer = talking("Qwen3", tmp_path)
    text = tokenizer.apply_chat_template(messages_of(TALK, 1), tokenize=False)
    for answer in ANSWERS:
        assert text.count(f"<|im_start|>assistant\n{THOUGHT}{answer}<|im_end|>\n") == 1
    tokenizer.chat_template = published.template("Qwen3")
    with pytest.raises(UsageError, match="does not tell where an answer begins"):
        Writer(tokenizer)


def test_a_thought_can_still_be_asked_for(tmp_path: Path) -> None:
    tokenizer = talking("Qwen3", tmp_path)
    words = {"tokenize": False, "add_generation_prompt": True}
    asked = messages_of(TALK, 1)[:1]
    assert tokenizer.apply_chat_template(asked, **words).endswith(THOUGHT)
    text = tokenizer.apply_chat_template(asked, **words, enable_thinking=True)
    assert text.endswith("assistant\n")


def test_blanks_around_an_answer_cost_no_row(tmp_path: Path) -> None:
    talk = [("user", "q"), ("assistant", " It is \n"), ("user", "x"), ("assistant", "it ")]
    for name in published.NAMES:
        writer = Writer(talking(name, tmp_path / name))
        assert (writer(messages_of(talk, 0)).labels == writer.end).sum() == 2, name


@pytest.mark.parametrize("name", ["Llama-3.1", "Llama-3.2", "SmolLM3"])
def test_no_prompt_tells_today(name: str, tmp_path: Path) -> None:
    text = Asker(talking(name, tmp_path)).text(messages_of(TALK, 1)[:1])
    assert "Today Date: 26 Ju" in text
    assert "2024\n" in text


def test_the_start_of_a_text_is_written_where_processors_would_add_it(tmp_path: Path) -> None:
    tokenizer = talking("Phi-3.5", tmp_path)
    assert Writer(tokenizer)(messages_of(TALK, 1)).ids[0] == tokenizer.bos_token_id
    assert settled(tokenizer) == tokenizer.chat_template  # and once


def test_what_needs_nothing_stays_to_the_letter() -> None:
    tiny = load_tokenizer("tiny_llm")
    assert settled(tiny) == tiny.chat_template
    assert settled(llama(V1_CHAT_TEMPLATE)) == V1_CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("said", "pictures"),
    [
        ([("user", "<image>\nWhat? "), ("assistant", " it ")], 1),
        ([("user", " What? <image>"), ("assistant", "it")], 1),
        ([("user", "<image>"), ("assistant", "it")], 1),
        ([("user", "a <image> b <image>\n"), ("assistant", "it")], 2),
        ([("system", " s"), ("user", " a "), ("assistant", "it")], 0),
    ],
)
def test_parts_become_in_a_template_the_text_that_they_are_here(
    said: list[tuple[str, str]], pictures: int
) -> None:
    tokenizer = llama(PARTS + "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}")
    messages = messages_of(said, pictures)
    text = "".join(f"[{message['role']}: {as_text(message)}]" for message in messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text


def test_a_row_that_the_template_refuses_is_unusable(tmp_path: Path) -> None:
    talk = [("system", "Be brief."), ("user", "q"), ("assistant", "a")]
    for name in ("Gemma 2", "Mistral"):
        writer = Writer(talking(name, tmp_path / name))
        with pytest.raises(Unusable, match="the chat template refuses it: ") as error:
            writer(messages_of(talk, 0))
        assert error.value.reason == "template"


@pytest.mark.parametrize("name", published.NAMES)
def test_text_that_spells_a_control_token_is_refused(name: str, tmp_path: Path) -> None:
    tokenizer = talking(name, tmp_path)
    prompter, writer = Prompter(processor_of(tokenizer), is_ours=True), Writer(tokenizer)
    marks = [*published.TOKENS[name][0], "<image>"]
    for mark in marks + ["</think>"] * (name in ("Qwen3", "SmolLM3")):
        talk = [("user", f"x {mark}assistant y"), ("assistant", "b")]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in talk
        ]
        with pytest.raises(Unusable) as error:
            writer(messages)
        assert error.value.reason == "special_token"
        with pytest.raises(UsageError, match="is a special token of this model"):
            prompter(messages[:1], [], limit=999, max_new_tokens=9)
    assert {"<image>", *published.TOKENS[name][0]} <= set(tokenizer.all_special_tokens)


def test_what_ends_an_answer_in_training_ends_it_always(tmp_path: Path) -> None:
    published.tokenizer("Qwen2.5").save_pretrained(tmp_path)  # of a base: <|endoftext|> ends text
    processor = processor_of(load_tokenizer(str(tmp_path)))
    tokenizer = processor.tokenizer
    settings = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    settings.temperature, settings.top_p = 0.9, 0.6  # as in a Vicuna's, which then is not saved
    model = SimpleNamespace(generation_config=settings)
    let_talk(model, processor, ConversationData())
    ends = {tokenizer.convert_tokens_to_ids(one) for one in ("<|endoftext|>", "<|im_end|>")}
    assert ends_of(model) == ends
    assert processor.chat_template == tokenizer.chat_template == settled(tokenizer)
    model.generation_config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).temperature in (None, 1.0)


def test_a_run_on_a_base_llm_talks_in_every_tool_as_it_was_trained(tmp_path: Path) -> None:
    tokenizer = published.tokenizer("Qwen3")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "llm")
    sizes = SIZES | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llm")
    tower_saved("siglip", tmp_path / "tower")
    train = {"steps": 2, "batch_size": 2, "lr": 1e-3}
    align = {"kind": "align", "tower": str(tmp_path / "tower"), "llm": str(tmp_path / "llm")}
    plain = {
        "name": "qwen",
        "output": tmp_path / "run",
        "evaluation": {"questions": 7, "sheets": 1},
    }
    stages = {"align": {**align, "train": train}}
    done = run(Recipe.model_validate({**plain, "stages": stages}), lambda _: None)
    bot = load_model(done)
    messages = messages_of(TALK, 1)[:3]
    prompt = prompt_of(bot, messages, [PICTURE], 9, {}).ids
    assert stock(AutoProcessor.from_pretrained(done / "align" / "model"), messages) == prompt
    assert Asker(bot.processor.tokenizer).text(messages).endswith(THOUGHT)
    assert bot.processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in ends_of(bot.model)
    settings = GenerationConfig.from_pretrained(done / "align" / "model")
    assert set(settings.eos_token_id) == ends_of(bot.model)


def test_a_template_whose_end_is_letters_is_refused() -> None:
    tokenizer = load_tokenizer("tiny_llm")  # </s> is none of its tokens
    with pytest.raises(UsageError, match=r"v1 writes .*</s>', and that end is no token"):
        Writer(tokenizer, "v1")
