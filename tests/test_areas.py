"""The areas of native-resolution training: their distribution, and what every grid keeps to."""

import math

import numpy as np
import pytest

from aimv2_mllm.data.areas import MAX_PATCHES, MIN_PATCHES, batch_size, draw_area, grid


def test_areas_are_powers_of_two_of_a_cut_normal_between_seven_and_twelve() -> None:
    generator = np.random.default_rng(0)
    exponents = np.log2([draw_area(generator) for _ in range(20_000)])
    assert exponents.min() == pytest.approx(7, abs=0.02)
    assert exponents.max() == pytest.approx(12, abs=0.02)
    assert exponents.mean() == pytest.approx(9.5, abs=0.03)
    # A unit normal cut at -1 and 1: variance 1 - 2 φ(1) / (2 Φ(1) - 1), here on 2.5 times the line.
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * density / math.erf(1 / math.sqrt(2))
    assert exponents.std() == pytest.approx(2.5 * math.sqrt(variance), abs=0.02)
    # A uniform draw would have half of its values in the middle half.
    inner = np.mean(abs(exponents - 9.5) < 1.25)
    expected = math.erf(0.5 / math.sqrt(2)) / math.erf(1 / math.sqrt(2))
    assert inner == pytest.approx(expected, abs=0.01)


def test_an_area_is_the_generators_alone() -> None:
    first, again = (
        [draw_area(np.random.default_rng([3, step])) for step in range(9)] for _ in range(2)
    )
    assert first == again
    assert len(set(first)) > 1


def test_every_image_fits_its_area_and_the_encoders_limits() -> None:
    generator = np.random.default_rng(1)
    for _ in range(3_000):
        height, width = (int(2 ** generator.uniform(0, 13)) for _ in range(2))
        area = draw_area(generator)
        rows, columns = grid(height, width, area)
        assert MIN_PATCHES <= rows * columns <= area <= MAX_PATCHES, (height, width, area)


def test_the_aspect_ratio_is_kept_as_far_as_whole_patches_allow() -> None:
    generator = np.random.default_rng(2)
    for _ in range(3_000):
        ratio, area = 2 ** generator.uniform(-2, 2), draw_area(generator)
        if area >= 200:  # below, the least number of patches may stretch an image
            rows, columns = grid(round(10_000 * ratio), 10_000, area)
            short, long = sorted([rows, columns])
            assert abs(math.log(rows / columns / ratio)) < 1.05 / long, (ratio, area)
            assert rows * columns > area * (1 - 2.3 / short), (ratio, area)


def test_turning_an_image_turns_its_grid() -> None:
    assert grid(480, 640, 1024) == (27, 36)
    assert grid(640, 480, 1024) == (36, 27)
    assert grid(224, 224, 256) == (16, 16)


def test_an_image_too_long_for_its_area_becomes_a_row_of_patches() -> None:
    assert grid(1, 5000, 128) == (1, 128)
    assert grid(5000, 1, 4096) == (4096, 1)
    assert grid(85, 1, 128) == (112, 1)  # 85 x 1 would be too few


def test_the_number_of_patches_in_a_mini_batch_is_constant() -> None:
    assert [batch_size(area, 8192) for area in (128, 256, 1000, 4096)] == [64, 32, 8, 2]


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="0 x 3 pixels"):
        grid(0, 3, 256)
    with pytest.raises(ValueError, match=r"128\.\.4096 patches, and is 100"):
        grid(9, 9, 100)
    with pytest.raises(ValueError, match="at least 4096, the largest image, and is 4095"):
        batch_size(4096, 4095)
