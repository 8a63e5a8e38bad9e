"""Conversations from every kind of source: what is read, what is left out and why, in which
order."""

import csv
import errno
import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import jpeg, sheet, write_shard
from PIL import Image

from aimv2_mllm.data.drawing import Skipped
from aimv2_mllm.data.pairs.batches import EVERYTHING, Share
from aimv2_mllm.data.pictures.decode import decode, decode_padded, middle_square
from aimv2_mllm.data.talks.batches import TalkBatches, conversation_batches
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.model.llms import load_tokenizer
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.recipe.data import ConversationData
from aimv2_mllm.recipe.train import TrainConfig

PREPROCESSING = Preprocessing(28)
TOKENIZER = load_tokenizer("tiny_llm")
IMAGE = TOKENIZER.convert_tokens_to_ids("<image>")


def batches_of(
    *sources: dict[str, Any],
    batch: int = 8,
    micro: int | None = None,
    tokens: int | None = None,
    share: Share = EVERYTHING,
    **data: Any,
) -> TalkBatches:
    train = TrainConfig(
        steps=99, batch_size=batch, micro_batch_size=micro, micro_batch_tokens=tokens, lr=1.0
    )
    return conversation_batches(
        ConversationData.model_validate({"sources": list(sources), **data}),
        train,
        seed=0,
        share=share,
        tokenizer=TOKENIZER,
        preprocessing=PREPROCESSING,
        num_image_tokens=4,
    )


def said(batches: TalkBatches, count: int) -> tuple[list[str], Skipped]:
    """What is said in the first `count` samples, and what was left out for them."""
    skipped = Skipped()
    samples = [batches.corpus.sample(n, batches.writer, skipped) for n in range(count)]
    return [TOKENIZER.decode(sample.encoded.ids) for sample in samples], skipped


def llava_row(*turns: str, **fields: Any) -> dict[str, Any]:
    speakers = ("human", "gpt") * len(turns)
    talk = [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=False)]
    return {"id": 1, "conversations": talk, **fields}


def written(folder: Path, rows: Sequence[Any]) -> dict[str, Any]:
    """A source of those rows, with pictures 0.jpg to 3.jpg beside them."""
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(sheet(number, 40)[0])
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return {"kind": "llava", "file": str(folder / "rows.jsonl")}


def test_llavas_rows_are_read_in_all_their_shapes(tmp_path: Path) -> None:
    rows = [
        llava_row("<image>\nq0", "a0", image="0.jpg", id="x", model="m"),
        llava_row("q1\n<image>", "a1", image=["1.jpg"]),
        llava_row("q2", "a2", image="2.jpg"),
        llava_row("q3", "a3"),
        llava_row("q4", "a4", image=None),
        llava_row("<image> or <image>?", "a5", "and <image>", "b5", image=["0.jpg"] * 3),
    ]
    texts, skipped = said(batches_of(written(tmp_path, rows)), len(rows))
    picture = "<image>" * 4
    assert sorted(texts, key=lambda text: text[-9:]) == [
        f"<s><|user|>{picture} q0<|end|><|assistant|> a0<|end|>",
        f"<s><|user|> q1{picture}<|end|><|assistant|> a1<|end|>",
        f"<s><|user|>{picture} q2<|end|><|assistant|> a2<|end|>",
        "<s><|user|> q3<|end|><|assistant|> a3<|end|>",
        "<s><|user|> q4<|end|><|assistant|> a4<|end|>",
        f"<s><|user|>{picture} or{picture} ?<|end|><|assistant|> a5<|end|>"
        f"<|user|> and{picture}<|end|><|assistant|> b5<|end|>",
    ]
    assert not skipped.counts


