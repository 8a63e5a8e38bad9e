"""Two processes whose micro-batches are counted in tokens, one of them without any picture, tune as
one does whose are counted in samples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_distributed import ended, started
from test_talks import llava_row, written
from test_tune_ranks import FEW, tuning
from test_tune_stage import MODES, built, lines, run, start  # noqa: F401 (a fixture)

from aimv2_mllm.data.pairs.batches import Share

WAYS = ("lora", "dora", "nf4", "int8", "llm")
TOKENS = ["train.micro_batch_size=null", "train.micro_batch_tokens=120"]


@pytest.fixture
def sources(tmp_path: Path) -> str:
    """The words for a source of four conversations, which are a step: a long one without a
    picture, and three short ones with."""
    rows = [llava_row("Which digit is red?", f"the {n}", image=f"{n}.jpg") for n in "123"]
    long = llava_row("Say it. " + "red digit " * 20, "the first " * 12)
    source = written(tmp_path, [*rows, long])
    return f"data.sources=[{{kind: llava, file: {source['file']}}}]"


def blind_ranks(folder: Path, base: Path, *words: str) -> list[bool]:
    """Of each of two ranks, whether no picture but blank ones is in its first three steps."""
    job: Any = built(folder, base, *words)
    blank = job.batches.writer.blank().ids.tolist()
    found = []
    for rank in (0, 1):
        batches = replace(job.batches, share=Share(rank, 2))
        made = [batch for step in range(3) for batch in batches(step)]
        assert len(made) == 3  # one a step
        last = [batch["input_ids"][0, -len(blank) :].tolist() == blank for batch in made]
        found.append(all(last) and all(len(batch["pixel_values"]) == 1 for batch in made))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_packed_ranks_of_which_one_sees_nothing_tune_as_one_does(
    tmp_path: Path,
    start: Path,  # noqa: F811
    sources: str,
    strategy: str,
) -> None:
    assert sorted(blind_ranks(tmp_path, start, sources, *TOKENS)) == [False, True]
    how = [sources, *FEW, *TOKENS, f"train.strategy={strategy}"]
    ways = {mode: [*MODES[mode], *how] for mode in WAYS}
    assert ended(started(2, tmp_path, tuning, base=start, runs=ways)) == [0, 0]
    for mode in WAYS:
        run(tmp_path, start, f"alone {mode}", *MODES[mode], sources, *FEW)
        alone = lines(tmp_path / f"alone {mode}")
        for ours, theirs in zip(lines(tmp_path / mode), alone, strict=True):
            assert ours["text"] == pytest.approx(theirs["text"], abs=1e-4)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3, abs=1e-4)
            assert ours["targets_text"] == theirs["targets_text"]
        losses = [line["text"] for line in alone]
        assert len(set(losses)) == len(losses) == 3
