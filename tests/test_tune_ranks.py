"""Two processes tune as one does: adapters, quantised LLMs, whole ones, blocks of the tower."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from test_distributed import ended, said, say, started
from test_tune_stage import MODES, lines, recipe_of, run, start  # noqa: F401 (a fixture)
from torch import nn

from aimv2_mllm.data.pairs.batches import Share
from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.loop import train
from aimv2_mllm.place import Place
from aimv2_mllm.runs.run import run_stage

FEW = ["train.steps=3", "train.micro_batch_size=1"]
TOGETHER = ("connector", "lora", "dora", "nf4", "int8", "tower", "everything")


def tuning(folder: Path, ranks: Ranks, *, base: Path, runs: dict[str, list[str]]) -> None:
    """Tune on this rank in every way of `runs`; where bf16 is asked for, on a processor that is
    told that it multiplies it."""
    here = folder / str(ranks.rank)
    here.mkdir()
    for name, words in runs.items():
        recipe = recipe_of(here, base, "", *words)
        place = Place(recipe, folder / name, Share(ranks.rank, ranks.size))
        with pytest.MonkeyPatch.context() as patch:
            for module in ("precision", "strategies", "loop"):
                patch.setattr(f"aimv2_mllm.engine.{module}.has_bf16", lambda device: True)
            run_stage("tune", recipe.stages["tune"], place, lambda text: None, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_tune_as_one_does(
    tmp_path: Path,
    start: Path,  # noqa: F811
    strategy: str,
) -> None:
    how = [*FEW, f"train.strategy={strategy}"]
    ways = {mode: [*MODES[mode], *how] for mode in TOGETHER}
    ways |= {"bf16": [*MODES["lora"], *how, "train.precision=bf16"]}
    assert ended(started(2, tmp_path, tuning, base=start, runs=ways)) == [0, 0]
    for mode in TOGETHER:
        run(tmp_path, start, f"alone {mode}", *MODES[mode], *FEW)
        alone = [line["text"] for line in lines(tmp_path / f"alone {mode}")]
        assert [line["text"] for line in lines(tmp_path / mode)] == pytest.approx(alone, abs=1e-4)
        assert (tmp_path / mode / "tune" / "model" / "stage.json").is_file()
    # Frozen weights of bfloat16 beside trained ones of float32.
    exact = [line["text"] for line in lines(tmp_path / "lora")]
    half = [line["text"] for line in lines(tmp_path / "bf16")]
    assert half != exact
    assert half == pytest.approx(exact, rel=0.05)


def loading(folder: Path, ranks: Ranks, *, base: Path, runs: dict[str, list[str]]) -> None:
    """As `tuning`; every rank says of how many weights it has numbers before they are sharded."""

    def saying(model: nn.Module, *args: Any, **words: Any) -> Any:
        say(folder, ranks.rank, str(sum(p.numel() for p in model.parameters() if not p.is_meta)))
        return train(model, *args, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aimv2_mllm.runs.run.train", saying)
        tuning(folder, ranks, base=base, runs=runs)


@pytest.mark.slow
def test_what_is_sharded_is_loaded_by_the_first_rank_alone(
    tmp_path: Path,
    start: Path,  # noqa: F811
) -> None:
    how = [*FEW, "train.strategy=fsdp2"]
    ways = {mode: [*MODES[mode], *how] for mode in ("llm", "nf4")}
    assert ended(started(2, tmp_path, loading, base=start, runs=ways)) == [0, 0]
    first, second = ([int(line) for line in said(tmp_path, rank).splitlines()] for rank in (0, 1))
    assert min(first) > 1_000_000
    assert second == [0, first[1]]  # what is quantised is not sharded


@pytest.mark.slow
def test_weights_that_the_first_rank_cannot_load_end_the_others(
    tmp_path: Path,
    start: Path,  # noqa: F811
) -> None:
    shutil.copytree(start, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ways = {"llm": [*MODES["llm"], *FEW, "train.strategy=fsdp2"]}
    begun = time.monotonic()
    assert ended(started(2, tmp_path, loading, base=tmp_path / "broken", runs=ways)) == [2, 1]
    assert time.monotonic() - begun < 60
    assert "its weights are damaged or cut off" in said(tmp_path, 0)
    assert "another of the 2 ranks ended" in said(tmp_path, 1)
