"""The fixed positions of encoders for any grid, computed. Needs torch and nothing else.

Letters in shapes: N patches, D width.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def sincos_positions(
    rows: int, columns: int, width: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The fixed positions (rows * columns, width) of the native encoder, in raster order.

    Base 10000. The half for the column comes first, then the half for the row; each half is
    [sin | cos]. Do not write to the result: it is shared by all callers with the same grid.
    """
    # A table first asked for in inference must serve training too.
    with torch.inference_mode(False):
        exponents = torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4)
        frequencies = 10000.0**-exponents
        row = torch.arange(rows, dtype=torch.float64, device="cpu").repeat_interleave(columns)
        column = torch.arange(columns, dtype=torch.float64, device="cpu").repeat(rows)
        angles = (column[:, None] * frequencies, row[:, None] * frequencies)  # 2 of (N, D / 4)
        table = torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)
        return table.to(device=device, dtype=dtype)
