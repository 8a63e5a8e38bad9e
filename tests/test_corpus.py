"""Samples by number: the same for any ranks, workers and micro-batches; unusable rows replaced."""

import pickle
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import jpeg, sheet, write_shard, write_tar
from PIL import Image
from torch import Tensor

from aimv2_mllm.data.drawing import MOST_TRIES, Skipped
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.pairs.batches import (
    EVERYTHING,
    CaptionBatch,
    CaptionBatches,
    Share,
    caption_batches,
    world_seed,
)
from aimv2_mllm.data.pairs.corpus import CHARACTERS_PER_TOKEN, Corpus
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.model.llms import load_tokenizer
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.recipe.data import CaptionData
from aimv2_mllm.recipe.train import TrainConfig

SIZE = 28
TOKENIZER = load_tokenizer("tiny_llm")


def data_of(*sources: dict[str, Any], **settings: Any) -> CaptionData:
    return CaptionData.model_validate({"sources": list(sources), **settings})


def shards_of(path: Path, **settings: Any) -> dict[str, Any]:
    return {"kind": "shards", "urls": str(path), **settings}


def batches_of(
    data: CaptionData, *, batch_size: int = 6, micro: int | None = None, share: Share = EVERYTHING
) -> CaptionBatches:
    train = TrainConfig(steps=100, batch_size=batch_size, micro_batch_size=micro, lr=1.0)
    return caption_batches(
        data,
        train,
        seed=3,
        tokenizer=TOKENIZER,
        preprocessing=Preprocessing(SIZE),
        max_text_tokens=40,
        share=share,
    )


def corpus_of(data: CaptionData, seed: int = 3) -> Corpus:
    return Corpus(data, seed, image_size=SIZE, max_text_tokens=40)


def samples(batches: Sequence[CaptionBatch]) -> list[tuple[Tensor, int, list[int]]]:
    """Pixels, prefix and caption of every sample; the padding of captions goes by micro-batch."""
    return [
        (pixels, int(prefix), ids[:length].tolist())
        for batch in batches
        for pixels, prefix, ids, length in zip(
            batch["pixel_values"],
            batch["prefix_length"],
            batch["caption_ids"],
            batch["caption_length"],
            strict=True,
        )
    ]


