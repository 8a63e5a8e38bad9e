"""What a model gets at chat is what its training gave it: the same tokens, and the same pixels."""

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_chat import llava  # noqa: F401 (a fixture)
from test_templates import BRACKETS, CHATML, ENDLESS, HEADERS, PARTS, TALK, llama
from transformers import CLIPImageProcessorPil, LlavaProcessor

from aimv2_mllm.chat.chat import load_model
from aimv2_mllm.chat.prompts import Prompter, num_tokens, pixels_of
from aimv2_mllm.data.talks.conversations import messages_of, said
from aimv2_mllm.data.talks.corpus import TalkCorpus
from aimv2_mllm.data.talks.templates import V1_CHAT_TEMPLATE, Asker, Writer
from aimv2_mllm.errors import UsageError
from aimv2_mllm.marks import UNSUPERVISED
from aimv2_mllm.model import llms, mllm
from aimv2_mllm.model.llava import AnyLlavaProcessor
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.recipe.data import ConversationData

FILES = {"kind": "llava", "file": "talks.json"}
PREPROCESSING = Preprocessing(28, shortest_edge=32)
PICTURE = Image.effect_noise((60, 36), 90).convert("RGB")
TINY = str(llms.load_tokenizer("tiny_llm").chat_template)
REDUCING = {"name": "pixel_shuffle", "factor": 2, "in_features": 16, "out_features": 16}


def processor_of(tokenizer: Any, connector: dict[str, Any] | None = None) -> Any:
    pictures = CLIPImageProcessorPil(**PREPROCESSING.settings())
    words = {"patch_size": 7, "chat_template": tokenizer.chat_template}
    if connector:
        return AnyLlavaProcessor(pictures, tokenizer, connector=connector, **words)
    return LlavaProcessor(pictures, tokenizer, vision_feature_select_strategy="full", **words)


def given(processor: Any, messages: Any, data: Mapping[str, Any] | None) -> list[int]:
    """The tokens before the answer."""
    count = num_tokens(processor, pixels_of(processor, [PICTURE], data))
    prompter = Prompter(processor, is_ours=data is not None)
    return prompter(messages, [count], limit=9999, max_new_tokens=9)[0]


def seen(processor: Any, data: Mapping[str, Any] | None, picture: Image.Image = PICTURE) -> Any:
    return torch.as_tensor(pixels_of(processor, [picture], data)["pixel_values"])


def data_of(*sources: dict[str, Any], **words: Any) -> ConversationData:
    return ConversationData.model_validate({"sources": list(sources), **words})


@pytest.mark.parametrize(("connector", "count"), [(None, 16), (REDUCING, 4)])
@pytest.mark.parametrize("template", [CHATML, HEADERS, BRACKETS, PARTS, TINY, V1_CHAT_TEMPLATE])
def test_a_prompt_is_what_training_puts_before_the_answer(
    template: str, connector: dict[str, Any] | None, count: int
) -> None:
    processor = processor_of(llama(template), connector)
    assert mllm.pictures_of(processor)[1] == count
    name = "v1" if template == V1_CHAT_TEMPLATE else "chat"
    writer = Writer(processor.tokenizer, name, num_image_tokens=count)
    for talk in (TALK, [("user", "<image> What is it? "), ("assistant", "it")]):
        messages = messages_of(talk, 1)
        for end in range(1, len(messages), 2):
            ids, labels = writer(messages[: end + 1])
            prompt = given(processor, messages[:end], {})
            assert prompt == ids[: len(prompt)].tolist()
            assert prompt.count(processor.image_token_id) == count
            # All of the last answer comes after it, and nothing else.
            unlearned = labels[len(prompt) :] == UNSUPERVISED
            assert unlearned.sum() <= 2  # a new line behind the end token
            assert labels[len(prompt)] != UNSUPERVISED
            assert Asker(processor.tokenizer)(messages[:end], count).tolist() == prompt


def test_a_model_that_is_not_ours_gets_the_start_token_of_its_processor() -> None:
    for template in (ENDLESS.replace("m.content +", "m.content|string +"), CHATML, HEADERS):
        processor = processor_of(llama(template))
        messages = messages_of(TALK, 1)[:1]
        start = [processor.tokenizer.bos_token_id]
        ours = given(processor, messages, {})
        theirs = given(processor, messages, None)
        assert theirs == (ours if ours[:1] == start else start + ours)


