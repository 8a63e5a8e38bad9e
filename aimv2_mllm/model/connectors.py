"""Connectors: a tower's features (B, N, D) become an LLM's embeddings (B, M, E).

Needs torch and nothing else, so that it can live inside any host. Each connector knows how many
tokens it makes of a grid of patches, and refuses a grid that it cannot serve.

Letters in shapes: B samples, R rows and C columns of patches, N = R * C, M tokens, D and E widths,
f factor, W width inside.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError, nearest
from .grids import Grid, demand_grid, divided, pooled, sides, to_planes, to_tokens, whole
from .layers import ResidualBlock, mlp
from .positions import sincos_positions


class Connector(nn.Module):
    """What stands between a tower and an LLM: `in_features` wide before, `out_features` after."""

    in_features: int
    out_features: int

    def out_grid(self, grid: Grid) -> Grid | None:
        """Rows and columns of the tokens that come of `grid`, or None if they form no grid;
        UsageError for a grid that cannot be served."""
        raise NotImplementedError

    def num_tokens(self, grid: Grid) -> int:
        """How many tokens come of `grid`; UsageError for a grid that cannot be served."""
        rows, columns = self.out_grid(grid) or (0, 0)
        return rows * columns

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Embeddings (B, M, E) of `features` (B, N, D) whose patches lie in raster order on `grid`
        (rows, columns), by default a square one."""
        grid = demand_grid(features, grid)
        self.out_grid(grid)
        return self.connect(features, grid)

    def connect(self, features: Tensor, grid: Grid) -> Tensor:
        """What `forward` returns, of features that fit a `grid` that can be served."""
        raise NotImplementedError


class Linear(nn.Linear, Connector):
    """One linear layer for each patch; its tensors are named as LLaVA's `linear` projector's."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)

    def out_grid(self, grid: Grid) -> Grid:
        return grid

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        return super().forward(features)


class Mlp(Connector):
    """`depth` linear layers with GELU between them, for each patch.

    Its tensors are named as those of LLaVA's `mlp{depth}x_gelu`: "0.weight", "2.weight", ...
    """

    def __init__(self, in_features: int, out_features: int, *, depth: int = 2) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for index, layer in enumerate(mlp(in_features, out_features, depth)):
            self.add_module(str(index), layer)

    def out_grid(self, grid: Grid) -> Grid:
        return grid

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        for layer in self.children():
            features = layer(features)
        return features


class PixelShuffle(Connector):
    """`factor` x `factor` neighbouring patches become one token, by an MLP of `depth` layers.

    The MLP reads the patches of a square one behind the other, in raster order.
    """

    def __init__(
        self, in_features: int, out_features: int, *, factor: int = 2, depth: int = 2
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.factor = whole("factor", factor)
        self.mlp = mlp(in_features * factor * factor, out_features, depth)

    def out_grid(self, grid: Grid) -> Grid:
        return divided(grid, self.factor, "pixel_shuffle")

    def connect(self, features: Tensor, grid: Grid) -> Tensor:
        (batch, _, width), factor = features.shape, self.factor
        rows, columns = self.out_grid(grid)
        squares = features.reshape(batch, rows, factor, columns, factor, width).transpose(2, 3)
        merged: Tensor = self.mlp(squares.reshape(batch, rows * columns, -1))  # (B, M, f * f * D)
        return merged


class AveragePool(Connector):
    """Means of neighbouring patches, then an MLP of `depth` layers.

    Give `factor`, so that a token is the mean of `factor` x `factor` patches, or `target`, the side
    or (rows, columns) of the tokens of any grid, whose windows may overlap by a patch.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        factor: int | None = None,
        target: int | list[int] | Grid | None = None,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if (factor is None) == (target is None):
            raise UsageError("average_pool needs either factor or target, for instance factor: 2")
        self.factor = None if factor is None else whole("factor", factor)
        self.target = None if target is None else sides("target", target)
        self.mlp = mlp(in_features, out_features, depth)

    def out_grid(self, grid: Grid) -> Grid:
        if self.target is not None:
            return pooled(grid, self.target, "average_pool")
        assert self.factor is not None
        return divided(grid, self.factor, "average_pool")

    def connect(self, features: Tensor, grid: Grid) -> Tensor:
        means = F.adaptive_avg_pool2d(to_planes(features, grid), self.out_grid(grid))
        embedded: Tensor = self.mlp(to_tokens(means))
        return embedded


