"""Attention over samples that lie one after the other in one sequence, without padding.

Owns which token sees which, and how that is computed for samples of different lengths. Needs torch
(2.1 or newer) and nothing else. Refuses nothing: lengths are checked by whoever packs.

Letters in shapes: B samples, N tokens of one of them, S tokens of all, h heads, d width of a head.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function


def prefix_mask(prefix_length: Tensor, num_patches: int) -> Tensor:
    """Which key each query may look at in prefix attention: bool (B, 1, N, N).

    Rows are queries, True is "may look". Query q sees key k if it does not come later (k <= q) or
    lies in the sample's prefix (k < M), for `prefix_length` M of shape (B,) (paper, section 3.1).
    The axis of one stands for the heads.
    """
    positions = torch.arange(num_patches, device=prefix_length.device)
    not_later = positions[None, :] <= positions[:, None]  # (N, N)
    in_prefix = positions[None, :] < prefix_length[:, None]  # (B, N)
    return not_later[None, None] | in_prefix[:, None, None, :]


class Packing:
    """Samples of `lengths` tokens, one after the other: a token sees tokens of its own sample only.

    It sees all of these; or those that are not later if `is_causal`; or what `prefix_mask` lets it
    see if `prefix_lengths` are given. Samples of equal length side by side are attended to
    together, so whoever packs many sizes sorts them.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        prefix_lengths: Sequence[int] | None = None,
        *,
        is_causal: bool = False,
    ) -> None:
        assert prefix_lengths is None or len(prefix_lengths) == len(lengths)
        self.lengths = list(lengths)
        self.prefix_lengths = None if prefix_lengths is None else list(prefix_lengths)
        self.is_causal = is_causal
        # Neighbours of equal length as (length, how many).
        self.runs = [(length, len(list(run))) for length, run in groupby(self.lengths)]
        self._masks: list[Tensor | None] | None = None

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention within each sample, of queries, keys and values (S, 3, h, d): (S, h, d).

        The rule: flash attention for variable lengths where torch (2.10 or newer) has it, which is
        on CUDA in half precision; otherwise scaled-dot-product attention, run by run.
        """
        half = qkv.dtype in (torch.float16, torch.bfloat16)
        if qkv.is_cuda and half and has_varlen():
            return self.attend_by_variable_lengths(qkv)
        return self.attend_by_runs(qkv)

    def attend_by_runs(self, qkv: Tensor) -> Tensor:
        """As `attend`, by one scaled-dot-product attention for each run of equal lengths."""
        if self._masks is None:
            self._masks = self._run_masks(qkv.device)
        mixed = []
        rows = torch.split(qkv, [length * count for length, count in self.runs])
        for part, (length, count), mask in zip(rows, self.runs, self._masks, strict=True):
            query, key, value = (
                x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in part.unbind(1)
            )  # 3 of (count, h, N, d), views
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=self.is_causal
            )
            mixed.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(mixed)

    def _run_masks(self, device: torch.device) -> list[Tensor | None]:
        if self.prefix_lengths is None:
            return [None] * len(self.runs)
        prefix = torch.tensor(self.prefix_lengths, device=device)
        parts = torch.split(prefix, [count for _, count in self.runs])
        lengths = [length for length, _ in self.runs]
        return [prefix_mask(part, length) for part, length in zip(parts, lengths, strict=True)]

    def attend_by_variable_lengths(self, qkv: Tensor) -> Tensor:
        """As `attend`, by torch's flash attention for variable lengths."""
        query, key, value = qkv.unbind(1)
        device, causal, whole = qkv.device, (-1, 0), (-1, -1)
        every = Lengths(self.lengths, device)
        if self.prefix_lengths is None:
            window = causal if self.is_causal else whole
            return attend_by_lengths(query, key, value, every, every, window_size=window)
        # A token of the prefix sees the prefix; a later one sees what does not come later than
        # itself. Causal attention of the last queries to all keys is aligned at the end.
        prefix = self.prefix_lengths
        rest = [length - seen for length, seen in zip(self.lengths, prefix, strict=True)]
        inside = torch.cat(
            [torch.arange(n) < m for n, m in zip(self.lengths, prefix, strict=True)]
        ).nonzero()  # (prefix tokens, 1)
        outside = torch.ones(len(qkv), dtype=torch.bool).index_fill_(0, inside[:, 0], False)
        rows = torch.cat([inside, outside.nonzero()])[:, 0].to(qkv.device)
        first, last = torch.split(query.index_select(0, rows), [sum(prefix), sum(rest)])
        own = [x.index_select(0, rows[: sum(prefix)]) for x in (key, value)]
        ahead, behind = Lengths(prefix, device), Lengths(rest, device)
        mixed = torch.cat(
            [
                attend_by_lengths(first, *own, ahead, ahead, window_size=whole),
                attend_by_lengths(last, key, value, behind, every, window_size=causal),
            ]
        )
        return mixed.index_select(0, rows.argsort())


class Lengths:
    """How many tokens samples have that lie one after the other, and where each begins."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.longest = list(lengths), max(lengths)
        starts = F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0))  # (B + 1,)
        self.starts = starts.to(device, torch.int32)


# One operation for what counts operations: which of torch's own it is, depends on torch.
@wrap_torch_function(lambda query, *_, **__: (query,))
def attend_by_lengths(
    query: Tensor, key: Tensor, value: Tensor, own: Lengths, seen: Lengths, **words: Any
) -> Tensor:
    """Torch's flash attention of samples of the `own` lengths to keys and values of those `seen`;
    `words` are its own."""
    from torch.nn.attention.varlen import varlen_attn

    mixed = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(),
        own.starts, seen.starts, own.longest, seen.longest,
        **words,
    )  # fmt: skip
    assert isinstance(mixed, Tensor)  # and no log-sum-exp beside it
    return mixed


def has_varlen() -> bool:
    # Before torch 2.2 there is no package around it either, where find_spec would raise.
    around = find_spec("torch.nn.attention")
    return around is not None and find_spec("torch.nn.attention.varlen") is not None
