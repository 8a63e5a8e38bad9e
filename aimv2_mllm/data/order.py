"""Which row of which source is sample number g of a run: a pure function of (seed, g).

Sample j of step s is number g = s * batch_size + j, whoever prepares it, so that ranks, workers,
micro-batches and restarts change nothing. Two functions, both computed where they are needed and
never stored:

*Whose turn*: `Mixture` deals the numbers out in blocks of 65,536, each source a fixed share of
every block at places drawn anew per block; so shares are exact after every block, and how many
samples a source has given before needs no counting from the start.

*Which row*: position p of a source lies in epoch p // rows, and `EpochOrder` gives each epoch every
row once. The order has two levels, for reading is the cost: the groups that lie together (shards)
are permuted, then cut into windows of `WINDOW` neighbours in that order, and the rows of a window
are permuted among themselves. So at any time a run reads from 8 shards only: they fit into the
page cache or the folder of copies, and each remote shard is fetched once an epoch. Rows are
permuted by a keyed Feistel network, which answers for one position without knowing the others.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from aimv2_mllm.errors import UsageError

BLOCK = 65_536  # numbers dealt out at once: the finest share of a source is 1 / BLOCK
WINDOW = 8  # shards read from at a time; with the usual 10,000 rows a shard, 80,000 are mixed
ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: sets the rounds' keys apart


def mixed(*key: int) -> int:
    """A number of 64 bits that is a pure function of `key` and looks random."""
    state = np.random.SeedSequence([part % 2**128 for part in key])
    return int(state.generate_state(1, np.uint64)[0])


def permuted(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where the permutation of [0, size) with that key takes `positions`; int64, same shape.

    A balanced Feistel network over the smallest even number of bits that holds `size`; what falls
    outside walks on until it is inside (fewer than 4 rounds of it on average).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    values = np.asarray(positions).astype(np.uint64)
    keys = [np.uint64((key + number * _GOLDEN) % 2**64) for number in range(1, ROUNDS + 1)]
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_scrambled(right + round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return np.asarray(values, dtype=np.int64)


def _scrambled(values: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64 (Steele, Lea and Flood, 2014); products wrap around at 2^64.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


class EpochOrder:
    """The rows of one source, epoch after epoch; `groups` are how many lie together."""

    def __init__(self, groups: Sequence[int], key: int) -> None:
        self._sizes, self._key = np.asarray(groups, dtype=np.int64), key
        self._starts = np.cumsum(self._sizes) - self._sizes  # the first row of each group
        self.rows = int(self._sizes.sum())
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def row(self, position: int) -> int:
        """The row at `position`, which counts on through the epochs."""
        epoch, place = divmod(position, self.rows)
        order, ends = self._groups_of(epoch)
        # Groups first..last-1 of the order are the window; its rows are permuted together.
        group = int(np.searchsorted(ends, place, side="right"))
        first = group // WINDOW * WINDOW
        last = min(first + WINDOW, len(order))
        begin = int(ends[first - 1]) if first else 0
        size = int(ends[last - 1]) - begin
        key = mixed(self._key, epoch, first)
        inside = begin + int(permuted(np.array([place - begin]), size, key)[0])
        group = int(np.searchsorted(ends, inside, side="right"))
        return int(self._starts[order[group]]) + inside - (int(ends[group - 1]) if group else 0)

    def _groups_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        # -> the groups in the epoch's order, and where each ends in it; the last epoch is kept
        if self._epoch is None or self._epoch[0] != epoch:
            count = len(self._sizes)
            order = permuted(np.arange(count), count, mixed(self._key, epoch))
            self._epoch = (epoch, order, np.cumsum(self._sizes[order]))
        return self._epoch[1:]


class Mixture:
    """Whose turn it is: a source, and its how-manieth sample, for every number of a run."""

    def __init__(self, weights: Sequence[float], key: int) -> None:
        self.quotas, self._key = quotas(weights), key
        self._block = lru_cache(maxsize=2)(self._deal)

    def __reduce__(self) -> tuple[type, tuple[list[int], int]]:
        return Mixture, (self.quotas, self._key)  # quotas are weights too

    def turn(self, number: int) -> tuple[int, int]:
        """The source of sample `number` and the position in that source's own order."""
        if len(self.quotas) == 1:
            return 0, number
        block, slot = divmod(number, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[slot])
        return source, block * self.quotas[source] + int(ranks[slot])

    def counts(self, samples: int) -> list[int]:
        """How many of the first so many samples are of each source."""
        if len(self.quotas) == 1:
            return [samples]
        blocks, slots = divmod(samples, BLOCK)
        rest = np.bincount(self._block(blocks)[0][:slots], minlength=len(self.quotas))
        return [blocks * quota + int(more) for quota, more in zip(self.quotas, rest, strict=True)]

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        # -> for each slot of the block its source, and how many slots before it are that source's
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
        sources = sources[permuted(np.arange(BLOCK), BLOCK, mixed(self._key, block))]
        ranks = np.empty(BLOCK, dtype=np.int64)
        for source, quota in enumerate(self.quotas):
            ranks[sources == source] = np.arange(quota)
        return sources, ranks


def quotas(weights: Sequence[float]) -> list[int]:
    """How many of a block's numbers each source gets; UsageError for one that would get none."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * BLOCK
    counts = np.floor(exact).astype(np.int64)
    # The largest remainders get what rounding down left over; equal ones in the order of sources.
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
    if not counts.all():
        number = int(np.argmin(counts))
        raise UsageError(
            f"data.sources.{number}.weight: is {weights[number]:g}, less than 1 in {BLOCK:,} of all"
            " weights: give it more, or leave the source out"
        )
    return [int(count) for count in counts]
