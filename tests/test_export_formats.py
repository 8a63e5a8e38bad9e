"""The other formats: an encoder, adapters on their base, and the layout of LLaVA itself."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from llava_world import make_llm
from safetensors.torch import load_file, save_file
from test_export import Said, failed, refused, said

from aimv2_mllm import __main__ as command
from aimv2_mllm import load_encoder
from aimv2_mllm.export import llava_answers, original, verify
from aimv2_mllm.export.original import llava_config, renamed
from aimv2_mllm.export.source import talking
from aimv2_mllm.model.llms import TINY_LLM

__all__ = ["said"]  # a fixture


@pytest.mark.parametrize("layout", ["original", "transformers", "timm"])
def test_an_encoder_says_the_same_in_every_layout(
    tiny_run: Path, tmp_path: Path, said: Said, layout: str
) -> None:
    folder = tmp_path / "encoder"
    words = ("--format", "encoder", "--layout", layout)
    code, out, _ = said("export", tiny_run, folder, *words)
    assert code == 0
    [check] = re.findall("^to check it: python -m aimv2_mllm (.*)$", out, re.MULTILINE)
    mine, theirs = load_encoder(folder), load_encoder(tiny_run / "pretrain" / "model")
    pairs = zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    code, out, _ = said(*shlex.split(check))
    assert code == 0, out
    assert str(tiny_run) in out
    assert ("loads without aimv2_mllm: as Aimv2VisionModel" in out) == (layout == "transformers")
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).add_(0.1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = said("verify-export", folder)
    assert (code, failed(out)) == (1, ["files", "features"])


def test_the_encoder_of_a_run_is_the_one_that_was_trained_last(
    tiny_run: Path, tmp_path: Path, said: Said
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    model = run / "tune" / "model"
    weights = load_file(model / "model.safetensors")
    weights["vision_tower.rms_norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    words = ("--format", "encoder", "--layout", "transformers")
    assert said("export", run, tmp_path / "before", *words)[0] == 0
    record = json.loads((model / "stage.json").read_text())
    record["parts"] = [["tower", 1, True]]
    (model / "stage.json").write_text(json.dumps(record))
    assert said("export", run, tmp_path / "after", *words)[0] == 0
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("before", "after"))
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert moved == ["rms_norm.weight"]
    assert said("verify-export", tmp_path / "after", model)[0] == 0


def test_what_has_no_aimv2_encoder_is_refused(tiny_run: Path, tmp_path: Path, said: Said) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    config = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}
    (folder / "config.json").write_text(json.dumps(config))
    words = ("--format", "encoder")
    text = refused(said, "export", folder, tmp_path / "new", *words)
    assert "its tower is a clip_vision_model, and encoders are AIMv2's here" in text
    llm = Path(command.__file__).parent / "assets" / "tiny_llm"
    assert "is an LLM, which has no eyes" in refused(said, "export", llm, tmp_path / "new", *words)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def tower_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tune stage trained the tower's last block too."""
    from aimv2_mllm.runs.run import run

    folder = tmp_path_factory.mktemp("tower") / "run"
    return run(tiny_recipe(folder, "stages.tune.tower_blocks=1"), lambda _: None)


@pytest.mark.parametrize("made", ["tiny_run", "tower_run"])
def test_adapters_on_their_base_are_the_tuned_model(
    request: pytest.FixtureRequest, tmp_path: Path, said: Said, made: str
) -> None:
    run = shutil.copytree(request.getfixturevalue(made), tmp_path / "run")
    folder = tmp_path / "adapter"
    assert said("export", run, folder, "--format", "adapter")[0] == 0
    code, out, _ = said("verify-export", folder, run)
    assert code == 0, out
    assert "ok    base: stage align\n" in out
    names = load_file(folder / "adapter_model.safetensors")
    assert any("vision_tower" in name for name in names) == (made == "tower_run")
    assert "its base is the stage align of its run: give" in refused(said, "verify-export", folder)
    (run / "align" / "model" / "stage.json").write_text('{"fingerprint": "other"}')
    assert "is not the base that was tuned" in refused(said, "verify-export", folder, run)


def test_what_ends_an_answer_goes_along_with_the_adapters(
    tiny_run: Path, tmp_path: Path, said: Said
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    folder, settings = tmp_path / "adapter", run / "align" / "model" / "generation_config.json"
    assert said("export", run, folder, "--format", "adapter")[0] == 0
    told = json.loads((folder / "aimv2_mllm.json").read_text())["reference"]["tokens"]
    # A base whose answers end elsewhere.
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": told[0]}))
    code, out, _ = said("verify-export", folder, run)
    assert code == 0, out


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("llava-hf/llava-1.5-7b-hf", ("llava-hf/llava-1.5-7b-hf", "a" * 40)),
        ("llava-hf/llava-1.5-7b-hf@main", ("llava-hf/llava-1.5-7b-hf", "a" * 40)),
        ("other/llava", ("other/llava", None)),
        ("/home/somebody/llava", ("llava", None)),
    ],
)
def test_a_base_of_the_hub_is_named_as_peft_finds_it(
    tiny_run: Path, tmp_path: Path, said: Said, base: str, named: tuple[str, str | None]
) -> None:
    model = shutil.copytree(tiny_run / "tune" / "model", tmp_path / "model")
    record = json.loads((model / "stage.json").read_text())
    origin = {"source": "llava-hf/llava-1.5-7b-hf", "revision": "a" * 40, "licence": "llama2"}
    record |= {"base": {"source": base}, "origins": [origin]}
    (model / "stage.json").write_text(json.dumps(record))
    assert said("export", model, tmp_path / "adapter", "--format", "adapter")[0] == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == named


