"""The areas of native-resolution training: their distribution, and what every grid keeps to."""

import math

import numpy as np
import pytest

from aimv2_mllm.data.pairs.areas import BLOCK, Areas, grid
from aimv2_mllm.stages.table import STAGES

LEAST, MOST = 128, 4096


def paper(num_patches: int = 8192, key: int = 3) -> Areas:
    return Areas(LEAST, MOST, num_patches, key)


def test_areas_are_powers_of_two_of_a_cut_normal_between_seven_and_twelve() -> None:
    areas = paper()
    exponents = np.log2([areas.mini_batch(number).area for number in range(2 * BLOCK)])
    assert exponents.min() == pytest.approx(7, abs=0.02)
    assert exponents.max() == pytest.approx(12, abs=0.02)
    assert exponents.mean() == pytest.approx(9.5, abs=0.01)
    # A unit normal cut at -1 and 1: variance 1 - 2 φ(1) / (2 Φ(1) - 1), here on 2.5 times the line.
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * density / math.erf(1 / math.sqrt(2))
    assert exponents.std() == pytest.approx(2.5 * math.sqrt(variance), abs=0.01)
    # A uniform draw would have half of its values in the middle half.
    inner = np.mean(abs(exponents - 9.5) < 1.25)
    expected = math.erf(0.5 / math.sqrt(2)) / math.erf(1 / math.sqrt(2))
    assert inner == pytest.approx(expected, abs=0.005)


def test_neighbours_are_of_unrelated_areas_and_every_block_has_an_order_of_its_own() -> None:
    areas = paper()
    exponents = np.log2([areas.mini_batch(number).area for number in range(2 * BLOCK)])
    for first, second in (
        (exponents[:-1], exponents[1:]),
        (exponents[:BLOCK], exponents[BLOCK:]),
    ):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert sorted(exponents[:BLOCK]) == sorted(exponents[BLOCK:])


def test_every_sample_belongs_to_one_mini_batch_and_none_is_left_out() -> None:
    areas, first = paper(), 0
    for number in range(BLOCK + 100):
        made = areas.mini_batch(number)
        assert (made.first, made.size) == (first, 8192 // made.area)
        first += made.size


def test_a_mini_batch_is_known_without_those_before_it() -> None:
    areas = paper()
    there = [areas.mini_batch(number) for number in (0, 5, BLOCK, 7 * BLOCK + 3, 10**9)]
    back = [paper().mini_batch(number) for number in (10**9, 7 * BLOCK + 3, BLOCK, 5, 0)]
    assert there == back[::-1]
    assert paper(key=4).mini_batch(5) != there[1]


def test_the_number_of_patches_in_a_mini_batch_is_constant_but_for_a_rest() -> None:
    areas = paper(4096)
    for number in range(500):
        area, _, size = areas.mini_batch(number)
        assert 0 <= 4096 - size * area < area


def test_micro_batches_of_all_areas_are_of_a_size_so_that_their_stage_is_even() -> None:
    random, areas = np.random.default_rng(3), paper(16_384)  # 64 squares of 224 px
    shares = []
    for number in range(300):
        area, _, size = areas.mini_batch(number)
        ratios = 2 ** random.uniform(-1, 1, size)
        patches = sum(math.prod(grid(round(1000 * ratio), 1000, area)) for ratio in ratios)
        shares.append(patches / 16_384)
    assert 0.7 < min(shares) < max(shares) <= 1
    assert STAGES["pretrain"].is_even


def test_every_picture_fits_its_area() -> None:
    generator, areas = np.random.default_rng(1), paper()
    for number in range(3_000):
        height, width = (int(2 ** generator.uniform(0, 13)) for _ in range(2))
        area = areas.mini_batch(number).area
        rows, columns = grid(height, width, area)
        assert 4 <= rows * columns <= area, (height, width, area)


def test_of_the_smallest_area_that_a_recipe_may_name_a_patch_is_left_to_predict() -> None:
    assert min(math.prod(grid(height, 1000, 6)) for height in range(20, 5000)) == 2
    assert math.prod(grid(1300, 1000, 5)) == 1


def test_the_aspect_ratio_is_kept_as_far_as_whole_patches_allow() -> None:
    generator, areas = np.random.default_rng(2), paper()
    for number in range(3_000):
        ratio, area = 2 ** generator.uniform(-2, 2), areas.mini_batch(number).area
        rows, columns = grid(round(10_000 * ratio), 10_000, area)
        short, long = sorted([rows, columns])
        assert abs(math.log(rows / columns / ratio)) < 1.05 / long, (ratio, area)
        assert rows * columns > area * (1 - 2.5 / short), (ratio, area)


def test_turning_a_picture_turns_its_grid() -> None:
    assert grid(480, 640, 1024) == (27, 36)
    assert grid(640, 480, 1024) == (36, 27)
    assert grid(224, 224, 256) == (16, 16)


def test_a_picture_too_long_for_its_area_becomes_a_row_of_patches() -> None:
    assert grid(1, 5000, 128) == (1, 128)
    assert grid(5000, 1, 4096) == (4096, 1)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 3 pixels"):
        grid(0, 3, 256)
