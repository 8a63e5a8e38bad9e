"""`aimv2-mllm convert`: whole or not there, and with the licence and revision of its source."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from safetensors.torch import load_file
from test_lit import tiny_lit
from test_namings import LAYOUTS, assert_same, tiny_encoder

from aimv2_mllm import __main__ as cli
from aimv2_mllm.errors import UsageError
from aimv2_mllm.export import convert as converting
from aimv2_mllm.export.convert import convert
from aimv2_mllm.folders import licence_of, origins_of, talking_folder
from aimv2_mllm.model.lit_weights import save_lit
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.timm_layout import CLIP_MEAN, CLIP_STD
from aimv2_mllm.model.weights import load_encoder, save_encoder
from aimv2_mllm.place import Place
from aimv2_mllm.runs import run as runs
from aimv2_mllm.runs import run_folder

CARD = """\
---
library_name: transformers
license: other
license_name: apple-amlr   # research only
tags:
- vision
---
# AIMv2
license: mit
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An encoder as the hub has it: weights, config, processor, card and licence."""
    folder = tmp_path / "source"
    save_encoder(tiny_encoder(), folder)
    Preprocessing(56, CLIP_MEAN, CLIP_STD).save(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("the terms")
    return folder


def quiet(text: str) -> None:
    """Says nothing."""


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_writes_a_layout_and_says_so(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    target = tmp_path / "new" / "target"
    assert cli.main(["convert", str(source), str(target), "--layout", layout]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"wrote {target}: AIMv2, 14,128 parameters in float32, {layout} layout, 56 px",
        "licence: apple-amlr (of source, revision unknown)",
    ]
    assert err == ""
    assert_same(load_encoder(target).state_dict(), tiny_encoder().state_dict())
    assert Preprocessing.load(target) == Preprocessing.load(source)
    assert (target / "LICENSE").read_text() == "the terms"
    assert sorted(path.name for path in target.iterdir()) == [
        "LICENSE",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "stage.json",
    ]
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_the_record_tells_where_the_weights_came_from(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "target", layout="timm", narrate=quiet)
    record = read(tmp_path / "target" / "stage.json")
    assert (record["kind"], record["source"]) == ("convert", "source")
    assert (record["licence"], record["revision"]) == ("apple-amlr", "unknown")
    assert record["origins"] == [
        {"source": "source", "revision": "unknown", "licence": "apple-amlr"}
    ]
    for key, folder in (("source_files", source), ("files", tmp_path / "target")):
        for name, digest in record[key].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert record["source_files"].keys() == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    }
    assert str(tmp_path) not in (tmp_path / "target" / "stage.json").read_text()


def test_licence_and_revision_travel_through_a_chain(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "cache" / "models--apple--tiny" / "snapshots" / commit
    shutil.copytree(source, snapshot)
    monkeypatch.setattr(
        converting, "locate", lambda name: snapshot if name[0] == "a" else Path(name)
    )
    convert("apple/tiny@v1", tmp_path / "one", layout="timm", narrate=quiet)
    origin = {"source": "apple/tiny", "revision": commit, "licence": "apple-amlr"}
    for folder, after in (("one", "two"), ("two", "three")):
        convert(str(tmp_path / folder), tmp_path / after, layout="original", narrate=quiet)
        record = read(tmp_path / after / "stage.json")
        assert record["origins"] == [origin]
        assert (record["licence"], record["revision"]) == ("apple-amlr", commit)


def test_a_run_on_converted_weights_carries_their_licence_and_origin(
    source: Path, tmp_path: Path
) -> None:
    convert(str(source), tmp_path / "tower", layout="transformers", narrate=quiet)
    recipe = tiny_recipe(tmp_path / "run", f"stages.align.tower={tmp_path / 'tower'}")
    words = {name: recipe.stages[name] for name in ("align", "tune")}
    folder = runs.run(recipe.model_copy(update={"stages": words}), quiet)
    for stage in ("align", "tune"):
        record = read(folder / stage / "model" / "stage.json")
        assert record["licence"] == "Apache-2.0 and apple-amlr"
        sources = {one["source"]: one["licence"] for one in record["origins"]}
        assert sources == {"source": "apple-amlr", "tiny_llm": "Apache-2.0"}


def test_a_run_on_weights_of_unknown_licence_says_whose_it_is(source: Path, tmp_path: Path) -> None:
    (source / "README.md").unlink()
    recipe = tiny_recipe(tmp_path / "run", f"stages.align.tower={source}")
    stages = {"align": recipe.stages["align"]}
    place = Place(recipe.model_copy(update={"stages": stages}), tmp_path / "run")
    assert run_folder.lineage("align", place)["licence"] == "Apache-2.0 and that of source"


def test_another_size_resizes_weights_config_and_processor(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    target = tmp_path / "target"
    convert(str(source), target, layout="transformers", image_size=84, narrate=said.append)
    assert said == [f"{source}: its learned positions are resized to 84 px (6 x 6)"]
    assert load_encoder(target).config.image_size == 84
    processor = read(target / "preprocessor_config.json")
    assert processor["size"] == {"shortest_edge": 84}
    assert processor["crop_size"] == {"height": 84, "width": 84}
    assert Preprocessing.load(target) == Preprocessing(84, CLIP_MEAN, CLIP_STD)


def test_the_precision_is_changed_and_kept(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "half", layout="original", dtype="bf16", narrate=quiet)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    convert(str(tmp_path / "half"), tmp_path / "kept", layout="original", narrate=quiet)
    assert_same(load_file(tmp_path / "kept" / "model.safetensors"), half)
    convert(
        str(tmp_path / "half"), tmp_path / "full", layout="original", dtype="fp32", narrate=quiet
    )
    for name, tensor in load_file(tmp_path / "full" / "model.safetensors").items():
        assert torch.equal(tensor, half[name].float())


def test_without_a_processor_the_published_one_is_written(source: Path, tmp_path: Path) -> None:
    (source / "preprocessor_config.json").unlink()
    convert(str(source), tmp_path / "target", layout="original", narrate=quiet)
    assert Preprocessing.load(tmp_path / "target") == Preprocessing(56, CLIP_MEAN, CLIP_STD)


def test_timm_is_told_the_normalisation_and_tells_it_back(source: Path, tmp_path: Path) -> None:
    mine = Preprocessing(56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    mine.save(source)
    convert(str(source), tmp_path / "timm", layout="timm", narrate=quiet)
    told = read(tmp_path / "timm" / "config.json")["pretrained_cfg"]
    assert (told["mean"], told["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    (tmp_path / "timm" / "preprocessor_config.json").unlink()  # as timm's own folders are
    convert(str(tmp_path / "timm"), tmp_path / "back", layout="original", narrate=quiet)
    assert Preprocessing.load(tmp_path / "back") == mine


def test_a_native_encoder_keeps_its_processor_or_gets_one_that_cuts_nothing(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(native=True), tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "new", layout="transformers", narrate=quiet)
    made = read(tmp_path / "new" / "preprocessor_config.json")
    assert (made["do_resize"], made["do_center_crop"]) == (False, False)
    assert (made["image_mean"], made["image_std"]) == (list(CLIP_MEAN), list(CLIP_STD))
    given = made | {"image_mean": [0.5, 0.5, 0.5]}
    (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(given))
    convert(str(tmp_path / "source"), tmp_path / "kept", layout="transformers", narrate=quiet)
    assert read(tmp_path / "kept" / "preprocessor_config.json") == given


@pytest.mark.parametrize("native", [False, True])
def test_transformers_reads_the_processor_that_is_made(tmp_path: Path, native: bool) -> None:
    import numpy as np
    from transformers import CLIPImageProcessorPil

    save_encoder(tiny_encoder(native), tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "new", layout="transformers", narrate=quiet)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "new")
    picture = np.zeros((42, 70, 3), dtype=np.uint8)
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert tuple(pixels.shape) == ((1, 3, 42, 70) if native else (1, 3, 56, 56))
    assert load_encoder(tmp_path / "new")(pixels).shape[1] == (15 if native else 16)


def test_of_a_lit_checkpoint_the_encoder_is_converted_and_the_rest_named(tmp_path: Path) -> None:
    model, said = tiny_lit(), list[str]()
    save_lit(model, tmp_path / "lit")
    convert(str(tmp_path / "lit"), tmp_path / "target", layout="timm", narrate=said.append)
    assert "left aside: image_encoder.head (5 tensors), image_projector" in said[0]
    expected = model.image_encoder.state_dict()
    expected = {name: t for name, t in expected.items() if not name.startswith("head.")}
    assert_same(load_encoder(tmp_path / "target").state_dict(), expected)


def test_what_is_there_is_never_overwritten_but_an_empty_folder_is_taken(
    source: Path, tmp_path: Path
) -> None:
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "mine").write_text("")
    file.write_text("mine")
    empty.mkdir()
    for target, said in ((full, "is not empty"), (file, "is a file"), (source, "is not empty")):
        with pytest.raises(UsageError, match=said):
            convert(str(source), target, layout="timm", narrate=quiet)
    assert [path.name for path in full.iterdir()] == ["mine"]
    convert(str(source), empty, layout="timm", narrate=quiet)
    assert_same(load_encoder(empty).state_dict(), tiny_encoder().state_dict())


def test_what_fails_in_the_middle_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> str:
        if "target" in str(path):
            raise OSError(28, "No space left on device")
        return ""

    monkeypatch.setattr(converting, "sha256", full)
    with pytest.raises(UsageError, match=r"target: cannot be written .*No space left"):
        convert(str(source), tmp_path / "target", layout="timm", narrate=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def killed_while_it_writes(source: Path, target: Path) -> None:
    """Convert, and die as by SIGKILL before the folder is whole."""

    def die(path: Path) -> str:
        return "" if "target" not in str(path) else str(os.kill(os.getpid(), signal.SIGKILL))

    converting.sha256 = die  # type: ignore[assignment]
    convert(str(source), target, layout="timm", narrate=quiet)


def test_what_a_killed_conversion_left_is_cleared_by_the_next(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    process = multiprocessing.get_context("fork").Process(
        target=killed_while_it_writes, args=(source, target)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    convert(str(source), target, layout="timm", narrate=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_destination_that_cannot_be_made_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        convert(str(source), tmp_path / "file" / "target", layout="timm", narrate=quiet)


@pytest.mark.parametrize("text", ["[]", "{", '{"image_mean": [0.5, 0.5, 0.5]}', '{"size": 3}'])
def test_a_processor_that_is_none_is_refused(source: Path, tmp_path: Path, text: str) -> None:
    (source / "preprocessor_config.json").write_text(text)
    with pytest.raises(UsageError, match="is not an image processor's configuration"):
        convert(str(source), tmp_path / "target", layout="timm", narrate=quiet)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layout", "tim"], "argument --layout: invalid choice: 'tim'"),
        ([], "arguments are required: --layout"),
        (["--layout", "timm", "--image-size", "225"], "225 is not a multiple of the patch size 14"),
        (["--layout", "timm", "--image-size", "0"], "must be a whole number, 1 to 4096"),
        (["--layout", "timm", "--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
    ],
)
def test_wrong_words_are_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert cli.main(["convert", str(source), str(tmp_path / "target"), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "target").exists()


def test_a_converted_folder_cannot_talk_and_says_why(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "target", layout="transformers", narrate=quiet)
    with pytest.raises(UsageError, match="is an encoder, which cannot talk"):
        talking_folder(tmp_path / "target")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (CARD, "apple-amlr"),
        ("---\nlicense: apple-ascl\n---\n", "apple-ascl"),
        ("---\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("---\ntags:\n- x\n---\nlicense: mit\n", None),
        ("# a card\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_is_read_from_the_cards_front_matter(
    tmp_path: Path, card: str, licence: str | None
) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == licence


def test_the_licence_of_a_record_goes_before_the_cards(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "stage.json").write_text('{"licence": "mine", "fingerprint": "f"}')
    assert licence_of(tmp_path) == "mine"
    assert origins_of(tmp_path, "runs/x/model") == [
        {"source": "runs/x/model", "revision": "f", "licence": "mine"}
    ]
    (tmp_path / "stage.json").write_text("[")
    with pytest.raises(UsageError, match="is not a stage's record"):
        licence_of(tmp_path)