def test_a_tampered_adapter_is_found(tiny_run: Path, tmp_path: Path, said: Said) -> None:
    run, folder = tiny_run, tmp_path / "adapter"
    assert said("export", run, folder, "--format", "adapter")[0] == 0
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    connector = next(n for n in weights if n.endswith("multi_modal_projector.linear_2.bias"))
    weights[connector] += 0.1
    save_file(weights, path, metadata={"format": "pt"})
    code, out, _ = said("verify-export", folder, run)
    assert code == 1
    assert {"files", "logits"} <= set(failed(out))


def test_where_no_adapters_were_trained_none_are_exported(
    tiny_run: Path, tmp_path: Path, said: Said
) -> None:
    aligned = tiny_run / "align" / "model"
    text = refused(said, "export", aligned, tmp_path / "new", "--format", "adapter")
    assert "has no adapters, for none were trained in an align stage: give a tune stage" in text
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def v1_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in LLaVA's own way of talking, on an LLM whose tokenizer is Llama's in small."""
    from aimv2_mllm.runs.run import run

    folder = tmp_path_factory.mktemp("v1")
    words = [f"stages.align.llm={make_llm(folder / 'llm')}"]
    for stage in ("align", "tune"):
        words += [f"stages.{stage}.data.template=v1", f"stages.{stage}.data.max_tokens=600"]
    return run(tiny_recipe(folder / "run", *words), lambda _: None)


@pytest.fixture
def in_llava(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA answers in this process, in which all is imported already."""

    def ended(command: list[str], out: Path) -> dict[str, Any]:
        llava_answers.main(command[3], str(out))
        return dict(json.loads(out.read_text()))

    monkeypatch.setattr(verify, "ended", ended)


@pytest.mark.usefixtures("in_llava")
def test_llava_says_what_the_run_says_wherever_the_folder_is(
    v1_run: Path, tmp_path: Path, said: Said
) -> None:
    folder = tmp_path / "llava-mine"
    assert said("export", v1_run, folder, "--format", "original-llava")[0] == 0
    moved = folder.rename(tmp_path / "elsewhere-llava")
    code, out, _ = said("verify-export", moved, v1_run)
    assert code == 0, out
    assert "as LlavaLlamaForCausalLM on transformers" in out
    assert "ok    LLaVA's own prompt: the tokens of the reference" in out
    path = moved / "vision_tower" / "model.safetensors"
    weights = load_file(path)
    weights["trunk.post_trunk_norm.weight"] += 1
    save_file(weights, path, metadata={"format": "pt"})
    code, out, _ = said("verify-export", moved)
    assert code == 1
    assert {"files", "logits"} <= set(failed(out))
    assert "vision_tower/model.safetensors was changed" in out
    shutil.rmtree(moved / "vision_tower")
    code, out, _ = said("verify-export", moved)
    assert code == 1
    assert "vision_tower is not a folder" in out


def test_merges_are_written_as_tokenizers_of_any_age_read_them(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = shutil.copytree(TINY_LLM, tmp_path / "llm") / "tokenizer.json"
    before = Tokenizer.from_file(str(path)).encode("Which digit is red?").ids
    assert original._write_merges(path.parent) == []
    raw = json.loads(path.read_text())
    assert {type(merge) for merge in raw["model"]["merges"]} == {str}
    assert Tokenizer.from_file(str(path)).encode("Which digit is red?").ids == before
    assert original._write_merges(path.parent) == []
    raw["model"]["merges"] = [["a b", "c"]]  # which has no older form
    path.write_text(json.dumps(raw))
    [why] = original._write_merges(path.parent)
    assert "merges of tokens with blanks" in why
    assert json.loads(path.read_text()) == raw


def test_every_tensor_gets_llavas_name_and_the_head_its_own(v1_run: Path, tiny_run: Path) -> None:
    tied = talking(str(tiny_run))
    state = renamed(load_file(tied.folder / "model.safetensors"))
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert sum("mm_projector" in name for name in state) == 4
    assert not any("vision" in name for name in state)
    config = llava_config(talking(str(v1_run)))
    assert config["tie_word_embeddings"] is False
    assert config["image_aspect_ratio"] == "pad"
    assert config["mm_vision_tower"] == "aimv2:./vision_tower"


def test_what_llava_cannot_express_is_refused(
    v1_run: Path, tiny_run: Path, tmp_path: Path, said: Said
) -> None:
    words = ("--format", "original-llava")
    text = refused(said, "export", tiny_run, tmp_path / "llava", *words)
    assert "LLaVA has no such chat template" in text
    text = refused(said, "export", v1_run, tmp_path / "mine", *words)
    assert "let it have llava in it, and no lora or mistral or mpt" in text
    for name in ("llava-lora", "llava-mistral", "llava-mpt"):
        refused(said, "export", v1_run, tmp_path / name, *words)
    folder = shutil.copytree(v1_run / "tune" / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for key, part, why in (
        ("text_config", {"model_type": "qwen3"}, "its LLM is a qwen3, and LLaVA has llama and"),
        ("vision_config", {"tie_last_hidden_states": False}, "is not read after its last norm"),
    ):
        changed = {**config, key: {**config[key], **part}}
        (folder / "config.json").write_text(json.dumps(changed))
        assert why in refused(said, "export", folder, tmp_path / "llava", *words)
    assert not (tmp_path / "llava").exists()