def assert_same(ours: Sequence[CaptionBatch], theirs: Sequence[CaptionBatch]) -> None:
    pairs = list(zip(samples(ours), samples(theirs), strict=True))
    assert pairs
    for (a, *more), (b, *others) in pairs:
        assert torch.equal(a, b)
        assert more == others


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 7 sheets each."""
    path = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        write_shard(path / f"a-{number}.tar", range(number * 7, number * 7 + 7), size=40)
    return path


def test_the_embedded_world_alone_is_as_it_always_was() -> None:
    data = CaptionData(seed=1)
    assert data.sources[0].kind == "handwriting"
    world = world_seed(3, data)
    [batch] = batches_of(data)(2)
    for place, index in enumerate(range(12, 18)):
        scene = scenes.scene(world, "train", index)
        pixels = Preprocessing(SIZE).normalise(scenes.render(scene, SIZE)[None])[0]
        assert torch.equal(batch["pixel_values"][place], pixels)
        prefix = scenes.generator(world, "prefix", index).integers(1, 4)
        assert batch["prefix_length"][place] == prefix
        ids = TOKENIZER([f" {scenes.caption(scene)}"]).input_ids[0][:40]
        assert samples([batch])[place][2] == ids
    assert "skipped" not in batch


@pytest.mark.parametrize("micro", [1, 2, 4, 5])
def test_micro_batches_share_out_the_same_samples(folder: Path, micro: int) -> None:
    data = data_of(shards_of(folder / "*.tar"))
    whole, parts = batches_of(data)(1), batches_of(data, micro=micro)(1)
    assert [len(batch["prefix_length"]) for batch in whole] == [6]
    assert max(len(batch["prefix_length"]) for batch in parts) == micro
    assert_same(parts, whole)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_shares_of_the_ranks_add_up_to_the_batch(folder: Path, world_size: int) -> None:
    data = data_of(shards_of(folder / "*.tar"), {"kind": "handwriting"})
    whole = batches_of(data)(4)
    shares = [
        batch
        for rank in range(world_size)
        for batch in batches_of(data, micro=2, share=Share(rank, world_size))(4)
    ]
    assert_same(shares, whole)


def test_every_row_comes_once_an_epoch_whatever_the_batch_size(folder: Path) -> None:
    data = data_of(shards_of(folder / "*.tar"), augment=False)
    order = []
    for batch_size in (6, 7):
        batches = batches_of(data, batch_size=batch_size)
        seen = [sample[2] for step in range(7) for sample in samples(batches(step))][:42]
        order.append(seen)
        for epoch in (seen[:21], seen[21:]):
            assert len({tuple(ids) for ids in epoch}) == 21
    assert order[0] == order[1]
    assert order[0][:21] != order[0][21:]


def test_an_epoch_augments_anew(folder: Path) -> None:
    corpus = corpus_of(data_of(shards_of(folder / "*.tar")))
    first = {s.caption: s.pixels for s in (corpus.sample(i, Skipped()) for i in range(21))}
    second = {s.caption: s.pixels for s in (corpus.sample(i, Skipped()) for i in range(21, 42))}
    assert first.keys() == second.keys()
    assert not [c for c in first if np.array_equal(first[c], second[c])]


def test_the_share_that_is_mirrored_is_the_recipes(tmp_path: Path) -> None:
    pixels = np.empty((40, 40, 3), dtype=np.uint8)
    pixels[:] = np.linspace(255, 0, 40)[:, None]  # white at the left, black at the right
    content = jpeg(Image.fromarray(pixels))
    write_tar(tmp_path / "a.tar", {"a.jpg": content, "a.txt": b"a"})
    for flip, low, high in ((0.0, 0, 0), (1.0, 60, 60), (0.5, 18, 42)):
        corpus = corpus_of(data_of(shards_of(tmp_path / "a.tar"), flip=flip))
        shown = [corpus.sample(i, Skipped()).pixels.astype(int) for i in range(60)]
        mirrored = sum(int(p[:, -1].mean() > p[:, 0].mean()) for p in shown)
        assert low <= mirrored <= high


def test_another_seed_is_another_order_and_other_crops(folder: Path) -> None:
    data = data_of(shards_of(folder / "*.tar"))
    one, other = ([corpus_of(data, s).sample(i, Skipped()) for i in range(21)] for s in (1, 2))
    assert [s.caption for s in one] != [s.caption for s in other]
    assert sorted(s.caption for s in one) == sorted(s.caption for s in other)


def test_the_weights_decide_how_often_a_source_has_its_turn(folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", {"b.jpg": sheet(0)[0], "b.txt": b"from b"})
    data = data_of(shards_of(folder / "a-0.tar", weight=3), shards_of(tmp_path / "b.tar", weight=1))
    corpus = corpus_of(data)
    share = np.mean([corpus.sample(i, Skipped()).caption == "from b" for i in range(400)])
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_the_corpus_survives_the_way_to_a_worker(folder: Path) -> None:
    batches = batches_of(data_of(shards_of(folder / "*.tar"), {"kind": "handwriting"}))
    assert_same(pickle.loads(pickle.dumps(batches))(3), batches(3))


BAD = {
    "bad0.jpg": b"this is a letter",
    "bad0.txt": b"a letter",
    "bad1.jpg": b"",
    "bad1.txt": b"nothing",
    "bad2.jpg": sheet(0)[0],
    "bad3.jpg": sheet(0)[0],
    "bad3.txt": b" \n ",
}


def test_unusable_rows_are_replaced_by_the_next_in_order_and_counted(tmp_path: Path) -> None:
    good = {}
    for index in range(12):
        good |= {f"{index}.jpg": sheet(index)[0], f"{index}.txt": f"row {index}".encode()}
    data = data_of(shards_of(write_tar(tmp_path / "a.tar", {**good, **BAD})), augment=False)
    corpus = corpus_of(data)
    skipped = Skipped()
    epoch = [corpus.sample(i, skipped).caption for i in range(16)]
    assert set(epoch) == {f"row {index}" for index in range(12)}
    # Each is tried at its own turn, and again for those just before it that cannot be used either.
    assert skipped.counts.keys() == {"undecodable", "empty", "no_caption"}
    assert sum(skipped.counts.values()) >= 4
    order = corpus._drawing._orders[0]
    assert order is not None
    for place in range(16):
        row = next(r for r in map(order.row, range(place, place + 9)) if r < 12)
        assert epoch[place] == f"row {row}"
    assert all("a.tar, row 1" in example for example in skipped.examples)
    again = Skipped()
    assert [corpus.sample(i, again).caption for i in reversed(range(16))] == epoch[::-1]
    assert again.counts == skipped.counts


def test_a_batch_says_what_was_left_out_for_it(tmp_path: Path) -> None:
    members = {"0.jpg": sheet(0)[0], "0.txt": b"row", "1.jpg": b"letter", "1.txt": b"row"}
    batches = batches_of(data_of(shards_of(write_tar(tmp_path / "a.tar", members))), micro=3)
    said = [batch for step in range(4) for batch in batches(step)]
    assert Counter(said[0]["skipped"]).keys() == {"undecodable"}
    assert "a.tar, row 1: is not a picture" in said[0]["skipped_rows"][0]
    # Half of the rows; one is tried twice where two epochs meet in two unusable ones.
    assert sum(batch.get("skipped", {}).get("undecodable", 0) for batch in said) >= 12


def test_ten_unusable_rows_after_each_other_end_the_run(tmp_path: Path) -> None:
    members = {f"{i}.jpg": b"letter" for i in range(12)} | {f"{i}.txt": b"x" for i in range(12)}
    corpus = corpus_of(data_of(shards_of(write_tar(tmp_path / "a.tar", members))))
    skipped = Skipped()
    with pytest.raises(RunFailed, match=r"data\.sources\.0: 10 rows .*\n.*a\.tar, row \d+: is not"):
        corpus.sample(0, skipped)
    assert skipped.counts == {"undecodable": MOST_TRIES}


def test_a_source_without_rows_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.txt": b"no picture"})
    with pytest.raises(UsageError, match=r"data\.sources\.0: has no rows; .*without a picture"):
        corpus_of(data_of(shards_of(path)))


def one_caption(tmp_path: Path, caption: str, **settings: Any) -> Iterator[Any]:
    members = {"a.jpg": sheet(0)[0], "a.txt": caption.encode()}
    data = data_of(shards_of(write_tar(tmp_path / "a.tar", members)), **settings)
    yield corpus_of(data).sample(0, Skipped()).caption
    yield samples(batches_of(data, batch_size=1)(0))[0][2]


def test_captions_are_cleaned_as_the_recipe_says(tmp_path: Path) -> None:
    said = "  A RED\n7\t at  the Top "
    assert next(one_caption(tmp_path, said)) == "A RED 7 at the Top"
    assert next(one_caption(tmp_path, said, clean="lower")) == "a red 7 at the top"


def test_a_caption_of_10_000_tokens_is_cut_before_it_costs_anything(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(10_000))
    begun = time.perf_counter()
    text, ids = one_caption(tmp_path, words)
    assert time.perf_counter() - begun < 1
    assert len(text) <= 40 * CHARACTERS_PER_TOKEN
    assert ids == TOKENIZER([f" {words[:2000]}"]).input_ids[0][:40]


def test_a_caption_that_spells_a_special_token_is_just_text(tmp_path: Path) -> None:
    _, ids = one_caption(tmp_path, "a <|end|> and an <image>")
    assert not set(ids) & set(TOKENIZER.all_special_ids)
    assert TOKENIZER.decode(ids) == " a <|end|> and an <image>"
