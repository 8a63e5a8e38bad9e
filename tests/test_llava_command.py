"""What `aimv2-llava` says before anything runs: one line for every mistake, with what to type."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llava_world import make_world

from aimv2_mllm.errors import UsageError
from aimv2_mllm.towers import llava
from aimv2_mllm.towers.llava_command import VERBS, main
from aimv2_mllm.towers.llava_flags import check_flags, check_model, read_flags
from aimv2_mllm.towers.llava_training import NON_LORA, install


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llava.install()
    return make_world(tmp_path_factory.mktemp("llava") / "world")


def flags(world: Path, **changes: object) -> list[str]:
    given = {
        "model_name_or_path": world / "llm",
        "data_path": world / "data/data.json",
        "image_folder": world / "data/images",
        "vision_tower": f"aimv2:{world / 'aimv2'}",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,
        "output_dir": world / "llava-out",
        "use_cpu": True,
        **changes,
    }
    pairs = [(key, value) for key, value in given.items() if value is not None]
    return [word for key, value in pairs for word in (f"--{key}", str(value))]


# An environment without llava.
ABSENT = """
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name == "llava":
            raise ModuleNotFoundError("No module named 'llava'", name="llava")
sys.meta_path.insert(0, Absent())
"""


def refusal(world: Path, **changes: object) -> str:
    """What the flags with `changes` are refused for."""
    with pytest.raises(UsageError) as caught:
        check_flags(read_flags(install(), flags(world, **changes)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sound_flags_pass(world: Path) -> None:
    for connector in (
        "linear",
        "mlp3x_gelu",
        "pixel_shuffle",
        "average_pool:factor=4",
        "aimv2:mlp",
    ):
        check_flags(read_flags(install(), flags(world, mm_projector_type=connector)))
    check_flags(read_flags(install(), flags(world, vision_tower=f"hf:{world / 'siglip'}")))
    check_flags(read_flags(install(), flags(world, vision_tower=str(world / "clip"))))


def test_an_aimv2_folder_without_the_prefix_is_refused(world: Path) -> None:
    said = refusal(world, vision_tower=world / "aimv2")
    assert f"type aimv2:{world / 'aimv2'}" in said
    assert "LLaVA would build another model of it" in said
    assert "type aimv2:apple/aimv2-" in refusal(world, vision_tower="apple/aimv2-large-patch14-224")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_tower": None}, "there is no --vision_tower: give aimv2:FOLDER_OR_HUB_ID or hf:"),
        ({"vision_tower": "hff:WORLD/clip"}, "hff:; did you mean hf. Type hf:"),
        ({"vision_tower": "aimv22:WORLD/aimv2"}, "aimv22:; did you mean aimv2. Type aimv2:"),
        ({"vision_tower": "WORLD/siglip"}, "is a siglip_vision_model, .* type hf:"),
        ({"vision_tower": "aimv2:WORLD/gone"}, "gone is not a folder"),
        ({"vision_tower": "aimv2:WORLD/aimv2?image_size=57"}, "give 56 or 70"),
        ({"vision_tower": "aimv2:WORLD/clip"}, "is not an AIMv2 encoder's"),
        ({"mm_vision_select_layer": 9}, "layer 9 is asked of .* which has 3"),
        ({"mm_projector_type": "pixelshuffle"}, "did you mean pixel_shuffle"),
        ({"mm_projector_type": "pixel_shuffle:factor=3"}, "not 4 x 4: factors .* are 1, 2, 4"),
        ({"mm_projector_type": "c_abstractor"}, "12 x 12 serves .* not 4 x 4"),
        ({"mm_projector_type": "pixel_shuffle:factor"}, "'factor' is no option=NUMBER"),
        ({"mm_projector_type": "pixel_shuffle:side=2"}, "has no option 'side'; it takes factor"),
        (
            {
                "mm_projector_type": "resampler:num_queries=5,num_heads=4",
                "mm_patch_merge_type": "spatial_unpad",
            },
            "lays tokens on a square grid.* flat",
        ),
        (
            {"pretrain_mm_mlp_adapter": "WORLD/pixel_shuffle.bin"},
            "is of another projector or tower: 0.weight is missing in it and \\(32, 24\\)",
        ),
        ({"pretrain_mm_mlp_adapter": "WORLD/gone.bin"}, "gone.bin, which is no file"),
        ({"pretrain_mm_mlp_adapter": "WORLD/data/data.json"}, "is no mm_projector.bin"),
        ({"data_path": "WORLD/gone.json"}, "--data_path is .*gone.json, which is not there"),
        ({"image_folder": "WORLD/gone"}, "--image_folder is .*gone, which is not there"),
        ({"output_dir": "WORLD/out"}, "let it contain llava"),
        ({"lora_enable": True}, "let it contain llava and lora"),
        ({"mm_vision_tower_lr": 1e-5}, "needs --unfreeze_mm_vision_tower True"),
        (
            {"unfreeze_mm_vision_tower": True, "tune_mm_mlp_adapter": True},
            "a tower trained with it is lost",
        ),
        ({"unfreeze_mm_vision_tower": True, "fsdp": "full_shard"}, "hides the tower"),
        ({"model_name_or_path": "WORLD/data"}, "has no config.json: give the folder of an LLM"),
        ({"mm_projecter_type": "mlp"}, "no flag --mm_projecter_type; did you mean --mm_projector_"),
        ({"bits": "many"}, "bits"),
    ],
)
def test_wrong_flags_are_refused(world: Path, changes: dict[str, object], said: str) -> None:
    here = {
        key: value.replace("WORLD", str(world)) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    found = refusal(world, **here)
    assert re.search(said, found), found


def test_a_projector_of_another_width_is_refused(world: Path, tmp_path: Path) -> None:
    state = torch.load(world / "mlp2x_gelu.bin", weights_only=True)
    state["model.mm_projector.0.weight"] = torch.zeros(32, 40)
    torch.save(state, tmp_path / "mm_projector.bin")
    said = refusal(world, pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin")
    assert "0.weight is (32, 40) in it and (32, 24) in mlp2x_gelu" in said


def test_a_projector_stage_is_not_begun_where_llava_could_not_go_on(
    world: Path, tmp_path: Path
) -> None:
    (tmp_path / "llava-out/checkpoint-3").mkdir(parents=True)
    said = refusal(world, tune_mm_mlp_adapter=True, output_dir=tmp_path / "llava-out")
    assert "holds checkpoints of a projector stage" in said


def test_another_tower_than_the_checkpoints_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "llm", tmp_path / "llava-m")
    config = json.loads((tmp_path / "llava-m/config.json").read_text())
    config["mm_vision_tower"] = "aimv2:/elsewhere"
    (tmp_path / "llava-m/config.json").write_text(json.dumps(config))
    said = refusal(world, model_name_or_path=tmp_path / "llava-m")
    assert "has aimv2:/elsewhere, which LLaVA would keep" in said


def test_a_folder_that_llava_would_take_for_something_else_is_refused(
    world: Path, tmp_path: Path
) -> None:
    def folder(name: str, *files: str) -> str:
        path = tmp_path / name
        path.mkdir()
        for file in files:
            (path / file).touch()
        return str(path)

    whole = folder("llava-whole", "model.safetensors")
    adapter = folder("llava-lora", "adapter_config.json", NON_LORA)
    projector = folder("llava-pre", "mm_projector.bin")
    check_model(whole, None)
    check_model(adapter, "llm")
    check_model(projector, "llm")
    check_model("liuhaotian/llava-v1.5-7b", None)
    for path, base, said in (
        (folder("plain", "model.safetensors"), None, "no llava in it: rename it"),
        (folder("llava-a", "adapter_config.json"), "llm", "by the word lora: rename"),
        (adapter, None, "holds an adapter: give --model-base LLM"),
        (projector, None, "holds no LLM: give --model-base LLM"),
        (whole, "llm", "leave out --model-base"),
        (str(tmp_path / "gone"), None, "is not a folder"),
    ):
        with pytest.raises(UsageError, match=said):
            check_model(path, base)


def test_the_command_ends_in_one_line(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)  # it is not there
    for words, said in (
        (["tarin"], "unknown verb 'tarin'.*did you mean train"),
        (["eval"], "eval needs the name of a script"),
        (["eval", "model_vqaa"], "there is no script model_vqaa in llava.eval"),
        (["chat", "--model-path", "/gone"], "/gone is not a folder"),
        (["worker", "--model-path", "a/llava"], "needs fastapi: pip install fastapi"),
        (["train", *flags(world, vision_tower=world / "aimv2")], "type aimv2:"),
        (["doctor", *flags(world, vision_tower=world / "aimv2")], "type aimv2:"),
    ):
        assert main(words) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("aimv2-llava: ")
        assert re.search(said, line), line


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in VERBS)


@pytest.mark.parametrize(
    ("package", "said"),
    [
        (None, "there is no llava here: pip install"),
        ("raise ImportError('no such thing')", "cannot be imported (no such thing)"),
        ("class LlavaMetaForCausalLM: ...\ndef build_vision_resampler(): ...", "LLaVA-NeXT?"),
        ("other = 1", "is not LLaVA but another of that name"),
        (
            "class LlavaMetaForCausalLM:\n"
            "    def prepare_inputs_labels_for_multimodal(self, input_ids): ...",
            "older than 1.2",
        ),
    ],
)
def test_a_host_that_is_none_is_told_of(tmp_path: Path, package: str | None, said: str) -> None:
    code = ABSENT if package is None else ""
    if package is not None:
        for folder in ("llava", "llava/model", "llava/model/language_model"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "__init__.py").touch()
        (tmp_path / "llava/model/language_model/llava_llama.py").touch()
        (tmp_path / "llava/model/llava_arch.py").write_text(package)
    code += "from aimv2_mllm.towers.llava_command import main; raise SystemExit(main(['train']))"
    path = f"{tmp_path}:{Path(__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert said in line


def test_installing_twice_wraps_once(world: Path) -> None:
    builder = importlib.import_module("llava.model.multimodal_encoder.builder")
    train = install()
    before = builder.build_vision_tower, train.find_all_linear_names, train.TrainingArguments
    llava.install()
    assert install() is train
    assert before == (
        builder.build_vision_tower,
        train.find_all_linear_names,
        train.TrainingArguments,
    )