def bad_rows(folder: Path) -> list[tuple[Any, str]]:
    (folder / "text.jpg").write_text("a letter")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(sheet(5, 64)[0][:-300])
    (folder.parent / "outside.jpg").write_bytes(sheet(5, 40)[0])
    os.symlink(folder.parent / "outside.jpg", folder / "link.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    pictures = {
        "none.jpg": "unreadable",
        "text.jpg": "undecodable",
        "empty.jpg": "empty",
        "cut.jpg": "undecodable",
        "link.jpg": "outside_root",
        "../outside.jpg": "outside_root",
        str(folder.parent / "outside.jpg"): "outside_root",
        "pipe.jpg": "unreadable",
        "folder.jpg": "unreadable",
        "a\0b": "unreadable",
    }
    rows: list[tuple[Any, str]] = [
        (llava_row("<image>", "a", image=name), reason) for name, reason in pictures.items()
    ]
    odd = llava_row("q", "a")
    odd["conversations"].reverse()
    return [
        *rows,
        (odd, "assistant_first"),
        (llava_row("q", "a", "q"), "roles"),
        (llava_row("q", " "), "empty_answer"),
        (llava_row("<image>\n<image>", "a", image="0.jpg"), "marks"),
        (llava_row("<image>", "a", image=["0.jpg", "1.jpg"]), "marks"),
        (llava_row("q", "<image>", image="0.jpg"), "marks"),
        (llava_row("q <|end|>", "a"), "special_token"),
        (llava_row("q", "a " * 3000), "too_long"),
        (llava_row("q", "a", image={"path": "0.jpg"}), "odd_row"),
        (llava_row("q", "a", image=[3]), "odd_row"),
        (llava_row("q", 5), "odd_row"),
        ({"id": 1}, "odd_row"),
        ({"id": 1, "conversations": [["human", "q"]]}, "odd_row"),
        ({"id": 1, "conversations": [{"from": "ocr", "value": "x"}]}, "roles"),
        ({"id": 1, "conversations": []}, "roles"),
        (["q", "a"], "odd_row"),
        ('{"id": 1, "conversations": [', "not_json"),
    ]


def test_a_bad_row_is_left_out_and_counted_by_why(tmp_path: Path) -> None:
    folder = tmp_path / "root"
    folder.mkdir()
    good = llava_row("<image>\nq", "good", image="0.jpg")
    for row, reason in bad_rows(folder):
        texts, skipped = said(batches_of(written(folder, [good, row])), 2)
        assert all("good" in text for text in texts), row
        assert set(skipped.counts) == {reason}, row
        assert "rows.jsonl, row 1" in skipped.examples[0] or "root" in skipped.examples[0]
        (folder / "rows.jsonl.index.safetensors").unlink()


def test_nothing_but_bad_rows_ends_the_run_with_their_names(tmp_path: Path) -> None:
    batches = batches_of(written(tmp_path, [llava_row("q", "", image="0.jpg")] * 3))
    with pytest.raises(
        RunFailed, match=r"rows one after the other .*\n.*row \d: an answer is empty"
    ):
        batches(0)


def test_a_batch_says_what_was_left_out_and_how_many_turns(tmp_path: Path) -> None:
    long = llava_row("<image>\nq", "a", "r " * 50, "b", "s", "c", image="1.jpg")
    rows = [llava_row("q", "a"), llava_row("q", ""), long]
    source = written(tmp_path, rows)
    first, *others = batches_of(source, batch=6, micro=2, max_tokens=40)(0)
    assert first["skipped"]["turns"] % 2 == 0
    assert first["skipped"]["turns"] >= 2
    assert first["skipped"]["empty_answer"] >= 1
    assert "an answer is empty (empty_answer)" in first["skipped_rows"][0]
    assert all("skipped" not in batch for batch in others)
    assert max(batch["lengths"].max() for batch in (first, *others)) <= 40
    [first] = batches_of(source, batch=6, max_tokens=40, too_long="skip")(0)
    assert set(first["skipped"]) == {"empty_answer", "too_long"}


def test_pictures_of_a_turn_that_is_cut_off_go_with_it(tmp_path: Path) -> None:
    row = llava_row("<image>", "a", "<image>" + "b " * 50, "c", image=["0.jpg", "gone.jpg"])
    (tmp_path / "gone.jpg").write_text("is not looked at")
    batches = batches_of(written(tmp_path, [row]), max_tokens=40)
    sample = batches.corpus.sample(0, batches.writer, Skipped())
    assert len(sample.pictures) == 1
    assert (sample.encoded.ids == IMAGE).sum() == 4


