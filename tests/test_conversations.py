"""Conversations as token batches: what is asked, what is supervised, how pictures stand in the
text."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RECIPES

from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.pairs.batches import Share, caption_batches, encode_captions, micro_batches
from aimv2_mllm.data.talks.batches import conversation_batches, pack
from aimv2_mllm.data.talks.conversations import conversation, turn
from aimv2_mllm.data.talks.templates import Encoded, Writer
from aimv2_mllm.errors import UsageError
from aimv2_mllm.marks import UNSUPERVISED
from aimv2_mllm.model.llms import load_tokenizer
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.recipe.data import CaptionData, ConversationData, HandwritingTalks
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.recipe.train import TrainConfig


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tiny_llm")


def tokenize(tokenizer: Any, talks: list[Any], num_image_tokens: int = 0) -> Any:
    writer = Writer(tokenizer, num_image_tokens=num_image_tokens)
    return pack([writer(talk) for talk in talks])


def each(batch: Any, key: str) -> list[torch.Tensor]:
    """What of each conversation of a batch lies under `key`."""
    return list(batch[key][0].split(batch["lengths"].tolist()))


def padded(batch: Any, pad_token_id: int) -> dict[str, np.ndarray]:
    """The batch as rows padded on the right."""
    rows = {"input_ids": pad_token_id, "attention_mask": 0, "labels": UNSUPERVISED}
    parts = {key: each(batch, key) for key in ("input_ids", "labels")}
    parts["attention_mask"] = [torch.ones_like(one) for one in parts["labels"]]
    return {
        key: torch.nn.utils.rnn.pad_sequence(
            parts[key], batch_first=True, padding_value=filling
        ).numpy()
        for key, filling in rows.items()
    }


def talk(index: int, **options: Any) -> list[dict[str, Any]]:
    options = {"tasks": {"describe": 1.0, "question": 1.0}, "turns": 3, "seen": True} | options
    return conversation(scenes.scene(0, "train", index), scenes.generator(index), **options)


def test_only_what_the_assistant_says_is_supervised_with_its_end_token(tokenizer: Any) -> None:
    messages = turn("Which digit is red?", "7", image=True) + turn("Where is the 7?", "top left")
    batch = tokenize(tokenizer, [messages], num_image_tokens=4)
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != UNSUPERVISED]) == " 7<|end|> top left<|end|>"
    supervised = labels != UNSUPERVISED
    assert torch.equal(labels[supervised], batch["input_ids"][0][supervised])


def test_an_image_mark_becomes_as_many_tokens_as_the_tower_gives(tokenizer: Any) -> None:
    image = tokenizer.convert_tokens_to_ids("<image>")
    for count in (1, 16):
        batch = tokenize(tokenizer, [turn("Where?", "here", image=True)], num_image_tokens=count)
        assert int((batch["input_ids"] == image).sum()) == count
        assert batch["input_ids"][0, 2 : 2 + count].tolist() == [image] * count


def test_conversations_lie_one_after_the_other_and_each_begins_anew(tokenizer: Any) -> None:
    short, long = turn("Where?", "here"), turn("Where is the red 7?", "top left")
    batch = tokenize(tokenizer, [short, long])
    alone = [tokenize(tokenizer, [talk]) for talk in (short, long)]
    for key in batch:
        axis = 0 if key == "lengths" else 1
        assert torch.equal(batch[key], torch.cat([one[key] for one in alone], axis)), key
    first, second = batch["lengths"].tolist()
    assert batch["position_ids"][0].tolist() == [*range(first), *range(second)]
    assert next(iter(batch)) == "lengths"  # by which the loop counts samples


def test_the_first_token_of_a_conversation_is_never_learned() -> None:
    ids = np.array([5, 6, 7])
    batch = pack([Encoded(ids, ids), Encoded(ids, ids)])
    assert batch["labels"].tolist() == [[UNSUPERVISED, 6, 7, UNSUPERVISED, 6, 7]]


def test_the_first_question_alone_carries_the_picture_or_the_words() -> None:
    for index in range(20):
        seen, told = talk(index), talk(index, seen=False)
        kinds = [part["type"] for message in seen for part in message["content"]]
        assert kinds == ["image", "text", *["text"] * 5]
        texts = [message["content"][-1]["text"] for message in told]
        assert texts[0].startswith("On the sheet: a")
        assert not any("On the sheet" in text for text in texts[1:])


def test_the_digits_are_told_in_any_order_and_described_in_reading_order() -> None:
    told = set()
    for index in range(20):
        asked, said = talk(index, seen=False, tasks={"describe": 1.0}, turns=1)
        caption = scenes.caption(scenes.scene(0, "train", index))
        assert said["content"][0]["text"] == caption
        told.add(asked["content"][0]["text"].startswith(f"On the sheet: {caption}. "))
    assert told == {True, False}


def test_a_sheet_is_read_backwards_from_the_words_in_which_it_was_told() -> None:
    for index in range(20):
        asked, said = talk(index, seen=False, tasks={"backwards": 1.0}, turns=1)
        words = " ".join(said["content"][0]["text"].split()[::-1]).replace(" ,", ",")
        assert asked["content"][0]["text"].startswith(f"On the sheet: {words}. Read it")
    said = talk(3, tasks={"backwards": 1.0}, turns=1)[1]["content"][0]["text"]
    caption = scenes.caption(scenes.scene(0, "train", 3))
    assert " ".join(said.split()[::-1]).replace(" ,", ",") == caption


def test_a_seen_sheet_is_described_by_its_caption() -> None:
    said = talk(3, tasks={"describe": 1.0}, turns=1)[1]["content"][0]["text"]
    assert said == scenes.caption(scenes.scene(0, "train", 3))


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in (" où est le 7 ? 数字 🙂", " <b>\t\n", ' "x" & y'):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_caption_is_cut_at_the_limit_and_its_length_is_told(tokenizer: Any) -> None:
    captions = ["a red 7", "a red 7 at the top left"]
    ids, length = encode_captions(captions, tokenizer, 64)
    assert length.tolist() == [3, 7]
    assert ids.shape == (2, 7)
    cut, shorter = encode_captions(captions, tokenizer, 5)
    assert shorter.tolist() == [3, 5]
    assert torch.equal(cut, ids[:, :5])


def test_a_tokenizer_that_adds_an_end_by_itself_adds_none_to_captions(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "red": 2, "7": 3}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="</s>", unk_token="</s>"
    ).save_pretrained(tmp_path)
    plain = load_tokenizer(str(tmp_path), talks=False)
    assert plain("a red 7").input_ids == [1, 2, 3, 0]  # as SigLIP's does
    ids, length = encode_captions(["a red 7"], plain, 64)
    assert (ids.tolist(), length.tolist()) == ([[1, 2, 3]], [3])
    assert len(plain) == 4  # and no image token was added
    with pytest.raises(UsageError, match="no chat template"):
        load_tokenizer(str(tmp_path))


def test_micro_batches_cover_the_batch_in_order_whatever_their_size() -> None:
    for size, parts in ((None, 1), (10, 1), (4, 3), (1, 10)):
        config = TrainConfig(steps=3, batch_size=10, micro_batch_size=size, lr=1.0)
        got = micro_batches(config, list, list)(2)
        assert len(got) == parts
        assert [index for part in got for index in part] == list(range(20, 30))


def test_the_shares_of_ranks_make_the_batch_in_order() -> None:
    config = TrainConfig(steps=3, batch_size=12, micro_batch_size=4, lr=1.0)
    whole = [index for batch in micro_batches(config, list, list)(2) for index in batch]
    for size in (2, 3, 4):
        shares = [micro_batches(config, list, list, share=Share(r, size))(2) for r in range(size)]
        assert [index for share in shares for batch in share for index in batch] == whole
        assert all(len(batch) <= 4 for share in shares for batch in share)
        assert len({len(share) for share in shares}) == 1


def test_samples_of_like_length_share_a_micro_batch() -> None:
    config = TrainConfig(steps=3, batch_size=5, micro_batch_size=2, lr=1.0)
    got = micro_batches(config, list, list, length=lambda index: -index)(2)
    assert got == [[14, 13], [12, 11], [10]]


def test_each_sheet_keeps_its_words_whatever_the_micro_batches(tokenizer: Any) -> None:
    pairs = []
    for size in (None, 2):
        parts = conversation_batches(
            ConversationData(sources=[HandwritingTalks(turns=3)]),
            TrainConfig(steps=2, batch_size=6, micro_batch_size=size, lr=1.0),
            seed=1,
            tokenizer=tokenizer,
            preprocessing=Preprocessing(56),
            num_image_tokens=16,
        )(1)
        rows = [
            row for p in parts for row in zip(p["pixel_values"], each(p, "labels"), strict=True)
        ]
        words = [tokenizer.decode(labels[labels >= 0]) for _, labels in rows]
        pairs.append({(float(row[0].sum()), text) for row, text in zip(rows, words, strict=True)})
    assert pairs[0] == pairs[1]
    assert len(pairs[0]) == 6


def train_config() -> TrainConfig:
    return TrainConfig(steps=2, batch_size=6, micro_batch_size=4, lr=1.0)


def test_batches_are_pure_functions_of_the_step(tokenizer: Any) -> None:
    options: dict[str, Any] = {
        "seed": 1,
        "tokenizer": tokenizer,
        "preprocessing": Preprocessing(56),
    }
    captions = caption_batches(CaptionData(), train_config(), max_text_tokens=64, **options)
    talks = conversation_batches(ConversationData(), train_config(), num_image_tokens=16, **options)
    for batches in (captions, talks):
        first, again, other = batches(5), batches(5), batches(6)
        assert [len(part["pixel_values"]) for part in first] == [4, 2]
        for one, same, different in zip(first, again, other, strict=True):
            assert all(torch.equal(one[key], same[key]) for key in one)
            assert not torch.equal(one["pixel_values"], different["pixel_values"])


def test_prefix_lengths_are_uniform_over_one_to_all_but_one(tokenizer: Any) -> None:
    config = TrainConfig(steps=1, batch_size=600, lr=1.0)
    batches = caption_batches(
        CaptionData(),
        config,
        seed=0,
        tokenizer=tokenizer,
        preprocessing=Preprocessing(28),
        max_text_tokens=64,
    )
    lengths = batches(0)[0]["prefix_length"].numpy()
    values, counts = np.unique(lengths, return_counts=True)
    assert values.tolist() == [1, 2, 3]
    assert counts.min() > 150


def test_the_quickstarts_samples_are_those_that_its_figures_are_from(tokenizer: Any) -> None:
    """Digests of the first and eighth step's batches from before conversations had sources, when
    they were padded."""
    found = {}
    for name, key in (("quickstart", "align"), ("quickstart", "tune"), ("tiny_llm", "llm")):
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        stage: Any = recipe.stages[key]
        seen = name == "quickstart"
        batches = conversation_batches(
            stage.data,
            stage.train,
            seed=recipe.seed,
            tokenizer=tokenizer,
            preprocessing=Preprocessing(56) if seen else None,
            num_image_tokens=16,
        )
        digest = hashlib.sha256()
        for batch in (*batches(0), *batches(7)):
            assert "skipped" not in batch
            rows = padded(batch, tokenizer.pad_token_id)
            if seen:
                rows["pixel_values"] = batch["pixel_values"].numpy()
            for field, values in rows.items():
                digest.update(field.encode() + values.tobytes())
        found[key] = digest.hexdigest()[:32]
    assert found == {
        "align": "389ecf55d4e3fa9d394e673c02a7599d",
        "tune": "62c364388072bfa893b0966e5f914701",
        "llm": "27ddbe2f69eb0276ce83b824f03457d2",
    }
