"""What connectors are made of: an MLP, and a residual block of convolutions on a grid of any size.

Letters in shapes: B samples, W width, R rows, C columns.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .grids import whole


def mlp(
    in_features: int, out_features: int, depth: int, between: type[nn.Module] = nn.GELU
) -> nn.Sequential:
    """`depth` linear layers with `between` between them, `out_features` wide from the first on."""
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(whole("depth", depth) - 1):
        layers += [between(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)


class ResidualBlock(nn.Module):
    """RegNet's bottleneck block with squeeze-and-excitation (arXiv 2003.13678, section 4 and Y in
    5), with SiLU and layer norms as Honeybee has it (arXiv 2312.06742).

    The 3 x 3 convolution is depthwise; the squeeze is a quarter of the width before, as in both.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        width, squeezed = out_features, max(1, in_features // 4)
        self.reduce = nn.Conv2d(in_features, width, 1, bias=False)
        self.norm_1 = ChannelNorm(width)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm_2 = ChannelNorm(width)
        self.squeeze = nn.Conv2d(width, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, width, 1)
        self.expand = nn.Conv2d(width, width, 1, bias=False)
        self.norm_3 = ChannelNorm(width)
        self.shortcut: nn.Module = nn.Identity()
        if in_features != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_features, width, 1, bias=False), ChannelNorm(width)
            )

    def forward(self, planes: Tensor) -> Tensor:
        """Planes (B, W, R, C) of the new width on the same grid."""
        x = F.silu(self.norm_1(self.reduce(planes)))
        x = F.silu(self.norm_2(self.mix(x)))
        mean = x.mean((2, 3), keepdim=True)  # (B, W, 1, 1)
        x = x * self.excite(F.silu(self.squeeze(mean))).sigmoid()
        return F.silu(self.norm_3(self.expand(x)) + self.shortcut(planes))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the width of planes (B, W, R, C), at each place by itself."""

    def forward(self, planes: Tensor) -> Tensor:
        return super().forward(planes.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
