"""What only says how a model is trained changes neither its names nor what is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from torch import Tensor

from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.strategies import blocks, give_back, place
from aimv2_mllm.place import Place
from aimv2_mllm.stages.job import Job
from aimv2_mllm.stages.table import STAGES


def built(tiny_run: Path, stage: str, **changes: Any) -> tuple[Job, Any]:
    recipe = tiny_recipe(tiny_run)
    torch.manual_seed(0)
    config = recipe.stages[stage].train.model_copy(update=changes)
    return STAGES[recipe.stages[stage].kind].build(
        recipe.stages[stage], Place(recipe, tiny_run)
    ), config


def gradients(tiny_run: Path, stage: str, **changes: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of the first step and the gradient of what the stage trains."""
    job, config = built(tiny_run, stage, device="cpu", **changes)
    placed = place(job.model.train(), config, Ranks())
    batch = job.batches(0)[0]
    total = job.objective(placed.call, batch, job.objective.targets(batch)).total
    total.backward()
    return total.item(), {n: p.grad for named in job.parts.values() for n, p in named}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "align", "tune"])
def test_activations_computed_twice_give_the_same_gradients(tiny_run: Path, stage: str) -> None:
    loss, plain = gradients(tiny_run, stage)
    other_loss, twice = gradients(tiny_run, stage, activation_checkpointing=True)
    assert loss == other_loss
    assert plain.keys() == twice.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, twice[name]), name


@pytest.mark.slow
def test_fewer_activations_are_kept(tiny_run: Path) -> None:
    def kept(**changes: Any) -> int:
        job, config = built(tiny_run, "pretrain", device="cpu", **changes)
        placed, sizes = place(job.model.train(), config, Ranks()), list[int]()
        batch = job.batches(0)[0]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (sizes.append(tensor.nbytes), tensor)[1], lambda tensor: tensor
        ):
            job.objective(placed.call, batch, job.objective.targets(batch))
        return sum(sizes)

    assert kept(activation_checkpointing=True) < 0.3 * kept()


@pytest.mark.slow
def test_compiled_blocks_keep_their_names_and_their_results(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.compile
    # The tracing is ours to get right; what the compiler makes of it takes it minutes on a CPU.
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend="eager"))
    loss, plain = gradients(tiny_run, "pretrain")
    other_loss, compiled = gradients(
        tiny_run, "pretrain", compile=True, activation_checkpointing=True
    )
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, compiled[name], rtol=1e-4, atol=1e-6)


def test_what_is_given_back_is_as_it_was_given(tiny_run: Path) -> None:
    job, config = built(tiny_run, "pretrain", activation_checkpointing=True, device="cpu")
    before = {name: id(p) for name, p in job.model.named_parameters()}
    placed = place(job.model, config, Ranks())
    assert all("forward" in vars(block) for block in blocks(job.model))
    give_back(placed, job.model, Ranks())
    assert not any("forward" in vars(block) for block in blocks(job.model))
    assert {name: id(p) for name, p in job.model.named_parameters()} == before


def test_blocks_are_those_of_every_stack(tiny_run: Path) -> None:
    model = built(tiny_run, "pretrain")[0].model
    assert blocks(model) == [*model.encoder.trunk.blocks, *model.blocks]