def test_the_pictures_of_a_batch_are_in_the_order_of_its_marks(tmp_path: Path) -> None:
    rows = [
        llava_row("<image>\nq", "a", image="0.jpg"),
        llava_row("<image>" + "w " * 20 + "<image>", "a", image=["1.jpg", "2.jpg"]),
        llava_row("q", "a"),
        llava_row("<image>" + "v " * 40, "a", image="3.jpg"),
    ]
    [batch] = batches_of(written(tmp_path, rows), batch=4)(0)
    talks = batch["input_ids"][0].split(batch["lengths"].tolist())
    counts = [int((talk == IMAGE).sum()) // 4 for talk in talks]
    assert counts == [0, 1, 2, 1]  # the shortest first
    pixels = [decode((tmp_path / f"{i}.jpg").read_bytes(), 28, middle_square) for i in range(4)]
    assert torch.equal(batch["pixel_values"], PREPROCESSING.normalise(np.stack(pixels)))


def test_words_alone_go_with_a_blank_picture_that_teaches_nothing(tmp_path: Path) -> None:
    rows = [llava_row("q", "a"), llava_row("r", "b")]
    parts = batches_of(written(tmp_path, rows), batch=2, micro=1)(0)
    for batch in parts:
        [length] = batch["lengths"].tolist()  # it is no sample of its own
        assert batch["input_ids"].shape == (1, length)
        assert (batch["input_ids"][0, -4:] == IMAGE).all()
        assert (batch["labels"][0, -4:] == -100).all()
        assert (batch["labels"][0] >= 0).any()
        assert batch["pixel_values"].shape == (1, 3, 28, 28)


def save_table(folder: Path, rows: list[dict[str, Any]], features: dict[str, Any]) -> str:
    import datasets

    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.save_to_disk(str(folder))
    return str(folder)


def test_tables_of_messages_and_of_texts_are_read(tmp_path: Path) -> None:
    from datasets import Image as Pictures
    from datasets import List, Value

    picture = {"bytes": sheet(0, 40)[0], "path": None}
    text = Value("string")
    part = {"type": text, "text": text}
    parts = save_table(
        tmp_path / "parts",
        [
            {
                "images": [picture],
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "before"},
                            {"type": "image", "text": None},
                            {"type": "text", "text": "after"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
                ],
            }
        ],
        {"images": List(Pictures()), "messages": List({"role": text, "content": List(part)})},
    )
    turns = [{"user": "q", "assistant": "a"}, {"user": "r", "assistant": "b"}]
    texts = save_table(
        tmp_path / "texts",
        [{"images": [picture, picture], "texts": turns}, {"images": [], "texts": turns[:1]}],
        {"images": List(Pictures()), "texts": List({"user": text, "assistant": text})},
    )
    plain = save_table(
        tmp_path / "plain",
        [{"picture": picture, "talk": json.dumps([{"role": "user", "content": "q"}])}] * 2
        + [{"picture": None, "talk": json.dumps([*_asked("q"), *_asked("<image>")])}],
        {"picture": Pictures(), "talk": text},
    )
    mark = "<image>" * 4
    [line], skipped = said(batches_of({"kind": "messages", "dataset": parts}), 1)
    assert f"be kind<|end|><|user|> before{mark} after<|end|><|assistant|> yes<|end|>" in line
    lines, _ = said(batches_of({"kind": "texts", "dataset": texts}), 2)
    assert sorted(lines, key=len) == [
        "<s><|user|> q<|end|><|assistant|> a<|end|>",
        f"<s><|user|>{mark}{mark} q<|end|><|assistant|> a<|end|><|user|> r<|end|><|assistant|>"
        " b<|end|>",
    ]
    assert not skipped.counts
    source = {"kind": "messages", "dataset": plain, "images": "picture", "messages": "talk"}
    with pytest.raises(RunFailed, match="roles"):
        said(batches_of(source), 1)
    for change, message in (
        ({"messages": "message"}, 'no column "message" .messages.; it has picture, talk'),
        ({"images": "image"}, 'no column "image" .images.; it has picture, talk'),
    ):
        with pytest.raises(UsageError, match=message):
            batches_of(source | change)


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]


