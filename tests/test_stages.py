"""What each stage trains, proved by what moved, and what its result is to others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPES, tiny_recipe

from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.answering import Answering
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.towers import Tower
from aimv2_mllm.model.weights import load_encoder
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.stages.job import Job
from aimv2_mllm.stages.table import STAGES


def built(tiny_run: Path, stage: str, *overrides: str) -> Job:
    recipe = tiny_recipe(tiny_run, *overrides)
    torch.manual_seed(0)
    return STAGES[recipe.stages[stage].kind].build(recipe.stages[stage], Place(recipe, tiny_run))


def moved(job: Job) -> set[str]:
    """The names of the parameters that one optimiser step over all of the model's gradients
    changes."""
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    trainable = [p for p in job.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01)
    for _ in range(2):  # LoRA's second matrix is zero at first: its first one moves at step two
        batch = job.batches(0)[0]
        job.objective(job.model, batch, job.objective.targets(batch)).total.backward()
        optimizer.step()
    return {name for name, p in job.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("stage", ["pretrain", "align", "tune"])
def test_what_moves_is_what_the_stage_declares(tiny_run: Path, stage: str) -> None:
    job = built(tiny_run, stage)
    declared = {name for named in job.parts.values() for name, _ in named}
    assert moved(job) == declared


def test_each_stage_trains_the_parts_that_its_name_says(tiny_run: Path) -> None:
    parts = {
        stage: {part for part, _, trained in built(tiny_run, stage).table() if trained}
        for stage in ("pretrain", "align", "tune")
    }
    assert parts == {
        "pretrain": {"encoder", "decoder"},
        "align": {"connector"},
        "tune": {"lora", "connector"},
    }


def test_the_table_counts_every_parameter_once(tiny_run: Path) -> None:
    for stage in ("pretrain", "align", "tune"):
        job = built(tiny_run, stage)
        total = sum(p.numel() for p in job.model.parameters())
        assert sum(count for _, count, _ in job.table()) == total


def test_lora_never_lands_in_the_tower(tiny_run: Path) -> None:
    job = built(tiny_run, "tune", "stages.tune.lora.targets=[q_proj, gate_proj]")
    names = [name for name, _ in job.parts["lora"]]
    assert names
    assert not [name for name in names if "vision_tower" in name]


def test_lora_targets_that_do_not_exist_are_refused(tiny_run: Path) -> None:
    with pytest.raises(UsageError, match="qq_proj"):
        built(tiny_run, "tune", "stages.tune.lora.targets=[qq_proj]")


def pixels(folder: Path) -> torch.Tensor:
    preprocessing = Preprocessing.load(folder)
    sheet = scenes.render(scenes.scene(0, "heldout", 0), preprocessing.image_size)
    return preprocessing.normalise(sheet[None])


@pytest.mark.parametrize("stage", ["align", "tune"])
def test_the_result_is_a_stock_llava_folder_with_the_pretrained_tower(
    tiny_run: Path, stage: str
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tiny_run / stage / "model"
    model: Any
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    encoder = load_encoder(tiny_run / "pretrain" / "model").eval()
    values = pixels(tiny_run / "pretrain" / "model")
    with torch.no_grad():
        ours = encoder(values)
        theirs = model.eval().model.multi_modal_projector(ours)
        features = model.get_image_features(
            pixel_values=values, vision_feature_layer=-1, vision_feature_select_strategy="full"
        )
        features = getattr(features, "pooler_output", features)
    # The connector reads the features after the final norm, and all of them.
    assert torch.allclose(features[0], theirs[0], atol=1e-5)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.num_additional_image_tokens == 0
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=scenes_image(), text=text, return_tensors="pt")
    image_tokens = int((inputs["input_ids"] == model.config.image_token_index).sum())
    assert image_tokens == encoder.config.num_patches


def scenes_image() -> Any:
    from PIL import Image

    return Image.fromarray(scenes.render(scenes.scene(0, "heldout", 0), 224))


def test_the_result_says_what_it_is(tiny_run: Path) -> None:
    for stage in ("pretrain", "align", "tune"):
        folder = tiny_run / stage / "model"
        record = json.loads((folder / "stage.json").read_text())
        assert (record["stage"], record["kind"]) == (stage, stage)
        assert record["files"].keys() == {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and path.name != "stage.json"
        }
        assert record["versions"].keys() >= {"torch", "transformers"}


def test_the_merged_model_answers_as_the_adapted_one_did(tiny_run: Path, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    job = built(tiny_run, "tune", "stages.tune.lora.alpha=64")
    moved(job)
    [batch] = job.batches(0)
    with torch.no_grad():
        before = job.model.eval()(**batch)
        job.save(tmp_path)
        merged = Answering(LlavaForConditionalGeneration.from_pretrained(tmp_path)).eval()
        torch.testing.assert_close(merged(**batch), before, rtol=1e-5, atol=0)


def test_a_language_stage_makes_an_llm_that_an_align_stage_can_take(tmp_path: Path) -> None:
    words = [
        "model.num_hidden_layers=1",
        "train.steps=2",
        "train.batch_size=2",
        "train.warmup_steps=0",
    ]
    overrides = [f"output={tmp_path}", *(f"stages.llm.{word}" for word in words)]
    recipe = load_recipe(RECIPES / "tiny_llm.yaml", overrides)
    job = STAGES["language"].build(recipe.stages["llm"], Place(recipe, tmp_path))
    assert moved(job) == {name for name, _ in job.model.named_parameters()}
    folder = tmp_path / "llm" / "model"
    folder.mkdir(parents=True)
    job.save(folder)
    from aimv2_mllm.model import llms, mllm

    tokenizer = llms.load_tokenizer(str(folder))
    tower = Tower("aimv2", load_tiny_encoder(), Preprocessing(28))
    model = mllm.assemble(tower, llms.load_llm(str(folder)), tokenizer)
    assert model.config.image_token_index == tokenizer.convert_tokens_to_ids("<image>")


def load_tiny_encoder() -> Any:
    from aimv2_mllm.model.encoder import aimv2_nano

    return aimv2_nano(image_size=28)


def test_an_llm_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from aimv2_mllm.model import llms

    folder = shutil.copytree(llms.TINY_LLM, tmp_path / "llm")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        llms.load_llm(str(folder))
    save_file(
        {**tensors, "model.layers.1.mlp.up_proj.weight": lost[:, :3].contiguous()},
        weights,
        metadata={"format": "pt"},
    )
    with pytest.raises(UsageError, match=r"up_proj\.weight has another shape"):
        llms.load_llm(str(folder))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="no causal LLM can be loaded"):
        llms.load_llm(str(folder))


def test_no_llm_or_tokenizer_there_is_one_clear_error(tmp_path: Path) -> None:
    from aimv2_mllm.model import llms

    for load in (llms.load_tokenizer, llms.load_llm):
        with pytest.raises(UsageError, match=str(tmp_path)):
            load(str(tmp_path))
