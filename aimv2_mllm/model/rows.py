"""Attention of transformers' LLMs over conversations that lie one after the other, without padding.

Owns an attention function, which transformers knows as `PACKED` once this module is imported, and
the layout it is given. transformers' own packing needs a mask of all tokens by all tokens; here
only attention, and nothing else, sees conversations as rows: those of like length, which lie side
by side, become rows padded on the right, where causal attention needs no mask.

Letters in shapes: T tokens of all conversations, B conversations, L tokens of the longest in a
group, h heads, g heads of keys and values, d width of a head.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from aimv2_mllm.model.packed import Lengths, attend_by_lengths, has_varlen

PACKED = "aimv2_mllm_packed"
MOST_PADDING = 1.25  # rows of a group by their tokens, at most
# The kinds of LLM (`model_type`) whose attention is what `Rows.attend` computes; each is tested.
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "smollm3")


def understands(config: Any) -> bool:
    """Whether the attention of an LLM with this configuration can be computed by `PACKED`."""
    return (
        config.model_type in KINDS
        and not getattr(config, "attn_logit_softcapping", None)
        and not getattr(config, "use_bidirectional_attention", False)
    )


class Group(NamedTuple):
    """Conversations side by side, as `size` rows of `width` tokens."""

    first: int  # their first token, of all
    end: int  # the one after their last
    size: int
    width: int
    places: Tensor | None  # (end - first,): where each of their tokens is in the rows; None: there


class Rows:
    """Conversations of `lengths` tokens, one after the other: a token sees those of its own
    conversation that are not later."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = Lengths(lengths, device)
        self.groups = [_group(lengths, first, end, device) for first, end in _runs(lengths)]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, **words: Any
    ) -> Tensor:
        """Attention of queries (T, h, d) to keys and values (T, g, d): (T, h, d).

        With a `window` a token sees that many, itself included. `words` are `scale` and
        `dropout_p` of scaled-dot-product attention. The rule: flash attention for variable lengths
        where torch has it, which is on CUDA in half precision; otherwise group by group.
        """
        half = query.dtype in (torch.float16, torch.bfloat16)
        if query.is_cuda and half and not words["dropout_p"] and has_varlen():
            return self._by_variable_lengths(query, key, value, window, words["scale"])
        parts = []
        for group in self.groups:
            own = [x[group.first : group.end] for x in (query, key, value)]
            parts.append(_attended(group, own, window, words))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _by_variable_lengths(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        return attend_by_lengths(
            query, key, value, self.lengths, self.lengths,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """The groups, as their first conversation and the one after the last."""
    runs, first, longest, tokens = list[tuple[int, int]](), 0, 0, 0
    for number, length in enumerate(lengths):
        longest, tokens = max(longest, length), tokens + length
        if longest * (number + 1 - first) > MOST_PADDING * tokens:
            runs.append((first, number))
            first, longest, tokens = number, length, length
    return [*runs, (first, len(lengths))]


def _group(lengths: Sequence[int], first: int, end: int, device: torch.device) -> Group:
    own = torch.tensor(lengths[first:end])  # (B,)
    begin, count, width = sum(lengths[:first]), len(own), int(own.max())
    size = int(own.sum())
    if size == count * width:
        return Group(begin, begin + size, count, width, None)
    # A token moves on by the padding of the rows before its own.
    padding = F.pad((width - own).cumsum(0)[:-1], (1, 0))  # (B,)
    places = torch.arange(size) + padding.repeat_interleave(own)
    return Group(begin, begin + size, count, width, places.to(device))


def _attended(
    group: Group, tokens: Sequence[Tensor], window: int | None, words: dict[str, Any]
) -> Tensor:
    """Attention inside a group, of three times (tokens, h or g, d): (tokens, h, d)."""
    laid = []
    for one in tokens:
        if group.places is not None:
            empty = one.new_zeros(group.size * group.width, *one.shape[1:])
            one = empty.index_copy(0, group.places, one)
        laid.append(
            one.view(group.size, group.width, *one.shape[1:]).transpose(1, 2)
        )  # (B, h, L, d)
    query, key, value = laid
    is_cut = window is not None and window < group.width
    mixed = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_band(group.width, window, query.device) if is_cut else None,
        is_causal=not is_cut,
        enable_gqa=query.shape[1] != key.shape[1],
        **words,
    )
    mixed = mixed.transpose(1, 2).flatten(0, 1)  # (B * L, h, d)
    return mixed if group.places is None else mixed.index_select(0, group.places)


@lru_cache(maxsize=8)
def _band(width: int, window: int | None, device: torch.device) -> Tensor:
    """Which key each query may look at: itself and the `window` - 1 before it; bool (L, L)."""
    places = torch.arange(width, device=device)
    back = places[:, None] - places[None, :]
    return (back >= 0) & (back < (window or width))


def attend_in_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Rows,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """What transformers' models call in place of their own attention: queries (1, h, T, d), keys
    and values (1, g, T, d) to (1, T, h, d)."""
    assert attention_mask is None, "what is packed has no mask"
    unknown = ("softcap", "s_aux", "position_bias")
    strange = [name for name in unknown if other.get(name) is not None]
    assert not strange, f"attention with {strange} is not packed"
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]
    mixed = packing.attend(*tokens, window=sliding_window, scale=scaling, dropout_p=dropout)
    return mixed[None], None


# No mask function of that name: transformers then makes none.
AttentionInterface.register(PACKED, attend_in_rows)