def test_captions_are_answers_to_one_of_the_prompts(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", range(8), size=40)
    source = {
        "kind": "captions",
        "pairs": {"kind": "shards", "urls": str(shard)},
        "prompts": ["Tell.", "Say."],
    }
    texts, _ = said(batches_of(source), 8)
    assert {text.split("<|assistant|> ")[1] for text in texts} == {
        f"{sheet(index)[1]}<|end|>" for index in range(8)
    }
    asked = {text.partition("<|end|>")[0][-5:].strip() for text in texts}
    assert asked == {"Tell.", "Say."}
    assert said(batches_of(source), 16)[0][8:] != texts  # the second epoch is in another order
    assert sorted(said(batches_of(source), 16)[0][8:]) == sorted(texts)


def table(folder: Path, rows: list[list[str]], delimiter: str = ",", bom: str = "") -> str:
    folder.mkdir(exist_ok=True)
    with (folder / "questions.csv").open("w", newline="", encoding="utf-8") as file:
        file.write(bom)
        csv.writer(file, delimiter=delimiter).writerows(rows)
    (folder / "a.jpg").write_bytes(sheet(0, 40)[0])
    return str(folder)


@pytest.mark.parametrize(("delimiter", "bom"), [(",", ""), (";", "\ufeff"), ("\t", "")])
def test_a_folder_with_a_table_of_questions_is_read(
    tmp_path: Path, delimiter: str, bom: str
) -> None:
    rows = [
        ["note", "Question", "image", "answer "],
        ["x", "Is it red, or; blue?", "a.jpg", "red"],
        [],
        ["", "two\nlines", "", "yes"],
    ]
    source = {"kind": "questions", "folder": table(tmp_path / "f", rows, delimiter, bom)}
    texts, skipped = said(batches_of(source), 2)
    assert sorted(texts) == [
        "<s><|user|> two\nlines<|end|><|assistant|> yes<|end|>",
        f"<s><|user|>{'<image>' * 4} Is it red, or; blue?<|end|><|assistant|> red<|end|>",
    ]
    assert not skipped.counts


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["b.jpg", "q", "a"], "unreadable"),
        (["../a.jpg", "q", "a"], "outside_root"),
        (["a.jpg", "q", ""], "empty_answer"),
        (["a.jpg", "q, and", "more", "a"], "odd_row"),
    ],
)
def test_a_bad_line_of_a_table_is_left_out(tmp_path: Path, row: list[str], reason: str) -> None:
    rows = [["image", "question", "answer"], ["a.jpg", "q", "good"], row]
    source = {"kind": "questions", "folder": table(tmp_path / "f", rows)}
    texts, skipped = said(batches_of(source), 2)
    assert all("good" in text for text in texts)
    assert set(skipped.counts) == {reason}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "names no column image; it has none"),
        (b"picture,question,answer\n", "names no column image; it has picture, question, answer"),
        (b"image,questions,answer\n", "no column question; .*did you mean questions"),
        (b"image,question,answer\n", "data.sources.0: has no rows"),
        (b"image,question,answer\na.jpg,\xe9,b\n", "is not UTF-8 .byte 28.; save it as CSV UTF-8"),
        (b"image,question,answer\na.jpg," + b"x" * 200_000 + b",b\n", "csv:2: is no CSV"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "questions.csv").write_bytes(content)
    with pytest.raises(UsageError, match=text):
        batches_of({"kind": "questions", "folder": str(tmp_path)})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"kind": "llava", "file": "/none.json"}, "/none.json: cannot be read"),
        ({"kind": "questions", "folder": "/none"}, "/none/questions.csv: cannot be read"),
        ({"kind": "messages", "dataset": "/none/table"}, "/none/table: cannot be loaded"),
        ({"kind": "captions", "pairs": {"kind": "folder", "folder": "/none"}}, "/none: cannot be"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        batches_of(source)


def test_a_root_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"/none: there is no such folder .root."):
        batches_of(written(tmp_path, [llava_row("q", "a")]) | {"root": "/none"})


