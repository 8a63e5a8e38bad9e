"""Patch features as colours: their first three principal components as red, green and blue.

Owns that equal features give equal colours in every run. Refuses to say what a colour means: it is
only like other colours or unlike them, within the pictures that were given together.

Letters in shapes: S pictures, N patches, D width, r and c the rows and columns of the grid.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CUT = 0.01  # of a component's values at either end, which become 0 or 255


def as_colours(tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Patch tokens (S, N, D) as small pictures (S, r, c, 3) uint8, a pixel for each patch.

    The components are those of all patches of all pictures together.
    """
    colours = _stretched(_components(tokens.flatten(0, 1).double(), 3))  # (S * N, 3)
    return colours.view(-1, *grid, 3).numpy()


def see(tower: Callable[[Tensor], Tensor], pixel_values: Tensor) -> np.ndarray:
    """What `tower` makes of pixel_values (S, 3, H, W), as pictures (S, H, W, 3) uint8 of it."""
    with torch.inference_mode():
        tokens = tower(pixel_values)  # (S, N, D)
    height, width = pixel_values.shape[-2:]
    side = math.isqrt(height * width // tokens.shape[1])
    return enlarged(as_colours(tokens, (height // side, width // side)), side)


def enlarged(colours: np.ndarray, side: int) -> np.ndarray:
    """Small pictures (S, r, c, 3) with every pixel made `side` x `side` pixels, hard-edged."""
    return colours.repeat(side, axis=1).repeat(side, axis=2)


def _components(flat: Tensor, count: int) -> Tensor:
    """The first principal components of rows (P, D), each with a sign that does not depend on the
    run: (P, count), zeros where there are fewer."""
    flat = flat - flat.mean(0)
    _, axes = torch.linalg.eigh(flat.T @ flat)  # (D, D), the largest last
    axes = axes[:, -count:].flip(1)
    largest = axes.abs().argmax(0, keepdim=True)  # (1, count)
    axes = axes * axes.gather(0, largest).sign()
    return F.pad(flat @ axes, (0, count - axes.shape[1]))


def _stretched(components: Tensor) -> Tensor:
    """Each component (P, 3) over its own range, but for the ends that `CUT` cuts: uint8."""
    ends = torch.tensor([CUT, 1 - CUT], dtype=components.dtype)
    low, high = torch.unbind(torch.quantile(components, ends, dim=0))  # 2 of (3,)
    shares = (components - low) / (high - low).clamp(min=1e-12)
    return (shares.clamp(0, 1) * 255).round().to(torch.uint8)
