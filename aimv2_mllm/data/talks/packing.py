"""Which conversations of a step share a micro-batch, where a micro-batch is measured in tokens: a
pure function of their lengths, so that every rank comes to the same plan by itself.

What a step costs is what its slowest rank takes, and ranks wait for each other in every
micro-batch. So all have as many of them, at most of the budget, as few as will do, and of like
weight: the longest conversation first, each goes to the lightest micro-batch of all ranks (LPT;
Graham, 1969), and then the heaviest and the lightest exchange conversations as long as that helps,
since those of one picture are nearly as long. They are dealt out by weight, to and fro.
"""

from collections.abc import Sequence
from heapq import heapreplace
from itertools import product
from typing import NamedTuple

MOST_EXCHANGES = 8  # per micro-batch; LLaVA-shaped steps need 1 to 3


class TalkSize(NamedTuple):
    """What of a conversation a plan must know: its tokens, and whether it has a picture."""

    length: int
    is_seen: bool = True


class _Step(NamedTuple):
    """The conversations of a step, and the tokens that a micro-batch without a picture has more."""

    talks: Sequence[TalkSize]
    blank: int

    def weight(self, members: Sequence[int]) -> int:
        """The tokens of a micro-batch."""
        is_seen = any(self.talks[index].is_seen for index in members)
        return sum(self.talks[i].length for i in members) + (0 if is_seen else self.blank)

    def ascending(self, members: Sequence[int]) -> list[int]:
        """The shortest first; of equal ones the earlier."""
        return sorted(members, key=lambda index: (self.talks[index].length, index))


def plan(
    talks: Sequence[TalkSize], *, num_ranks: int, budget: int, blank: int = 0
) -> list[list[list[int]]]:
    """For each rank its micro-batches, each as the indices of its `talks`, the shortest first.

    A micro-batch has at most `budget` tokens, or one conversation that is longer. Where none of
    its conversations has a picture, it has `blank` tokens more. All ranks have as many, and the
    number of `talks` is a multiple of that of ranks.
    """
    assert talks
    assert len(talks) % num_ranks == 0, (len(talks), num_ranks)
    step = _Step(talks, blank)
    most = len(talks) // num_ranks  # micro-batches of a rank: then each conversation is alone
    least = -(-sum(min(talk.length, budget) for talk in talks) // (budget * num_ranks))
    for count in range(min(least, most), most + 1):
        bins = _spread(step, count * num_ranks)
        _exchange(step, bins)
        if all(step.weight(one) <= budget or len(one) == 1 for one in bins):
            break
    bins.sort(key=step.weight, reverse=True)
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for turn in range(count):
        own = bins[turn * num_ranks : (turn + 1) * num_ranks]
        for rank, one in zip(ranks, own[:: -1 if turn % 2 else 1], strict=True):
            rank.append(step.ascending(one))
    return ranks


def _spread(step: _Step, num_bins: int) -> list[list[int]]:
    """All conversations in so many micro-batches, none of them empty."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    lightest = [(0, number) for number in range(num_bins)]  # a heap
    for index in reversed(step.ascending(range(len(step.talks)))):
        number = lightest[0][1]
        bins[number].append(index)
        heapreplace(lightest, (step.weight(bins[number]), number))
    return bins


def _exchange(step: _Step, bins: list[list[int]]) -> None:
    """Let the heaviest and the lightest exchange one for one, while the heavier of both gets
    lighter by it; one for which there is no such exchange stays as it is."""
    weights = [step.weight(one) for one in bins]
    open_bins = set(range(len(bins)))
    for _ in range(MOST_EXCHANGES * len(bins)):
        if len(open_bins) < 2:
            return
        high = max(open_bins, key=lambda number: (weights[number], number))
        low = min(open_bins, key=lambda number: (weights[number], number))
        found = []
        for i, j in product(range(len(bins[high])), range(len(bins[low]))):
            heavy, light = [*bins[high]], [*bins[low]]
            heavy[i], light[j] = light[j], heavy[i]
            both = step.weight(heavy), step.weight(light)
            found.append((max(both), both, heavy, light))
        best, both, heavy, light = min(found)
        if best >= weights[high]:
            open_bins.remove(high)
            continue
        bins[high], bins[low] = heavy, light
        weights[high], weights[low] = both
