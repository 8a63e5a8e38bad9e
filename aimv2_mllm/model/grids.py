"""Grids of patches: which a connector can serve, and features as tokens or as planes.

Letters in shapes: B samples, R rows, C columns, N = R * C, D width.
"""

import math
from typing import Any

from torch import Tensor

from ..errors import UsageError, show

Grid = tuple[int, int]  # rows and columns of patches


def demand_grid(features: Tensor, grid: Grid | None) -> Grid:
    """The grid of `features` (B, N, D): `grid` if they fit it, or the square one if it is None."""
    num_patches = features.shape[1]
    if grid is None:
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise UsageError(f"{num_patches} patches are no square grid: give its rows and columns")
        return side, side
    if grid[0] * grid[1] != num_patches:
        raise UsageError(f"{num_patches} patches are no grid of {grid[0]} x {grid[1]}")
    return grid


def fitting_grid(height: int, width: int, most: int, *, unit: int = 1) -> Grid:
    """Rows and columns of at most `most` patches to scale a picture of `height` x `width` pixels
    to, in its aspect ratio as far as whole patches allow; both are multiples of `unit`."""
    ratio, most = max(height, width) / min(height, width), max(1, most // unit**2)
    short = max(1, min(round(math.sqrt(most / ratio)), math.isqrt(most)))
    long = min(round(short * ratio), most // short)
    return (short * unit, long * unit) if height <= width else (long * unit, short * unit)


def divided(grid: Grid, factor: int, connector: str) -> Grid:
    """`grid` by `factor`; UsageError, for `connector`, if it leaves a rest."""
    rows, columns = grid
    if rows % factor or columns % factor:
        fitting = [n for n in range(1, max(grid) + 1) if not rows % n and not columns % n]
        raise UsageError(
            f"connector {connector} with factor {factor} serves grids whose rows and columns are "
            f"multiples of {factor}, not {rows} x {columns}: factors for that grid are "
            f"{', '.join(map(str, fitting))}"
        )
    return rows // factor, columns // factor


def pooled(grid: Grid, target: Grid, connector: str) -> Grid:
    """`target`; UsageError, for `connector`, if `grid` has fewer rows or columns."""
    if grid[0] < target[0] or grid[1] < target[1]:
        raise UsageError(
            f"connector {connector} with target {target[0]} x {target[1]} serves grids of at least "
            f"that many rows and columns, not {grid[0]} x {grid[1]}: give a smaller target"
        )
    return target


def whole(name: str, value: Any) -> int:
    """`value` if it is a whole number of at least 1, else UsageError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, not {show(value)}")
    return value


def sides(name: str, value: int | list[int] | Grid) -> Grid:
    """Rows and columns of `value`, a side or a pair; else UsageError."""
    pair = [*value] if isinstance(value, list | tuple) else [value, value]
    try:
        rows, columns = [whole(name, side) for side in pair]
    except ValueError:
        raise UsageError(
            f"{name} must be one or two whole numbers of at least 1, not {show(value)}"
        ) from None
    return rows, columns


def to_planes(features: Tensor, grid: Grid) -> Tensor:
    """Features (B, N, D) as planes (B, D, R, C)."""
    return features.transpose(1, 2).reshape(len(features), -1, *grid)


def to_tokens(planes: Tensor) -> Tensor:
    """Planes (B, D, R, C) as features (B, N, D)."""
    return planes.flatten(2).transpose(1, 2)
