"""Groups, schedule, and the way of AdamW's state through flat tensors."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from aimv2_mllm.engine.optimizer import (
    build_optimizer,
    is_decayed,
    learning_rate,
    restore,
    set_learning_rates,
    training_tensors,
)
from aimv2_mllm.engine.pieces import Stored, to_write, write
from aimv2_mllm.errors import UsageError
from aimv2_mllm.recipe.train import TrainConfig


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(4, 3))
        self.position_embedding = nn.Embedding(4, 3)
        self.words = nn.Embedding(5, 3)
        self.start = nn.Parameter(torch.randn(1, 3))
        self.proj = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = self.pos_embed + self.position_embedding.weight + self.start
        return self.norm(self.proj(x + positions + self.words.weight[:4]))


def tower_parts(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    named = list(model.named_parameters())
    unused = [pair for pair in named if pair[0].startswith("unused")]
    return {"tower": [pair for pair in named if pair not in unused], "spare": unused}


def config(**changes: object) -> TrainConfig:
    values = {"steps": 12, "batch_size": 4, "lr": 1.0, "weight_decay": 0.1}
    return TrainConfig.model_validate({**values, **changes})


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3)).pow(3).sum().backward()
        optimizer.step()


def test_weights_and_words_are_decayed_and_vectors_positions_and_start_are_not() -> None:
    decayed = {name for name, p in Tower().named_parameters() if is_decayed(name, p)}
    assert decayed == {"words.weight", "proj.weight", "unused.weight"}
    assert not is_decayed("decoder.text_positions", nn.Parameter(torch.zeros(3, 2)))


def test_each_part_has_a_decayed_and_an_undecayed_group_that_cover_it_once() -> None:
    model = Tower()
    optimizer = build_optimizer(tower_parts(model), config())
    groups = [(g["part"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert groups == [("tower", 0.1, 2), ("tower", 0.0, 6), ("spare", 0.1, 1), ("spare", 0.0, 1)]
    members = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())


def test_the_settings_of_adamw_are_those_of_the_recipe() -> None:
    settings = config(betas=(0.8, 0.85), eps=1e-5)
    defaults = build_optimizer(tower_parts(Tower()), settings).defaults
    assert (defaults["betas"], defaults["eps"]) == ((0.8, 0.85), 1e-5)


def test_the_schedule_has_the_values_computed_by_hand() -> None:
    schedule = config(lr=1.0, final_lr=0.2, warmup_steps=4, warmup_lr=0.2)
    rates = [learning_rate(step, schedule) for step in (0, 1, 3, 4, 6, 8, 12)]
    # Up from 0.2 by 0.2 a step; then 0.2 + 0.8 * (1 + cos(pi * done)) / 2 at 0, 1/4, 1/2 and 1.
    quarter = 0.2 + 0.4 * (1 + math.sqrt(0.5))
    assert rates == pytest.approx([0.2, 0.4, 0.8, 1.0, quarter, 0.6, 0.2], abs=1e-12)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert learning_rate(0, config(lr=0.5)) == 0.5


def test_a_part_with_its_own_peak_rate_keeps_the_same_curve() -> None:
    settings = config(lr=0.5, part_lr={"spare": 4.0}, warmup_steps=2)
    optimizer = build_optimizer(tower_parts(Tower()), settings)
    assert set_learning_rates(optimizer, 1, settings) == {"tower": 0.25, "spare": 2.0}
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25, 2.0, 2.0]


def test_a_rate_for_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(AssertionError, match="towr"):
        build_optimizer(tower_parts(Tower()), config(part_lr={"towr": 0.1}))


def test_a_parameter_in_two_parts_or_a_part_without_any_is_an_error_of_ours() -> None:
    parts = tower_parts(Tower())
    with pytest.raises(AssertionError, match="tower: pos_embed and again: pos_embed"):
        build_optimizer({**parts, "again": parts["tower"][:1]}, config())
    with pytest.raises(AssertionError, match="empty"):
        build_optimizer({**parts, "empty": []}, config())


def stored(tensors: dict[str, torch.Tensor], folder: Path) -> Stored:
    """`tensors` as they come back from the disk."""
    write(folder / "tensors.safetensors", to_write(tensors, is_first=True))
    return Stored([folder / "tensors.safetensors"])


def test_restored_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tower()
    optimizer = build_optimizer(tower_parts(model), config(lr=0.01))
    take_steps(model, optimizer, range(3))
    saved = stored(training_tensors(model, tower_parts(model), optimizer), tmp_path)
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    torch.manual_seed(1)
    other = Tower()
    fresh = build_optimizer(tower_parts(other), config(lr=0.01))
    restore(other, tower_parts(other), fresh, saved)
    for each, its_optimizer in ((model, optimizer), (other, fresh)):
        take_steps(each, its_optimizer, range(3, 6))
    ours, theirs = (
        training_tensors(m, tower_parts(m), o) for m, o in ((model, optimizer), (other, fresh))
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(saved[name], kept[name]) for name in saved), "trained in what was read"


def test_what_is_saved_is_parts_buffers_and_the_state_of_what_had_gradients() -> None:
    model = Tower()
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    parts = tower_parts(model)
    for _, parameter in parts.pop("spare"):
        parameter.requires_grad_(False)
    parts["tower"].append(("extra", nn.Parameter(torch.zeros(2))))
    optimizer = build_optimizer(parts, config())
    take_steps(model, optimizer, range(1))
    names = set(training_tensors(model, parts, optimizer))
    assert {"model/norm.running_mean", "model/extra", "optimizer/proj.weight/exp_avg_sq"} <= names
    assert not {name for name in names if "unused" in name or "scratch" in name}
    assert "optimizer/extra/step" not in names


def test_a_checkpoint_of_another_shape_or_with_other_names_is_refused(tmp_path: Path) -> None:
    model = Tower()
    parts = tower_parts(model)
    optimizer = build_optimizer(parts, config())
    saved = training_tensors(model, parts, optimizer)
    other = stored({**saved, "model/proj.bias": torch.zeros(3)}, tmp_path)
    with pytest.raises(UsageError, match=r"proj.bias is torch.float32 \(3,\) in the checkpoint"):
        restore(model, parts, optimizer, other)
    with pytest.raises(UsageError, match="not in both checkpoint and model: gate"):
        restore(model, parts, optimizer, stored({**saved, "model/gate": torch.zeros(3)}, tmp_path))
