"""The verbs probe and dream: what they print and write, one short message for every mistake."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_dreams import result_folder

from aimv2_mllm import __main__ as cli
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.talks.tokenizer import train_tokenizer
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig
from aimv2_mllm.model.shards import weights_sha256
from aimv2_mllm.model.towers import load_tower


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a pretrain stage of the handwriting world that has learned nothing."""
    tokenizer = train_tokenizer([" a red 7"], 270)
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(16, 32, 2, 2, image_size=42))
    decoder = DecoderConfig(16, 32, 1, 2, vocab_size=len(tokenizer), max_text_tokens=5)
    model = AIMv2ForPreTraining(encoder, decoder)
    folder = result_folder(model, tokenizer, tmp_path_factory.mktemp("run") / "see" / "model")
    data = {"sources": [{"kind": "handwriting"}]}
    record = {"stage": "see", "kind": "pretrain", "recipe": {"data": data}}
    (folder / "stage.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 50), "red").save("red.png")
    Path("letter.png").write_text("Dear reader")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What stderr says of a command that must fail with 2, in one line, and writes nothing."""
    before = sorted(Path.cwd().rglob("*"))
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("aimv2-mllm: ")
    assert err.count("\n") == 1, err
    assert sorted(Path.cwd().rglob("*")) == before
    return err


def test_probe_prints_a_table_and_writes_results_and_a_picture(here, pretrained, capsys) -> None:
    words = ["--limit", "40", "--epochs", "1", "--out", "r.json", "--pca", "p.png", "--seed", "3"]
    assert cli.main(["probe", str(pretrained), "handwriting", *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("data     handwriting: 10 classes, 40 to learn from, 40 to be tested")
    names = ["20 nearest", "linear", "attentive (lr", "majority class", "raw pixels"]
    assert all(line.startswith(name) for line, name in zip(said[4:], names, strict=True))
    results = json.loads((here / "r.json").read_text())
    assert results["seed"] == 3
    assert results["encoder"] == str(pretrained)
    weights = load_tower(str(pretrained)).module.state_dict()
    assert results["tower"]["sha256"] == weights_sha256(weights)
    assert list(results["probes"]) == ["knn", "linear", "attentive"]
    share = 100 * results["probes"]["knn"]["accuracy"]
    assert f"{share:.1f} %" in said[4]
    with Image.open("p.png") as picture:
        assert picture.width > 3 * picture.height


def test_a_run_is_probed_by_its_pretrain_stage(here, pretrained, capsys) -> None:
    run = here / "run"
    run.mkdir()
    (run / "see").symlink_to(pretrained.parent)
    (run / "recipe.yaml").write_text("stages: {see: {kind: pretrain}, zip: {kind: align}}")
    assert cli.main(["probe", "run", "handwriting", "--kind", "knn", "--limit", "30"]) == 0
    assert "20 nearest neighbours" in capsys.readouterr().out
    (run / "recipe.yaml").write_text("stages: {llm: {kind: language}}")
    said = refused(capsys, "probe", "run", "handwriting")
    assert "run: this run has no pretrain stage, only llm (language)" in said
    assert "no pretrain stage, only llm" in refused(capsys, "dream", "run", "--image", "red.png")
    (run / "recipe.yaml").write_text("stages: {eyes: {kind: pretrain}}")
    assert "no pretrain stage of this run is finished" in refused(
        capsys, "probe", "run", "handwriting"
    )


def test_probe_refuses_what_it_cannot_do(here, pretrained, capsys) -> None:
    for name in ("one/cat", "none"):
        (here / name).mkdir(parents=True)
    (here / "one" / "cat" / "a.png").write_bytes((here / "red.png").read_bytes())
    model = str(pretrained)
    for words, why in (
        (("absent", "handwriting"), "absent"),
        ((model, "absent"), "absent: there is no such folder"),
        ((model, "none"), "none: has no classes; give handwriting"),
        ((model, "one"), "one: has one class only, cat"),
        ((model, "handwriting", "--limit", "19"), "k is 20, and there are only 19 training"),
        ((model, "handwriting", "--k", "2000"), "k is 2000, and there are only 1,438 training"),
        ((model, "handwriting", "--image-size", "50"), "50"),
        ((model, "handwriting", "--out", "no/r.json"), "there is no folder no; make it first"),
        ((model, "handwriting", "--pca", "p.txt"), "its ending is no picture's"),
        ((model, "handwriting", "--kind", "zeroshot"), "--templates FILE belongs to"),
        ((model, "handwriting", "--templates", "t"), "--templates FILE belongs to"),
        ((model, "handwriting", "--kind", "forest"), "invalid choice: 'forest'"),
        ((model, "handwriting", "--limit", "1"), "must be a whole number, 2 to"),
    ):
        assert why in refused(capsys, "probe", *words)


def test_pictures_that_are_text_are_skipped_or_too_many(here, pretrained, capsys) -> None:
    for name in ("cat", "dog"):
        (here / "pets" / name).mkdir(parents=True)
        for number in range(25):
            Image.new("L", (9, 9), number).save(here / "pets" / name / f"{number}.png")
    (here / "pets" / "cat" / "0.png").write_text("Dear reader")
    (here / "pets" / "cat" / "1.txt").write_text("Dear reader")
    words = ["probe", str(pretrained), "pets", "--kind", "knn", "--k", "3", "--out", "r.json"]
    assert cli.main(words) == 0
    assert "2 skipped as undecodable" in capsys.readouterr().out
    assert sum(json.loads((here / "r.json").read_text())["data"]["skipped"].values()) == 2
    for number in range(2, 8):
        (here / "pets" / "dog" / f"{number}.png").write_text("Dear reader")
    assert "cannot be decoded, and 5% are the most" in refused(capsys, *words[:-2])


def test_dream_prints_the_caption_and_writes_the_picture(here, pretrained, capsys) -> None:
    words = ["--image", "red.png", "--prefix", "1", "--prefix", "8", "--statistics", "prefix"]
    assert cli.main(["dream", str(pretrained), *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("caption: ")
    assert said[1:] == ["picture: dream.png"]
    with Image.open("dream.png") as picture:
        assert picture.format == "PNG"
        wide = picture.width
    assert cli.main(["dream", str(pretrained), "--sheet", "--seed", "5", "--out", "d.jpg"]) == 0
    scene = scenes.scene(5, "heldout", 0)
    assert capsys.readouterr().out.startswith(f"sheet:   {scenes.caption(scene)} (--seed 5)\n")
    with Image.open("d.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.width < wide


@pytest.mark.parametrize(
    ("trained", "said", "absent"),
    [
        ({"text_weight": 0.0}, "caption: (none: this decoder never learned captions", "painted:"),
        ({"alpha": 0.0}, "painted: (nothing: this decoder never learned to paint", "(none:"),
    ],
)
def test_dream_says_what_a_decoder_never_learned(
    here, pretrained, capsys, trained: dict[str, float], said: str, absent: str
) -> None:
    assert cli.main(["dream", str(pretrained), "--image", "red.png", "--out", "all.png"]) == 0
    assert "never learned" not in capsys.readouterr().out
    shutil.copytree(pretrained, here / "half")
    record = json.loads((here / "half" / "stage.json").read_text())
    record["recipe"] |= {"alpha": 0.4, "text_weight": 1.0} | trained
    (here / "half" / "stage.json").write_text(json.dumps(record))
    assert cli.main(["dream", "half", "--image", "red.png", "--out", "half.png"]) == 0
    told = capsys.readouterr().out
    assert said in told
    assert absent not in told
    with Image.open("all.png") as whole, Image.open("half.png") as half:
        assert (half.width < whole.width) == ("alpha" in trained)  # without what is painted


def test_dream_refuses_what_it_cannot_do(here, pretrained, capsys) -> None:
    model, picture = str(pretrained), ("--image", "red.png")
    (here / "empty").mkdir()
    for words, why in (
        ((model,), "dream needs one picture"),
        ((model, "--sheet", *picture), "dream needs one picture"),
        (("absent", *picture), "absent"),
        (("empty", *picture), "empty"),
        ((model, "--image", "letter.png"), "letter.png: is not a picture"),
        ((model, *picture, "--prefix", "9"), "sees 9 patches, so 1 to 8 of them can be shown"),
        ((model, *picture, "--prefix", "0"), "--prefix: is 0, must be a whole number"),
        ((model, *picture, "--out", "d.txt"), "its ending is no picture's"),
        ((model, *picture, "--statistics", "mine"), "invalid choice: 'mine'"),
    ):
        assert why in refused(capsys, "dream", *words)


def test_an_encoder_without_a_decoder_cannot_dream(here, pretrained, capsys) -> None:
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (here / file).write_bytes((pretrained / file).read_bytes())
    said = refused(capsys, "dream", str(here), "--image", "red.png")
    assert "has no decoder.safetensors: give the result of a pretrain stage" in said
