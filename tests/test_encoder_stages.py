"""Pre-training from given weights, and LiT beside a frozen encoder."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.lit_weights import load_lit
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.weights import load_encoder, resize_positions
from aimv2_mllm.place import Place
from aimv2_mllm.planning.problems import find_problems
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.runs.run import run
from aimv2_mllm.stages.job import Job
from aimv2_mllm.stages.table import STAGES, check_inputs, inputs

TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-3, "log_every": 1}
DECODER = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_text_tokens": 64,
}


def place(folder: Path, **stage: Any) -> Place:
    """Where a recipe of one stage, called `next`, stands."""
    plain = {"train": TRAIN, "tokenizer": "tiny_llm", **stage}
    recipe = Recipe.model_validate({"name": "go_on", "output": folder, "stages": {"next": plain}})
    return Place(recipe, folder)


def pretrain(folder: Path, image_size: int = 56, **keys: Any) -> Place:
    encoder = {"size": "aimv2_nano", "image_size": image_size}
    plain = {"decoder": DECODER, "encoder": encoder, **keys}
    return place(folder, kind="pretrain", **plain)


def built(where: Place) -> Job:
    stage = where.recipe.stages["next"]
    torch.manual_seed(1)
    return STAGES[stage.kind].build(stage, where)


def test_a_stage_goes_on_from_an_encoder_and_its_decoder(tiny_run: Path, tmp_path: Path) -> None:
    folder = str(tiny_run / "pretrain" / "model")
    again = pretrain(tmp_path, start={"encoder": folder, "decoder": folder})
    assert inputs(again.recipe.stages["next"], again) == {
        "start.encoder": folder,
        "start.decoder": folder,
        "tokenizer": "tiny_llm",
    }
    model: Any = built(again).model
    recipe = tiny_recipe(tiny_run)
    first: Any = STAGES["pretrain"].build(recipe.stages["pretrain"], Place(recipe, tiny_run)).model
    encoder = load_encoder(folder)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor), name
    fresh = [n for n, t in first.state_dict().items() if torch.equal(model.state_dict()[n], t)]
    assert not [name for name in fresh if not name.endswith("norm.weight") and "norm_" not in name]
    alone: Any = built(pretrain(tmp_path, start={"encoder": folder})).model
    assert torch.equal(
        alone.encoder.trunk.blocks[0].mlp.fc1.weight, encoder.trunk.blocks[0].mlp.fc1.weight
    )
    assert not torch.equal(alone.patch_head.weight, model.patch_head.weight)


def test_positions_are_resized_for_another_image_size(tiny_run: Path, tmp_path: Path) -> None:
    folder = str(tiny_run / "pretrain" / "model")
    job = built(pretrain(tmp_path, 84, start={"encoder": folder}))
    assert any("its learned positions are resized to 84 px" in note for note in job.data.notes)
    model: Any = job.model
    before = load_encoder(folder).preprocessor.pos_embed
    assert before is not None
    assert torch.equal(model.encoder.preprocessor.pos_embed, resize_positions(before, 6))
    assert job.batches(0)[0]["pixel_values"].shape == (4, 3, 84, 84)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"encoder": {"size": "aimv2_base", "image_size": 56}}, "another encoder than aimv2_base"),
        ({"decoder": {**DECODER, "num_hidden_layers": 3}}, "num_hidden_layers 2 instead of 3"),
        ({"decoder": {**DECODER, "hidden_size": 64}}, "hidden_size 128 instead of 64"),
    ],
)
def test_weights_of_another_size_are_refused(
    tiny_run: Path, tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    folder = str(tiny_run / "pretrain" / "model")
    wrong = pretrain(tmp_path, start={"encoder": folder, "decoder": folder}, **keys)
    with pytest.raises(UsageError, match=words):
        built(wrong)
    # As early as that, and in a plan, where nothing is read.
    with pytest.raises(UsageError, match=f"stage next: .*{words}"):
        check_inputs(wrong)
    [problem] = find_problems(wrong, 1)
    assert words in problem.text


def test_a_start_that_is_not_there_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stage next: "):
        check_inputs(pretrain(tmp_path, start={"encoder": "./nowhere/at/all"}))


def test_what_a_stage_starts_from_is_read_to_its_last_file_before_anything_is_trained(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_run / "pretrain" / "model", tmp_path / "model")
    on = pretrain(tmp_path, start={"encoder": str(folder), "decoder": str(folder)})
    beside = lit(tiny_run, tmp_path, tower=str(folder))
    for place in (on, beside):
        check_inputs(place)
        assert find_problems(place, 1) == []
    cut = (folder / "decoder.safetensors").read_bytes()[:-4]
    (folder / "decoder.safetensors").write_bytes(cut)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"stage next: .*preprocessor_config.json"):
        check_inputs(beside)
    Preprocessing(56).save(folder)
    with pytest.raises(UsageError, match=r"stage next: .* is no decoder of a pretrain stage"):
        check_inputs(on)
    [problem] = find_problems(on, 1)
    assert problem.key == "stages.next.start.decoder"


def test_full_prefixes_hide_nothing_and_uniform_ones_something(tmp_path: Path) -> None:
    full = built(pretrain(tmp_path, alpha=0.0, prefix="full"))
    assert full.batches(0)[0]["prefix_length"].tolist() == [16] * 4
    assert max(built(pretrain(tmp_path)).batches(0)[0]["prefix_length"].tolist()) < 16


def lit(tiny_run: Path, folder: Path, **keys: Any) -> Place:
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 65,
    }
    keys = {"tower": str(tiny_run / "pretrain" / "model"), **keys}
    return place(folder, kind="lit", text=text, projection_dim=24, **keys)


def test_lit_trains_all_but_the_tower(tiny_run: Path, tmp_path: Path) -> None:
    job = built(lit(tiny_run, tmp_path))
    table = {(part, trained) for part, _, trained in job.table()}
    assert table == {("tower", False), ("head", True), ("text", True)}
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    batch = job.batches(0)[0]
    job.objective(job.model, batch, job.objective.targets(batch)).total.backward()
    torch.optim.AdamW([p for p in job.model.parameters() if p.requires_grad]).step()
    moved = {n for n, p in job.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for named in job.parts.values() for name, _ in named}


def test_a_lit_run_learns_which_caption_belongs_to_which_sheet(
    tiny_run: Path, tmp_path: Path
) -> None:
    train = {**TRAIN, "steps": 120, "batch_size": 8, "lr": 2e-3, "log_every": 20}
    where = lit(tiny_run, tmp_path, train=train)
    run(where.recipe, lambda line: None)
    lines = (tmp_path / "next" / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["total"] for line in (lines[0], lines[-1]))
    assert last < min(first, math.log(8)) - 0.3  # of eight, by chance: log 8
    model = load_lit(tmp_path / "next" / "model")
    tower = load_encoder(tiny_run / "pretrain" / "model").state_dict()
    assert all(torch.equal(model.image_encoder.state_dict()[n], t) for n, t in tower.items())
    job = built(where)
    batch = job.batches(500)[0]  # which it has not been trained on
    with torch.no_grad():
        loss = job.objective(model, batch, {"pairs": 8})
    assert loss.total < math.log(8) - 0.2


def test_what_a_lit_run_contrasts_within_is_part_of_it() -> None:
    from aimv2_mllm.recipe.schema import deciding

    for kind, counts in (("lit", True), ("pretrain", False)):
        small, large = ({"kind": kind, "train": {"micro_batch_size": n}} for n in (4, 8))
        assert (deciding(small) != deciding(large)) == counts
