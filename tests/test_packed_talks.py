"""Conversations in micro-batches by tokens: those of the step, each once, on whichever rank."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import sheet
from test_talks import IMAGE, batches_of, llava_row, save_table, written

from aimv2_mllm.data.pairs.batches import Share
from aimv2_mllm.data.rows import tables
from aimv2_mllm.data.talks.corpus import TalkCorpus

BLANK = 4  # tokens of a picture here
Said = Counter[tuple[int, ...]]


def rows(count: int) -> list[Any]:
    """Conversations of many lengths, every third without a picture."""
    found = []
    for number in range(count):
        words = f"row {number}" + " word" * (7 * number % 40)
        fields = {} if number % 3 == 0 else {"image": f"{number % 4}.jpg"}
        found.append(llava_row(words, "a", **fields))
    return found


def talks(batches: list[Any]) -> tuple[Said, Counter[str]]:
    """The conversations of micro-batches without blank pictures, and what was left out."""
    found, skipped = Said(), Counter[str]()
    for batch in batches:
        skipped.update(batch.get("skipped", {}))
        ids = batch["input_ids"][0].split(batch["lengths"].tolist())
        pictures = sum(int((one == IMAGE).sum()) for one in ids) // BLANK
        assert len(batch["pixel_values"]) == pictures
        for one in ids:
            # A picture comes with words behind it, a blank one is the end.
            is_blank = one[-1] == IMAGE
            found[tuple((one[:-BLANK] if is_blank else one).tolist())] += 1
    return found, skipped


def of_ranks(source: dict[str, Any], num_ranks: int, step: int, **words: Any) -> list[Any]:
    """The micro-batches of a step, rank after rank; as many of each."""
    shares = [
        batches_of(source, share=Share(rank, num_ranks), **words)(step) for rank in range(num_ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    return [batch for share in shares for batch in share]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("tokens", [30, 70, 10_000])
def test_a_step_has_the_same_conversations_however_it_is_packed(
    tmp_path: Path, num_ranks: int, tokens: int
) -> None:
    source = written(tmp_path, rows(29))
    for step in range(4):
        expected, _ = talks(batches_of(source, batch=12)(step))
        made = of_ranks(source, num_ranks, step, batch=12, tokens=tokens)
        assert talks(made)[0] == expected
        for batch in made:
            size = batch["input_ids"].shape[1]
            assert size <= tokens or len(batch["lengths"]) == 1
            lengths = batch["lengths"].tolist()
            assert lengths[:-1] == sorted(lengths[:-1])  # a blank picture stands after the last
        if tokens == 10_000:
            assert len(made) == num_ranks


def test_a_rank_reads_no_picture_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path, rows(29))
    read: list[bytes] = []
    pixels = TalkCorpus.pixels

    def counted(corpus: TalkCorpus, content: bytes) -> Any:
        read.append(content)
        return pixels(corpus, content)

    monkeypatch.setattr(TalkCorpus, "pixels", counted)
    of_ranks(source, 1, 0, batch=12, tokens=60)
    alone, read = read, []
    of_ranks(source, 3, 0, batch=12, tokens=60)
    assert 4 <= len(alone) == len(read) <= 12
    assert sorted(alone) == sorted(read)


def test_rows_with_bad_pictures_are_replaced_and_counted_once_on_any_ranks(
    tmp_path: Path,
) -> None:
    listed = rows(29)
    # Missing shows in the text's reading, cut off in the picture's: both are left out alike.
    listed[1]["image"], listed[4]["image"], listed[7]["image"] = "none.jpg", "cut.jpg", "text.jpg"
    source = written(tmp_path, listed)
    (tmp_path / "cut.jpg").write_bytes(sheet(5, 64)[0][:-300])
    (tmp_path / "text.jpg").write_text("a letter")
    left_out = Counter[str]()
    for step in range(5):
        expected = talks(batches_of(source, batch=12, micro=3)(step))
        left_out += expected[1]
        for num_ranks, tokens in ((1, 60), (2, 60), (1, 10_000), (3, 10_000)):
            made = of_ranks(source, num_ranks, step, batch=12, tokens=tokens)
            assert talks(made) == expected
            for batch in made:
                lengths = batch["lengths"].tolist()
                assert lengths[:-1] == sorted(lengths[:-1])
    assert set(left_out) == {"unreadable", "undecodable"}


def test_a_blank_picture_is_within_the_budget(tmp_path: Path) -> None:
    source = written(tmp_path, [llava_row("q", "a")] * 4)
    [[length]] = [batch["lengths"].tolist() for batch in batches_of(source, batch=1, tokens=1)(0)]
    two = 2 * (length - BLANK) + BLANK
    for tokens, expected in ((two, [2, 2]), (two - 1, [1, 1, 1, 1])):
        made = batches_of(source, batch=4, tokens=tokens)(0)
        assert [len(batch["lengths"]) for batch in made] == expected


def test_the_embedded_world_is_packed_too() -> None:
    source = {"kind": "handwriting", "turns": 3}
    expected = talks(batches_of(source, batch=8)(2))
    made = of_ranks(source, 2, 2, batch=8, tokens=120)
    assert talks(made) == expected
    pictures = [sorted(float(one.sum()) for batch in found for one in batch["pixel_values"])
                for found in (made, batches_of(source, batch=8)(2))]  # fmt: skip
    assert pictures[0] == pictures[1]


def test_pictures_in_a_table_are_left_there_until_they_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Image as Pictures
    from datasets import List, Value

    picture, nothing = {"bytes": sheet(0, 40)[0], "path": None}, {"bytes": b"", "path": None}
    (tmp_path / "there.jpg").write_bytes(sheet(0, 40)[0])
    paths = [str(tmp_path / name) for name in ("there.jpg", "gone.jpg")]
    text = Value("string")
    turns = List({"user": text, "assistant": text})
    read = []
    content = tables.picture_bytes
    monkeypatch.setattr(tables, "picture_bytes", lambda one: read.append(one) or content(one))
    for name, column, kind in (
        ("bytes", [[picture] * 2, [picture], [], [nothing]], List(Pictures())),
        ("paths", [[paths[0]] * 2, paths[:1], [], paths[1:]], List(text)),
    ):
        said = [{"user": "q", "assistant": "a"}]
        table = [{"images": one, "texts": said} for one in column]
        folder = save_table(tmp_path / name, table, {"images": kind, "texts": turns})
        batches = batches_of({"kind": "texts", "dataset": folder}, batch=4, tokens=99)
        read.clear()
        drafts = batches._drafts(range(4))
        assert sum(draft.has_pictures for draft in drafts) >= 2
        assert not read
        made = batches(0)
        assert set(talks(made)[1]) == {"unreadable"}
        assert sum(len(batch["pixel_values"]) for batch in made) >= 3


def test_a_language_stage_is_packed_without_blank_pictures() -> None:
    from aimv2_mllm.data.talks.batches import conversation_batches
    from aimv2_mllm.model.llms import load_tokenizer
    from aimv2_mllm.recipe.data import ConversationData
    from aimv2_mllm.recipe.train import TrainConfig

    def made(**how: int) -> list[Any]:
        return conversation_batches(
            ConversationData(),
            TrainConfig(steps=9, batch_size=16, lr=1.0, **how),
            seed=0,
            tokenizer=load_tokenizer("tiny_llm"),
            preprocessing=None,
        )(0)

    [whole], packed = made(), made(micro_batch_tokens=200)
    assert len(packed) > 1
    assert all(batch["input_ids"].shape[1] <= 200 for batch in packed)
    ids = torch.cat([batch["input_ids"] for batch in packed], 1)
    assert sorted(ids[0].tolist()) == sorted(whole["input_ids"][0].tolist())
