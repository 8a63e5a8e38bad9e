"""Micro-batches by tokens: every conversation once, within the budget, ranks alike."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aimv2_mllm.data.talks.packing import TalkSize, plan

Drawn = Callable[[np.random.Generator, int], list[TalkSize]]


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """Conversations of the kinds and lengths of `benchmarks/llava_shaped.py`, a picture 576 tokens
    as of a 14-pixel tower at 336."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    from llava_shaped import SHAPES

    def drawn(random: np.random.Generator, count: int) -> list[TalkSize]:
        kinds = random.choice(len(SHAPES), count, p=[share for share, *_ in SHAPES])
        found = []
        for _, turns, question, answers, is_seen in (SHAPES[kind] for kind in kinds):
            asked = random.integers(*question, size=random.integers(*turns, endpoint=True)).sum()
            length = asked + random.integers(*answers, endpoint=True) + (576 if is_seen else 0)
            found.append(TalkSize(int(length), is_seen))
        return found

    return drawn


def weights(talks: list[TalkSize], ranks: list[list[list[int]]], blank: int = 576) -> np.ndarray:
    """Tokens of each micro-batch: (ranks, micro-batches)."""
    return np.array(
        [
            [
                sum(talks[i].length for i in members)
                + (0 if any(talks[i].is_seen for i in members) else blank)
                for members in own
            ]
            for own in ranks
        ]
    )


def in_order(talks: list[TalkSize], num_ranks: int, size: int) -> list[list[list[int]]]:
    """What micro_batch_size does: a piece of the step for each rank, sorted by length."""
    share, found = len(talks) // num_ranks, []
    for first in range(0, len(talks), share):
        own = sorted(range(first, first + share), key=lambda index: talks[index].length)
        found.append([own[i : i + size] for i in range(0, share, size)])
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize("budget", [1000, 2500, 8192, 10**9])
def test_every_conversation_comes_once_and_no_micro_batch_is_above_the_budget(
    num_ranks: int, budget: int, draw: Drawn
) -> None:
    random = np.random.default_rng(num_ranks + budget)
    for _ in range(20):
        talks = draw(random, 64)
        found = plan(talks, num_ranks=num_ranks, budget=budget, blank=576)
        members = [i for own in found for micro in own for i in micro]
        assert sorted(members) == list(range(64))
        assert len(found) == num_ranks
        assert len({len(own) for own in found}) == 1
        tokens = weights(talks, found)
        for rank, own in enumerate(found):
            for number, micro in enumerate(own):
                assert tokens[rank, number] <= budget or len(micro) == 1
                lengths = [talks[i].length for i in micro]
                assert lengths == sorted(lengths)
        assert plan(talks, num_ranks=num_ranks, budget=budget, blank=576) == found


def test_micro_batches_are_as_few_as_will_do() -> None:
    talks = [TalkSize(100)] * 16
    assert [len(own) for own in plan(talks, num_ranks=2, budget=400)] == [2, 2]
    assert [len(own) for own in plan(talks, num_ranks=2, budget=399)] == [3, 3]
    assert [len(own) for own in plan(talks, num_ranks=2, budget=800)] == [1, 1]


def test_what_is_longer_than_the_budget_is_alone() -> None:
    talks = [TalkSize(n) for n in (30, 900, 40, 20, 50, 60)]
    [own] = plan(talks, num_ranks=1, budget=200)
    assert [1] in own
    assert plan([TalkSize(9)] * 4, num_ranks=2, budget=1) == [[[3], [0]], [[2], [1]]]


def test_the_others_are_evened_out_beside_it() -> None:
    talks = [TalkSize(n) for n in (500, 30, 30, 20, 20, 20)]
    [own] = plan(talks, num_ranks=1, budget=60)
    assert own == [[0], [3, 4, 5], [1, 2]]  # and not 30 + 20 + 20 and 30 + 20


def test_a_blank_picture_counts_where_no_other_is() -> None:
    blind, seen = TalkSize(50, is_seen=False), TalkSize(50)
    assert len(plan([blind] * 2, num_ranks=1, budget=100, blank=10)[0]) == 2
    assert len(plan([blind] * 2, num_ranks=1, budget=110, blank=10)[0]) == 1
    assert len(plan([blind, seen], num_ranks=1, budget=100, blank=10)[0]) == 1


def test_ranks_are_alike_where_a_plain_split_is_not(draw: Drawn) -> None:
    """8 ranks, 128 conversations a step: tokens of the heaviest rank by those of the mean one."""
    random = np.random.default_rng(0)
    plain, packed, plain_waits, packed_waits = [], [], [], []
    for _ in range(50):
        talks = draw(random, 128)
        before = weights(talks, in_order(talks, 8, 4))
        after = weights(talks, plan(talks, num_ranks=8, budget=4096, blank=576))
        for tokens, heaviest, waits in (
            (before, plain, plain_waits),
            (after, packed, packed_waits),
        ):
            heaviest.append(tokens.sum(1).max() / tokens.sum(1).mean())
            # Ranks wait for the heaviest of each turn.
            waits.append(tokens.max(0).sum() / tokens.sum(1).mean())
    assert np.mean(packed) < 1.003 < 1.03 < np.mean(plain)
    assert np.mean(packed_waits) < 1.01 < 1.04 < np.mean(plain_waits)