def test_a_template_that_drops_the_question_is_refused() -> None:
    with pytest.raises(UsageError, match="does not write what it is given"):
        Asker(llama("{% for m in messages %}{{ m.role }}{% endfor %}"))


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_a_picture_is_given_as_training_gave_it(aspect: str) -> None:
    data = data_of(FILES, {"kind": "handwriting"}, image_aspect=aspect)
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    corpus = object.__new__(TalkCorpus)  # its files are of no concern
    corpus._data, corpus._preprocessing, corpus._shapes = data, PREPROCESSING, None
    trained = PREPROCESSING.normalise(corpus.pixels(buffer.getvalue())[None])
    processor = processor_of(llama(CHATML))
    record = data.model_dump(mode="json")
    pixels = seen(processor, record)
    assert torch.allclose(pixels, trained, atol=1e-5)
    foreign = seen(processor, None)
    assert torch.allclose(foreign, PREPROCESSING.prepare([PICTURE]), atol=0.02)
    assert not torch.allclose(foreign, trained, atol=0.5)


def test_a_model_of_sheets_alone_sees_other_shapes_on_their_own_paper() -> None:
    record = data_of({"kind": "handwriting"}).model_dump(mode="json")
    picture = Image.new("RGB", (28, 14), (200, 30, 40))
    pixels = seen(processor_of(llama(CHATML)), record, picture)
    whole = np.full((1, 28, 28, 3), (200, 30, 40), dtype=np.uint8)
    assert torch.allclose(pixels, PREPROCESSING.normalise(whole), atol=1e-5)


@pytest.mark.parametrize("template", [V1_CHAT_TEMPLATE, CHATML])
def test_a_folder_says_how_its_model_was_trained(
    llava: Path,  # noqa: F811
    template: str,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "model"))
    data = data_of(FILES, image_aspect="crop").model_dump(mode="json")
    record = {"stage": "align", "kind": "align", "recipe": {"data": data}}
    (folder / "stage.json").write_text(json.dumps(record))
    (folder / "chat_template.jinja").unlink()
    processor = mllm.load_llava(folder)[1]
    processor.chat_template = processor.tokenizer.chat_template = template
    processor.save_pretrained(folder)
    bot = load_model(folder)
    assert bot.data == data
    assert bot.processor.tokenizer.chat_template == template  # to the letter: v1 is known by it
    (folder / "stage.json").unlink()
    assert load_model(folder).data is None


def with_system(processor: Any) -> str:
    prompter = Prompter(processor, is_ours=True)
    talk = [said("system", "Be brief."), *messages_of(TALK, 1)[:3]]
    ids, _ = prompter(talk, [16], limit=9999, max_new_tokens=9)
    return str(processor.tokenizer.decode(ids))


@pytest.mark.parametrize("template", [CHATML, HEADERS, PARTS, V1_CHAT_TEMPLATE])
def test_a_system_prompt_comes_first_where_the_template_has_a_place(template: str) -> None:
    text = with_system(processor_of(llama(template)))
    assert text.count("Be brief.") == 1
    assert text.index("Be brief.") < text.index("<image>")


DEAF = PARTS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.mark.parametrize("template", [TINY, BRACKETS, DEAF])
def test_a_template_without_a_place_for_a_system_prompt_is_said(template: str) -> None:
    with pytest.raises(UsageError, match="no place for a system prompt: leave it out"):
        with_system(processor_of(llama(template)))


def test_a_system_prompt_stays_when_turns_are_left_out() -> None:
    processor = processor_of(llama(CHATML))
    prompter = Prompter(processor, is_ours=True)
    talk = [said("system", "Be brief."), *messages_of(TALK, 1)[:5]]
    whole = prompter(talk, [16], limit=9999, max_new_tokens=9)[0]
    for limit in (len(whole) + 9, 70):
        ids, _ = prompter(talk, [16], limit=limit, max_new_tokens=9)
        assert (len(ids) < len(whole)) == (limit == 70)
        text = processor.tokenizer.decode(ids)
        assert text.count("Be brief.") == 1
        assert text.count("<image>") == 16


def test_a_system_prompt_must_come_first() -> None:
    prompter = Prompter(processor_of(llama(CHATML)), is_ours=True)
    talk = [said("user", "x"), said("system", "Be brief."), said("user", "x")]
    with pytest.raises(UsageError, match="must be the first message"):
        prompter(talk, [], limit=999, max_new_tokens=9)


def test_a_picture_for_which_a_template_has_no_place_is_refused() -> None:
    first_alone = PARTS.replace("p.type == 'image'", "p.type == 'image' and m.role == 'first'")
    first_alone = first_alone.replace("m.role == 'first'", "m == messages[0]")
    first_alone = first_alone.replace("{% else %}", "{% elif p.type == 'text' %}")
    prompter = Prompter(processor_of(llama(first_alone)), is_ours=True)
    shown = said("user", "What is it?", pictures=1)
    assert prompter([shown], [16], limit=999, max_new_tokens=9)[0]
    talk = [shown, said("assistant", "it"), said("user", "And this?", pictures=2)]
    with pytest.raises(UsageError, match="writes 1 of the 3 pictures: show them where"):
        prompter(talk, [16] * 3, limit=999, max_new_tokens=9)
