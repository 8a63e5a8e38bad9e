"""Features as colours: like features get like colours, in every run the same."""

import numpy as np
import torch

from aimv2_mllm.evaluation.features import as_colours, enlarged, see


def test_the_first_components_are_the_colours() -> None:
    # Three directions of unlike strength: red, green and blue in this order.
    random = torch.Generator().manual_seed(0)
    shares = torch.rand(200, 3, generator=random)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=random)).Q[:3]
    tokens = (shares * torch.tensor([9.0, 3.0, 1.0]) @ axes).view(2, 100, 8)
    colours = as_colours(tokens, (10, 10)).reshape(-1, 3) / 255
    for channel in range(3):
        alike = np.corrcoef(colours[:, channel], shares[:, channel])[0, 1]
        assert abs(alike) > 0.97
    assert colours.min(0).tolist() == [0, 0, 0]
    assert colours.max(0).tolist() == [1, 1, 1]


def test_signs_do_not_depend_on_the_order_of_pictures_or_a_rounding() -> None:
    tokens = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(1))
    first = as_colours(tokens, (3, 3)).astype(int)
    turned = as_colours(tokens.flip(0) * (1 + 1e-7), (3, 3)).astype(int)[::-1]
    assert np.abs(first - turned).max() <= 1


def test_pictures_that_are_alike_all_over_are_black() -> None:
    assert as_colours(torch.ones(1, 4, 8), (2, 2)).max() == 0


def test_features_of_two_channels_have_no_blue() -> None:
    tokens = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(2))
    assert as_colours(tokens, (2, 2))[..., 2].max() == 0


def test_a_colour_lies_where_its_patch_does() -> None:
    def tower(pixels: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.avg_pool2d(pixels, 14)  # (S, 3, r, c)
        return patches.flatten(2).transpose(1, 2)

    pixels = torch.zeros(1, 3, 28, 42)
    pixels[:, 0, 14:, 28:] = 1
    [seen] = see(tower, pixels)
    assert seen.shape == (28, 42, 3)
    odd = (seen != seen[0, 0]).any(-1)
    assert odd[14:, 28:].all()
    assert odd.sum() == 14 * 14


def test_enlarging_keeps_edges_hard() -> None:
    small = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    large = enlarged(small, 3)
    assert large.shape == (1, 6, 6, 3)
    assert np.array_equal(large[0, ::3, ::3], small[0])
    assert np.array_equal(large[0, 2::3, 2::3], small[0])
