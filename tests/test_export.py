"""Exports as other tools load them: the same numbers without this package, and every change of a
folder found."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from aimv2_mllm import __main__ as command
from aimv2_mllm import disk
from aimv2_mllm.export import answers, verify, writing
from aimv2_mllm.export.card import front_matter, write_card
from aimv2_mllm.export.source import ExportSource, seeing, talking
from aimv2_mllm.folders import digest_of, stage_record
from aimv2_mllm.model import foreign

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stock Llava folder of a finished run."""
    folder = tmp_path_factory.mktemp("exports") / "mine"
    assert command.main(["export", str(tiny_run), str(folder)]) == 0
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """Another one that may be spoilt."""
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """A function from the words of a command to its code, its lines and its complaints; what is
    verified is loaded in this process, in which all is imported already."""
    monkeypatch.setattr(verify, "alone", answers.found)

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = command.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def failed(text: str) -> list[str]:
    """What the failed checks are about."""
    return re.findall(r"^FAIL  ([\w ]+):", text, re.MULTILINE)


def test_an_export_says_the_same_in_a_process_without_this_package(
    exported: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["verify-export", str(exported), str(tiny_run)]) == 0
    out = capsys.readouterr().out
    assert "ok    loads without aimv2_mllm: as LlavaForConditionalGeneration\n" in out
    assert f"to {tiny_run}, at most" in out
    assert out.endswith("mine: all 14 checks passed\n")


def test_pictures_that_are_not_square_are_padded_as_in_training(
    tiny_run: Path, tmp_path: Path, said: Said
) -> None:
    from aimv2_mllm.chat.chat import load_model
    from aimv2_mllm.chat.prompts import pixels_of

    model, folder = shutil.copytree(tiny_run / "tune" / "model", tmp_path / "model"), tmp_path / "x"
    record = json.loads((model / "stage.json").read_text())
    photos = {"kind": "questions", "folder": "photos", "weight": 1.0}
    record["recipe"]["data"] |= {"sources": [photos], "image_aspect": "pad"}
    (model / "stage.json").write_text(json.dumps(record))
    assert said("export", model, folder)[0] == 0
    assert said("verify-export", folder, model)[0] == 0
    assert json.loads((folder / "aimv2_mllm.json").read_text())["pictures_as_trained"] is True
    assert "makes squares of pictures otherwise" not in (folder / "README.md").read_text()
    trained, own = load_model(model), load_model(folder)
    assert own.data is None  # so its processor prepares them
    wide = Image.effect_noise((61, 40), 90).convert("RGB")
    for image in (wide, wide.rotate(90, expand=True), wide.resize((40, 40))):
        expected, found = (
            pixels_of(bot.processor, [image], bot.data)["pixel_values"] for bot in (trained, own)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["llava", "adapter"])
