"""The order of samples: every row once an epoch, shares as weighted, nothing but (seed, number)."""

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from aimv2_mllm.data.order import BLOCK, WINDOW, EpochOrder, Mixture, mixed, permuted, quotas
from aimv2_mllm.errors import UsageError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_every_position_goes_to_another_place(size: int, key: int) -> None:
    assert sorted(permuted(np.arange(size), size, key)) == list(range(size))


def test_one_position_goes_where_it_goes_among_all() -> None:
    whole = permuted(np.arange(1000), 1000, 7)
    assert [int(permuted(np.array([i]), 1000, 7)[0]) for i in range(0, 1000, 97)] == list(
        whole[::97]
    )


def test_a_huge_range_is_permuted_without_being_laid_out() -> None:
    size = 12 * 10**9
    found = permuted(np.arange(size - 1000, size), size, 3)
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0
    assert found.max() < size
    assert found.std() > size / 5  # a uniform distribution has size / 3.46


def test_keys_give_unlike_orders_that_look_random() -> None:
    size = 5000
    one, other = (permuted(np.arange(size), size, mixed(0, key)) for key in (1, 2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.05
    # Neighbours do not stay together: the steps between them are as those of a random order.
    assert abs(np.abs(np.diff(one)).mean() - size / 3) < size / 30
    assert (one == np.arange(size)).sum() < 8  # about one is expected


@pytest.mark.parametrize("groups", [[7], [3, 0, 4], [5] * 20, [1] * 40, [100, 1, 1, 30]])
def test_an_epoch_has_every_row_once_and_the_next_another_order(groups: list[int]) -> None:
    order = EpochOrder(groups, key=5)
    rows = sum(groups)
    epochs = [[order.row(epoch * rows + i) for i in range(rows)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows))
    assert epochs[0] != epochs[1] != epochs[2]


def test_only_a_window_of_shards_is_read_at_a_time() -> None:
    order = EpochOrder([10] * 4 * WINDOW, key=1)
    for window in range(4):
        places = range(window * 10 * WINDOW, (window + 1) * 10 * WINDOW)
        shards = [order.row(place) // 10 for place in places]
        assert len(set(shards)) == WINDOW
        # and they are mixed, not read one after the other
        assert len(set(shards[:10])) > 3


def test_rows_can_be_asked_for_in_any_order_and_from_another_process() -> None:
    order = EpochOrder([30, 20, 50], key=9)
    forwards = [order.row(i) for i in range(250)]
    again = pickle.loads(pickle.dumps(order))
    assert [again.row(i) for i in reversed(range(250))] == forwards[::-1]


def test_shares_are_exact_in_every_block() -> None:
    mixture = Mixture([0.6, 0.3, 0.1], key=3)
    for block in (0, 5):
        turns = [mixture.turn(block * BLOCK + slot) for slot in range(BLOCK)]
        counts = Counter(source for source, _ in turns)
        assert [counts[source] for source in range(3)] == [39322, 19661, 6553]
        for source in range(3):
            places = [place for turn, place in turns if turn == source]
            begin = block * counts[source]
            assert places == list(range(begin, begin + counts[source]))


def test_shares_hold_early_too_within_chance() -> None:
    mixture = Mixture([3, 1], key=4)
    for start in (0, 20_000, BLOCK - 500):  # the last one crosses into the next block
        share = np.mean([mixture.turn(start + i)[0] == 0 for i in range(2000)])
        assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5


def test_the_turns_of_a_source_are_spread_and_differ_by_key() -> None:
    one, other = ([Mixture([1, 1], key=k).turn(i)[0] for i in range(400)] for k in (0, 1))
    assert one != other
    assert 150 < sum(a != b for a, b in pairwise(one)) < 250


def test_a_single_source_has_every_turn() -> None:
    mixture = Mixture([0.25], key=1)
    assert [mixture.turn(i) for i in (0, 5, BLOCK * 3 + 1)] == [(0, 0), (0, 5), (0, 3 * BLOCK + 1)]


def test_a_mixture_survives_the_way_to_a_worker() -> None:
    mixture = Mixture([1, 2, 4], key=6)
    again = pickle.loads(pickle.dumps(mixture))
    numbers = [*range(50), BLOCK + 3]
    assert [again.turn(i) for i in numbers] == [mixture.turn(i) for i in numbers]


def test_quotas_add_up_and_a_share_too_small_is_told() -> None:
    assert sum(quotas([1, 1, 1])) == BLOCK
    with pytest.raises(UsageError, match=r"sources\.1\.weight: is 1e-06"):
        quotas([1, 1e-6])
