"""The recipes for real data run in miniature, and have the published numbers that they name."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import RECIPES
from corpora import sheet
from test_doctor import tower
from test_talks import llava_row, table

from aimv2_mllm import __main__ as cli
from aimv2_mllm import aimv2_large
from aimv2_mllm.model.llms import load_tokenizer
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.shapes import only_shapes
from aimv2_mllm.model.weights import save_encoder
from aimv2_mllm.recipe.file import load_recipe

LLAVA_STEPS = {"align": (558_128, 256, 1e-3), "tune": (665_298, 128, 2e-4)}


# The LLM of each recipe as the config.json of its hub id has it: class, and (width, inner width,
# blocks, heads, key and value heads, words).
LLMS = {
    "llava15_vicuna7b": ("Llama", (4096, 11008, 32, 32, 32, 32_000)),
    "paper_llama3_8b": ("Llama", (4096, 14336, 32, 32, 8, 128_256)),
    "qwen3_qlora_24gb": ("Qwen3", (4096, 12288, 36, 32, 8, 151_936)),
    "small_laptop": ("Qwen2", (896, 4864, 24, 14, 2, 151_936)),
}
TIED = ("small_laptop",)
# Sizes of LLMs as their names say them, and what a plan finds on the machine that the header names.
PLANNED = {
    "llava15_vicuna7b": (6.74e9, ("a100", "8")),
    "paper_llama3_8b": (8.03e9, ("h100", "8")),
    "qwen3_qlora_24gb": (8.19e9, ("rtx4090", "1")),
    "small_laptop": (0.494e9, ("l4", "1")),
}


@pytest.mark.parametrize("name", LLMS)
def test_a_recipe_says_what_it_takes_and_has_its_tower_on_one_line(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    for word in ("command", "plan", "hardware", "time", "expect", "source"):
        assert f"\n# {word} " in text, word
    assert text.count("\n    tower: ") == 1
    assert f"aimv2-mllm run recipes/{name}.yaml" in text or f"run recipes/{name}.yaml" in text
    assert load_recipe(RECIPES / f"{name}.yaml").name == name


def test_llavas_recipe_goes_once_over_its_rows_with_its_rates() -> None:
    stages = load_recipe(RECIPES / "llava15_vicuna7b.yaml").stages
    for name, (rows, batch, lr) in LLAVA_STEPS.items():
        train = stages[name].train
        assert (train.steps, train.batch_size, train.lr) == (-(-rows // batch), batch, lr)
        assert train.warmup_steps == -(-3 * train.steps // 100)
        assert (train.weight_decay, train.final_lr, train.clip) == (0, 0, 1)
    assert stages["tune"].train.part_lr == {"connector": 2e-5}


def test_the_papers_recipe_has_its_table() -> None:
    train = load_recipe(RECIPES / "paper_llama3_8b.yaml").stages["tune"].train
    assert (train.steps, train.batch_size, train.warmup_steps) == (5000, 128, 250)
    assert (train.lr, train.part_lr, train.final_lr) == (1e-5, {"connector": 8 * 1e-5}, 0)
    assert (train.betas, train.weight_decay, train.clip) == ((0.9, 0.999), 0.01, 1)


def test_the_laptops_recipe_runs_in_miniature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heading = ["image", "question", "answer"]
    rows = [["a.jpg", f"How many are {colour}?", "2"] for colour in ("red", "blue", "green")]
    table(tmp_path / "photos", [heading, *rows])
    tower(tmp_path / "tower")
    words = ["stages.align.llm=tiny_llm", f"stages.align.tower={tmp_path / 'tower'}"]
    for stage in ("align", "tune"):
        words.append(f"stages.{stage}.data.sources.0.folder={tmp_path / 'photos'}")
        words += [f"stages.{stage}.train.{word}" for word in ("steps=3", "warmup_steps=1")]
    output = f"output={tmp_path / 'run'}"
    code = cli.main(["run", str(RECIPES / "small_laptop.yaml"), output, *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert f"chat {tmp_path / 'run'} --image PICTURE" in out
    assert (tmp_path / "run" / "tune" / "model" / "config.json").is_file()


def llm_folder(folder: Path, name: str) -> None:
    """What a plan reads of an LLM: its config, and a tokenizer (the shipped one)."""
    import transformers

    family, (width, inner, blocks, heads, kv_heads, words) = LLMS[name]
    tokenizer = load_tokenizer("tiny_llm")
    if name == "llava15_vicuna7b":  # whose template v1 ends answers so
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.save_pretrained(folder)
    getattr(transformers, f"{family}Config")(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128 if width == 4096 else 64,
        vocab_size=words,
        tie_word_embeddings=name in TIED,
        architectures=[f"{family}ForCausalLM"],
        max_position_embeddings=8192,
    ).save_pretrained(folder)


# qwen3_qlora_24gb, which passes too, takes as long as the others together: 20 s of CPU time.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LLMS if name != "qwen3_qlora_24gb"])
def test_a_recipe_is_planned_at_its_real_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    llm_folder(tmp_path / "llm", name)
    side = 224 if name == "small_laptop" else 336
    with only_shapes():
        save_encoder(aimv2_large(image_size=side), tmp_path / "tower")
    Preprocessing(side).save(tmp_path / "tower")
    (tmp_path / "tower" / "model.safetensors").touch()  # which a plan does not open
    rows = [llava_row("<image>\nWhich digit is red?", "7", image="0.jpg")] * 4
    for place, root in (("LLaVA-Pretrain", "images"), ("mix665k", ".")):
        (tmp_path / place / root).mkdir(parents=True)
        (tmp_path / place / root / "0.jpg").write_bytes(sheet(0, 40)[0])
    (tmp_path / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))
    (tmp_path / "mix665k" / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    table(tmp_path / "photos", [["image", "question", "answer"], ["a.jpg", "How many?", "2"]])
    num_weights, (device, count) = PLANNED[name]
    recipe = RECIPES / f"{name}.yaml"
    stage = next(iter(load_recipe(recipe).stages))
    words = [f"stages.{stage}.tower=./tower", f"stages.{stage}.llm=./llm"]
    words += ["--dry-run", "--accelerator", device, "--devices", count]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 0, 10**13))
    code = cli.main(["run", str(recipe), *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "DOES NOT FIT" not in out
    assert out.endswith("no problem found\n")
    counts = [int(count.replace(",", "")) for count in re.findall(r"(?mi)^  llm +([\d,]+)", out)]
    assert counts == [pytest.approx(num_weights, rel=0.01)] * len(load_recipe(recipe).stages)
    assert out.count("tower           309,") == len(counts)
