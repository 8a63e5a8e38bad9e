"""Questions about held-out sheets: what is asked, how it is answered in batches, what is right."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aimv2_mllm.data import held_out, scenes
from aimv2_mllm.data.batches import picture_batch
from aimv2_mllm.data.conversations import turn
from aimv2_mllm.data.held_out import Asked
from aimv2_mllm.data.templates import Writer
from aimv2_mllm.data.tokenizer import train_tokenizer
from aimv2_mllm.evaluation import answers
from aimv2_mllm.evaluation.answers import Speaker
from aimv2_mllm.model import mllm
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.towers import Tower

SEED = 3
SIDE, NUM_IMAGE_TOKENS = 28, 4
TEXTS = [
    "What is the red digit?",
    "Where is it?",
    "Is there an orange 4 at the bottom right of it?",
]


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    tokenizer = train_tokenizer((f" {text}" for text in TEXTS), 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = AIMv2Encoder(EncoderConfig(16, 32, 1, 2, image_size=SIDE))
    tower = Tower("aimv2", encoder, Preprocessing(SIDE))
    model = mllm.assemble(tower, LlamaForCausalLM(config), tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # at their drawn size every answer would be the same
    return Speaker(model, tokenizer, Preprocessing(SIDE), NUM_IMAGE_TOKENS)


def sheets(count: int) -> list[scenes.Scene]:
    return [held_out.held_out_sheet(SEED, index) for index in range(count)]


def test_every_kind_is_asked_equally_often() -> None:
    asked = held_out.held_out_questions(SEED, 3 * len(scenes.QUESTIONS) + 2)
    counts = Counter(question.kind for question in asked)
    assert set(counts) == set(scenes.QUESTIONS)
    assert sorted(counts.values()) == [3, 3, 3, 3, 3, 4, 4]
    assert Counter(question.sheet for question in asked) == {0: 7, 1: 7, 2: 7, 3: 2}


def test_questions_are_the_seeds_and_about_held_out_ink() -> None:
    asked = held_out.held_out_questions(SEED, 70)
    assert asked == held_out.held_out_questions(SEED, 70)
    assert asked != held_out.held_out_questions(SEED + 1, 70)
    heldout = set(scenes.split_scans("heldout").tolist())
    assert all(digit.scan in heldout for sheet in sheets(10) for digit in sheet.digits)


def test_a_prompt_is_what_training_puts_before_the_answer(speaker: Speaker) -> None:
    talk = turn(TEXTS[0], "7", image=True)
    encoded = Writer(speaker.tokenizer, num_image_tokens=NUM_IMAGE_TOKENS)(talk)
    first_answer_token = int((encoded.labels >= 0).argmax())
    prompt = answers._prompts(speaker, [TEXTS[0]], pictures=True)[0]
    assert prompt.tolist() == encoded.ids[:first_answer_token].tolist()


def test_batched_answers_are_those_given_one_by_one(speaker: Speaker) -> None:
    questions, about = TEXTS * 3, [0, 1, 2, 3, 4, 0, 2, 1, 3]
    seen = answers.look(speaker, sheets(5))
    together = answers.answer(speaker, questions, seen=seen, about=about)
    pairs = zip(questions, about, strict=True)
    alone = [answers.answer(speaker, [q], seen=seen, about=[row])[0] for q, row in pairs]
    assert together == alone
    assert len(set(together)) > 5  # so it depends on question and picture


def test_answers_are_those_of_the_models_own_way_with_pictures(speaker: Speaker) -> None:
    image_id = speaker.tokenizer.convert_tokens_to_ids("<image>")
    seen = answers.look(speaker, sheets(3))
    for index, text in enumerate(TEXTS):
        prompt = torch.tensor(answers._prompts(speaker, [text], pictures=True)[0])[None]
        assert int((prompt == image_id).sum()) == NUM_IMAGE_TOKENS
        written = speaker.model.generate(
            input_ids=prompt,
            pixel_values=picture_batch(sheets(3)[index : index + 1], speaker.preprocessing),
            max_new_tokens=answers.ANSWER_TOKENS,
            do_sample=False,
        )[:, prompt.shape[1] :]
        expected = speaker.tokenizer.batch_decode(written, skip_special_tokens=True)[0].strip()
        assert answers.answer(speaker, [text], seen=seen, about=[index]) == [expected]


def test_a_language_model_is_asked_without_a_picture(speaker: Speaker) -> None:
    blind = Speaker(speaker.model, speaker.tokenizer)
    together = answers.answer(blind, TEXTS)
    assert together == [answers.answer(blind, [text])[0] for text in TEXTS]


def test_a_sheet_in_words_names_each_digit_before_the_question() -> None:
    for asked in held_out.held_out_questions(SEED, 21):
        text = held_out.in_words(SEED, asked)
        sheet = held_out.held_out_sheet(SEED, asked.sheet)
        told = text.removeprefix("On the sheet: ").removesuffix(f". {asked.text}")
        assert text == f"On the sheet: {told}. {asked.text}"
        assert answers.is_exact_caption(told, sheet)


def test_an_answer_is_right_but_for_space_and_case() -> None:
    assert answers.is_right(" Bottom Left\n", "bottom left")
    assert not answers.is_right("bottom left.", "bottom left")
    assert not answers.is_right("17", "7")


def test_scores_of_a_hand_made_case() -> None:
    asked = [
        Asked(0, "count", "?", "2"),
        Asked(1, "count", "?", "2"),
        Asked(2, "count", "?", "3"),
        Asked(0, "exists", "?", "no"),
    ]
    given = ["2", "3", "3", "yes"]
    assert answers.accuracy(asked, given) == 0.5
    assert answers.by_kind(asked, given) == {"count": 2 / 3, "exists": 0.0}


SHEET = SimpleNamespace(
    digits=(
        scenes.Digit(7, "red", "top left", 0, 0, 0, 0.3),
        scenes.Digit(3, "orange", "bottom right", 0, 0.6, 0.6, 0.3),
    )
)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("a red 7 at the top left and an orange 3 at the bottom right", True),
        ("an orange 3 at the bottom right and a red 7 at the top left", True),
        ("a red 7 at the top left", False),
        ("a red 7 at the top left and an orange 8 at the bottom right", False),
        ("a red 7 at the bottom right and an orange 3 at the top left", False),
        ("a red 7 at the top left, a red 7 at the top left and an orange 3 at the bottom right", 0),
        ("a red 7 at the top left and an orange 3 at the bottom right and so on", False),
        ("", False),
    ],
)
def test_a_caption_is_exact_when_it_names_all_and_no_other(text: str, exact: bool) -> None:
    assert answers.is_exact_caption(text, SHEET) == exact


def test_wrong_words_of_a_caption_are_marked() -> None:
    text = "a red 7 at the top right, and a blue 3 at the bottom right <b>"
    wrong = [word for word, right in answers.marked_caption(text, SHEET) if not right]
    assert wrong == ["right,", "a", "blue", "<b>"]
    assert [word for word, _ in answers.marked_caption(text, SHEET)] == text.split()
    assert answers.missing_phrases(text, SHEET) == [
        "a red 7 at the top left",
        "an orange 3 at the bottom right",
    ]
    assert answers.marked_caption("", SHEET) == []