def test_the_reference_is_asked_on_the_processor_where_there_is_a_gpu_too(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    moved: list[str] = []
    monkeypatch.setattr(foreign.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        LlavaForConditionalGeneration, "to", lambda model, where: (moved.append(where), model)[1]
    )
    assert command.main(["export", str(tiny_run), str(tmp_path / kind), "--format", kind]) == 0
    told = verify.read_sidecar(tmp_path / kind)
    verify._of_run(str(tiny_run), told)
    assert moved == ["cpu", "cpu"]


def test_that_process_can_import_nothing_of_ours() -> None:
    refusal = answers._Refusal()
    with pytest.raises(ImportError, match=r"aimv2_mllm\.model is refused here"):
        refusal.find_spec("aimv2_mllm.model")
    refusal.find_spec("transformers")


def test_the_folder_says_all_that_stock_libraries_must_know(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (
        -1,
        "full",
    )
    vision = config["vision_config"]
    assert (vision["tie_last_hidden_states"], vision["use_head"]) == (True, False)
    told = json.loads((exported / "aimv2_mllm.json").read_text())
    assert (told["feature_norm"], told["min_transformers"]) == ("post", "5.18")
    assert told["licence"] == "Apache-2.0"
    assert told["prompt_as_trained"] is True
    assert told["pictures_as_trained"] is False  # sheets of another shape grow by their own paper
    assert "makes squares of pictures otherwise than" in (exported / "README.md").read_text()
    assert len(told["reference"]["tokens"]) >= 1
    assert set(told["files"]) == {p.name for p in exported.iterdir()} - {"aimv2_mllm.json"}


def test_a_tampered_weight_is_found(copy: Path, said: Said) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["multi_modal_projector.linear_1.bias"] += 0.05
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    code, out, err = said("verify-export", copy)
    assert code == 1
    assert "FAIL  files: model.safetensors was changed" in out
    assert set(failed(out)) >= {"files", "logits"}
    assert re.search(r"of 9 checks failed, see FAIL above\n$", err)


def test_features_before_the_last_norm_are_found(copy: Path, said: Said) -> None:
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"tie_last_hidden_states": true', '"x": 1'))
    code, out, _ = said("verify-export", copy)
    assert code == 1
    assert "files: config.json was changed" in out
    assert "logits" in failed(out)


def test_a_lost_tensor_and_a_lost_file_are_found(copy: Path, said: Said) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["vision_tower.rms_norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    out = said("verify-export", copy)[1]
    assert "FAIL  weights: model.vision_tower.rms_norm.weight is missing" in out
    (copy / "config.json").unlink()
    out = said("verify-export", copy)[1]
    assert "config.json is gone" in out
    assert "FAIL  loads without aimv2_mllm: " in out


def test_another_image_processor_and_another_prompt_are_found(copy: Path, said: Said) -> None:
    path = copy / "processor_config.json"
    raw = json.loads(path.read_text())
    raw["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(raw))
    assert {"pixels", "logits"} <= set(failed(said("verify-export", copy)[1]))
    path = copy / "chat_template.jinja"
    path.write_text("Hear: " + path.read_text())
    assert "prompt" in failed(said("verify-export", copy)[1])


def test_an_older_transformers_is_told(
    exported: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", "5.9.1")
    code, out, _ = said("verify-export", exported)
    assert code == 1
    assert "FAIL  transformers: 5.9.1, 5.18 or newer is needed; older ones read other" in out


def test_another_runs_export_is_found(copy: Path, tiny_run: Path, said: Said) -> None:
    code, out, _ = said("verify-export", copy, tiny_run / "align" / "model")
    assert code == 1
    assert "logits" in failed(out)
    assert "reference" not in "".join(re.findall("^FAIL.*$", out, re.MULTILINE))


def test_half_precision_in_shards_is_what_is_written(
    tiny_run: Path, tmp_path: Path, said: Said
) -> None:
    folder = tmp_path / "half"
    words = ("--dtype", "bf16", "--max-shard-size", "2MB")
    code, out, _ = said("export", tiny_run / "tune" / "model", folder, *words)
    assert code == 0
    assert "half: llava, 4.8 MB" in out
    shards = sorted(folder.glob("model-0000?-of-00003.safetensors"))
    assert len(shards) == 3
    assert {t.dtype for shard in shards for t in load_file(shard).values()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"]} == {"bfloat16"}
    assert said("verify-export", folder, tiny_run)[0] == 0


def test_a_card_names_what_went_in_and_nothing_of_this_machine(
    exported: Path, tiny_run: Path
) -> None:
    text = (exported / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "image-text-to-text"
    for piece in ("## Stage tune (tune)", "lora:", "samples 12", "last losses total", "handwriting",
                  "--model-impl transformers", "tiny_llm (revision "):  # fmt: skip
        assert piece in text, piece
    assert "apple" not in text.lower().replace("apple/aimv2", "")
    for file in exported.iterdir():
        if file.suffix in (".json", ".md"):
            assert str(tiny_run.parent) not in file.read_text(), file


def test_a_card_has_the_scores_of_what_is_exported_and_of_no_other(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    results = {name: digest_of(stage_record(run / name / "model")) for name in
               ("pretrain", "align", "tune")}  # fmt: skip

    def card(source: ExportSource, **more: str) -> str:
        numbers = {"vqa_accuracy": 0.5, "made_from": {"results": results}}
        (run / "summary.json").write_text(json.dumps(numbers))
        told = {"made_by": "us", "min_transformers": "5.18", **more}
        write_card(tmp_path, source, told, name="mine")
        return (tmp_path / "README.md").read_text()

    assert "| vqa_accuracy | 0.5 |" in card(talking(str(run)), format="llava")
    assert "vqa_accuracy" not in card(talking(str(run / "align" / "model")), format="llava")
    for folder in (run, run / "tune" / "model"):
        assert "vqa_accuracy" not in card(seeing(str(folder)), format="encoder", layout="original")
    results["tune"] = "another"  # than is there by now
    assert "vqa_accuracy" not in card(talking(str(run)), format="llava")


def test_apples_licence_goes_along_where_its_weights_went_in(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_run / "tune" / "model", tmp_path / "model")
    record = json.loads((folder / "stage.json").read_text())
    origin = {"source": "apple/aimv2-large-patch14-336", "revision": "1", "licence": "apple-amlr"}
    record |= {"origins": [origin], "licence": "Apache-2.0 and apple-amlr"}
    (folder / "stage.json").write_text(json.dumps(record))
    assert command.main(["export", str(folder), str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "**Apple's AIMv2 weights are in it, under apple-amlr**: for research only" in text
    front = front_matter(talking(str(folder)), {"format": "llava"})
    assert (front["license"], front["license_name"]) == ("other", "Apache-2.0 and apple-amlr")
    assert front["base_model"] == ["apple/aimv2-large-patch14-336"]


def refused(said: Said, *words: object) -> str:
    code, out, err = said(*words)
    assert code == 2, (out, err)
    [line] = [line for line in err.splitlines() if not line.startswith("asking the model")]
    assert line.startswith("aimv2-mllm: ")
    return line


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    tiny_run: Path, tmp_path: Path, said: Said
) -> None:
    new = tmp_path / "new"
    assert "there is no such folder" in refused(said, "export", tmp_path / "none", new)
    assert "cannot talk" in refused(said, "export", tiny_run / "pretrain" / "model", new)
    assert "--layout means nothing to --format llava" in refused(
        said, "export", tiny_run, new, "--layout", "timm"
    )
    for size in ("5", "5TB", "0GB", "-1GB", "٣GB"):
        text = refused(said, "export", tiny_run, new, f"--max-shard-size={size}")
        assert f"--max-shard-size is {size}, must be a size such as 5GB" in text
    assert "invalid choice: 'gguf'" in refused(said, "export", tiny_run, new, "--format", "gguf")
    assert not list(tmp_path.iterdir())
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    assert "full: is not empty; give a new folder" in refused(said, "export", tiny_run, full)
    assert "mine.txt: is a file" in refused(said, "export", tiny_run, full / "mine.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"connector": {"name": "pixel_shuffle", "factor": 2}},
            "its connector is name pixel_shuff",
        ),
        ({"connector": {"name": "mlp", "depth": 3}}, "its connector is name mlp, depth 3"),
        ({"vision_config": {"is_native": True}}, "pictures of any shape"),
        (
            {"tower": "clip", "vision_feature_norm": "post"},
            "its tower, clip, is read at layer -1 pos",
        ),
    ],
)
def test_what_stock_llava_has_not_is_refused_with_the_reason(
    tmp_path: Path, said: Said, changes: dict[str, Any], why: str
) -> None:
    folder = tmp_path / "any"
    folder.mkdir()
    config = {"model_type": "aimv2_mllm_llava", "connector": {"name": "mlp"}, "tower": "aimv2"}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    for kind in ("llava", "adapter", "original-llava"):
        words = ("export", folder, tmp_path / "llava", "--format", kind)
        text = refused(said, *words)
        assert why in text
        assert "Load it by aimv2_mllm.load_model" in text


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tiny_run: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writing, "demand_room", lambda *_: None)

        def fill(path: Path) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(disk, "sync", fill)
        text = refused(said, "export", tiny_run, tmp_path / "new")
        assert text.endswith("new: cannot be written (No space left on device)")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 10**6))
    text = refused(said, "export", tiny_run, tmp_path / "new")
    assert "0.0 GB are to be written, and 0.0 GB are free" in text
    assert not list(tmp_path.iterdir())


def test_what_is_no_export_is_refused(copy: Path, tmp_path: Path, said: Said) -> None:
    assert "is no export, for it has no aimv2_mllm.json" in refused(said, "verify-export", tmp_path)
    half = {"format": "llava", "files": {"a": ""}, "reference": {"tokens": []}}
    for text in ("", "[]", "{}", '{"format": "llava"}', '{"format": 3}', json.dumps(half)):
        (copy / "aimv2_mllm.json").write_text(text)
        assert "aimv2_mllm.json: is damaged" in refused(said, "verify-export", copy)
    other = {"format": "gguf", "files": {"a": ""}, "reference": {"a": 1}}
    (copy / "aimv2_mllm.json").write_text(json.dumps(other))
    assert "is of a format 'gguf', which is not known" in refused(said, "verify-export", copy)
