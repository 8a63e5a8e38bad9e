"""A stage that is built of shapes alone is that stage, but for the numbers of its weights."""

from pathlib import Path
from typing import Any

import torch
from conftest import RECIPES, tiny_recipe
from test_encoder_stages import lit, pretrain
from test_tune_stage import MODES, recipe_of
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from aimv2_mllm.model.shapes import only_shapes
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.stages.job import Job
from aimv2_mllm.stages.table import STAGES

NATIVE = {"size": "aimv2_nano", "image_size": 56, "native": True, "areas": [9, 36]}
TRAIN = {"steps": 2, "batch_size": 8, "micro_batch_size": 4, "lr": 1e-3}
SHARDED = ("connector", "rslora", "dora", "llm", "tower", "everything")


def tuned(folder: Path, tiny_run: Path, *words: str) -> Recipe:
    return recipe_of(folder, tiny_run / "align" / "model", "out", *words)


def recipes(folder: Path, tiny_run: Path) -> dict[str, Recipe]:
    """A recipe whose last stage is of each kind."""
    whole = tiny_recipe(tiny_run)
    stages = list(whole.stages.items())
    begun = str(tiny_run / "pretrain" / "model")
    packed = ["train.micro_batch_size=null", "train.micro_batch_tokens=400"]
    return {
        "pretrain": whole.model_copy(update={"stages": dict(stages[:1])}),
        "align": whole.model_copy(update={"stages": dict(stages[:2])}),
        "tune": whole,
        "pretrain on": pretrain(folder, start={"encoder": begun, "decoder": begun}).recipe,
        "native": pretrain(folder, encoder=NATIVE, train=TRAIN).recipe,
        "lit": lit(tiny_run, folder).recipe,
        "language": load_recipe(RECIPES / "tiny_llm.yaml", [f"output={folder}"]),
        "packed": tuned(folder, tiny_run, *packed),
        **{
            mode: tuned(folder, tiny_run, *words)
            for mode, words in MODES.items()
            if mode in SHARDED
        },
    }


def facts(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        *((n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()),
        *((n, b.shape, b.dtype) for n, b in model.named_buffers()),
    ]


def parts(job: Job) -> dict[str, list[str]]:
    return {part: [name for name, _ in named] for part, named in job.parts.items()}


def strays(model: nn.Module) -> list[str]:
    """Tensors without numbers that are neither parameters nor buffers."""
    return [
        f"{type(module).__name__}.{name}"
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]


def test_its_parameters_buffers_and_batches_are_the_same(tmp_path: Path, tiny_run: Path) -> None:
    for name, recipe in recipes(tmp_path, tiny_run).items():
        stage, where = list(recipe.stages.values())[-1], Place(recipe, recipe.output)
        job = STAGES[stage.kind].build(stage, where)
        with only_shapes():
            shapes = STAGES[stage.kind].build(stage, where)
        assert all(p.is_meta for p in shapes.model.parameters()), name
        assert facts(shapes.model) == facts(job.model), name
        assert not strays(shapes.model), name
        assert parts(shapes) == parts(job), name
        ours, how = tree_flatten(shapes.batches(1))
        theirs, other_how = tree_flatten(job.batches(1))
        assert how == other_how, name
        for one, other in zip(ours, theirs, strict=True):
            same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
            assert same, name