class Resampler(Connector):
    """`num_queries` learned queries read the patches of any grid by one cross-attention.

    Keys and values are projected and normalised patches; the keys also hold a sine-cosine table of
    row and column, so a query knows the place of what it reads. Layer norms stand before
    attention and before the last projection, as in Qwen-VL's (arXiv 2308.12966, section 2.1).
    """

    def __init__(
        self, in_features: int, out_features: int, *, num_queries: int = 64, num_heads: int = 8
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.num_queries = whole("num_queries", num_queries)
        if out_features % whole("num_heads", num_heads) or out_features % 4:
            raise UsageError(
                f"a resampler into {out_features} features needs them divisible by 4 and by "
                f"num_heads, which is {num_heads}"
            )
        self.queries = nn.Parameter(torch.randn(num_queries, out_features) * 0.02)  # std of BERT
        self.patches = nn.Linear(in_features, out_features, bias=False)
        self.norm_queries = nn.LayerNorm(out_features)
        self.norm_patches = nn.LayerNorm(out_features)
        self.attention = nn.MultiheadAttention(out_features, num_heads, batch_first=True)
        self.norm_out = nn.LayerNorm(out_features)
        self.proj = nn.Linear(out_features, out_features)

    def out_grid(self, grid: Grid) -> None:
        return None

    def num_tokens(self, grid: Grid) -> int:
        return self.num_queries

    def connect(self, features: Tensor, grid: Grid) -> Tensor:
        values = self.norm_patches(self.patches(features))  # (B, N, E)
        places = sincos_positions(*grid, self.out_features, values.device, values.dtype)
        queries = self.norm_queries(self.queries).expand(len(features), -1, -1)  # (B, M, E)
        read = self.attention(queries, values + places, values, need_weights=False)[0]
        embedded: Tensor = self.proj(self.norm_out(read))
        return embedded


class CAbstractor(Connector):
    """Honeybee's C-Abstractor (arXiv 2312.06742, section 3.2): `depth` residual blocks of
    convolutions, adaptive pooling to `target` (a side, or rows and columns), `depth` blocks again,
    and an MLP of two layers.

    `width` is that of the blocks, the tower's by default. The paper's numbers are target 12 (144
    tokens), depth 3, width 1024. Its learned positions, which fit one grid, are left out.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        target: int | list[int] | Grid = 12,
        depth: int = 3,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.target = sides("target", target)
        width = in_features if width is None else whole("width", width)
        widths = [in_features, *[width] * whole("depth", depth)]
        self.before = nn.Sequential(*[ResidualBlock(a, b) for a, b in pairwise(widths)])
        self.after = nn.Sequential(*[ResidualBlock(width, width) for _ in range(depth)])
        self.mlp = mlp(width, out_features, 2, nn.SiLU)

    def out_grid(self, grid: Grid) -> Grid:
        return pooled(grid, self.target, "c_abstractor")

    def connect(self, features: Tensor, grid: Grid) -> Tensor:
        planes = self.before(to_planes(features, grid))  # (B, W, R, C)
        means = F.adaptive_avg_pool2d(planes, self.target)
        embedded: Tensor = self.mlp(to_tokens(self.after(means)))
        return embedded


CONNECTORS: dict[str, type[Connector]] = {
    "linear": Linear,
    "mlp": Mlp,
    "pixel_shuffle": PixelShuffle,
    "average_pool": AveragePool,
    "resampler": Resampler,
    "c_abstractor": CAbstractor,
}


def build_connector(name: str, in_features: int, out_features: int, **options: Any) -> Connector:
    """The freshly drawn connector `name`; UsageError for an unknown name or option, or a value that
    is impossible."""
    if name not in CONNECTORS:
        raise UsageError(
            f"connector is {name!r}, and must be one of {', '.join(CONNECTORS)}"
            f"{nearest(str(name), CONNECTORS)}"
        )
    known = [*inspect.signature(CONNECTORS[name]).parameters][2:]
    for option in options:
        if option not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            raise UsageError(
                f"connector {name} has no option {option!r}; it {takes}{nearest(option, known)}"
            )
    return CONNECTORS[name](in_features, out_features, **options)