def test_sources_are_mixed_by_weight_and_each_rows_turn_comes_once_an_epoch(tmp_path: Path) -> None:
    rows = [llava_row(f"q{number}", "a") for number in range(30)]
    mixture = [written(tmp_path, rows) | {"weight": 3}, {"kind": "handwriting", "weight": 1}]
    texts, _ = said(batches_of(*mixture), 40)
    own = [text for text in texts if "<image>" not in text]
    assert 22 <= len(own) <= 38
    assert len(set(own[:30])) == min(30, len(own))


def test_batches_are_the_same_in_another_process_and_in_any_micro_batches(tmp_path: Path) -> None:
    rows = [llava_row("<image>" + "q" * n, "a", image=f"{n % 4}.jpg") for n in range(9)]
    batches = batches_of(written(tmp_path, rows), {"kind": "handwriting"}, batch=6)
    sent = pickle.loads(pickle.dumps(batches))
    for one, other in zip(batches(3), sent(3), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("input_ids", "pixel_values"))
    small = batches_of(written(tmp_path, rows), {"kind": "handwriting"}, batch=6, micro=2)
    pixels = torch.cat([batch["pixel_values"] for batch in small(3)])
    assert torch.equal(pixels, batches(3)[0]["pixel_values"])


def test_a_model_without_eyes_reads_rows_without_pictures(tmp_path: Path) -> None:
    rows = [llava_row("q", "words"), llava_row("<image>", "a", image="0.jpg")]
    batches = conversation_batches(
        ConversationData.model_validate({"sources": [written(tmp_path, rows)]}),
        TrainConfig(steps=9, batch_size=4, lr=1.0),
        seed=0,
        tokenizer=TOKENIZER,
        preprocessing=None,
    )
    [batch] = batches(0)
    assert "pixel_values" not in batch
    assert batch["skipped"] == {"picture": 3}
    assert "words" in str(batches.corpus.words(0, Skipped()))


def test_a_picture_is_padded_to_a_square_as_llava_does_it() -> None:
    random = np.random.default_rng(0)
    for width, height in ((60, 31), (31, 60), (48, 48), (200, 3)):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        side = max(width, height)
        square = Image.new("RGB", (side, side), (122, 116, 104))  # expand2square of llava.mm_utils
        corner = (0, (width - height) // 2) if width > height else ((height - width) // 2, 0)
        square.paste(picture, corner)
        expected = np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        assert np.array_equal(decode_padded(buffer.getvalue(), 28, (122, 116, 104)), expected)


def test_a_large_jpeg_is_padded_from_no_more_of_it_than_is_needed() -> None:
    ramp = np.linspace(0, 255, 1600)[None, :, None] * np.ones((900, 1, 3))
    content = jpeg(Image.fromarray(ramp.astype(np.uint8)))
    got = decode_padded(content, 56, (0, 0, 0)).astype(int)
    assert (got[:11] == 0).all()
    assert (got[-11:] == 0).all()
    assert abs(got[28, :, 0] - np.linspace(2, 253, 56)).max() < 8


def test_a_conversation_of_the_world_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"data.sources.0: .* max_tokens"):
        batches_of({"kind": "handwriting"}, max_tokens=5)(0)


def test_a_process_that_may_open_no_more_files_ends_and_forgets_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def opened(path: Path, flags: int) -> int:
        if path.suffix == ".jpg":
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags)

    batches = batches_of(written(tmp_path, [llava_row("<image>\nq", "a", image="0.jpg")]))
    monkeypatch.setattr("aimv2_mllm.data.files.os.open", opened)
    with pytest.raises(RunFailed, match=r"Too many open files\): .* ulimit -n 65536"):
        batches(0)
