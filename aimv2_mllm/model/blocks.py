"""What the networks of AIMv2 are made of: norm, attention, feed-forward, the block of these, and a
stack of blocks.

Encoder, pre-training decoder and the text tower of LiT share them. Needs torch (2.1 or newer) and
nothing else. Parameters bear the words of the original release.

Letters in shapes: B samples, N tokens of one sample, S tokens of all, D width, h heads, P rows.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .packed import Packing


class Sizes(Protocol):
    """The numbers of a stack, which the configs of encoder and text tower have."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...


class _Normalise(torch.autograd.Function):
    """RMSNorm with its gradient written out: autograd would copy twice as much, and keep it all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        full = x.float()
        scale = torch.rsqrt((full * full).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (full * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        gradient, width = gradient.float(), x.shape[-1]
        scaled = x.float() * scale
        products = (gradient * scaled).reshape(-1, width)
        # What an element loses because the root mean square grows with it.
        shared = torch.mv(products, weight.float()).view(scale.shape) / -width
        back = (gradient * weight).addcmul_(scaled, shared).mul_(scale)
        return back.to(x.dtype), products.sum(0).to(weight.dtype), None


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last axis, with the root mean square taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = _Normalise.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normalised


# What a query may look at: True in (B, 1, N, N); its own sample of (S, D); or everything.
Mask = Tensor | Packing | None


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value product and without biases."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Mask = None, is_causal: bool = False) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:-1], 3, self.num_heads, -1)  # (B, N, 3, h, D / h)
        if isinstance(mask, Packing):  # x is (S, D)
            mixed = mask.attend(qkv)  # (S, h, D / h)
        else:
            query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, h, N, D / h)
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal
            ).transpose(1, 2)
        merged: Tensor = self.proj(mixed.flatten(-2))
        return merged


class SwiGLU(nn.Module):
    """`fc2(silu(fc1(x)) * fc3(x))` without biases: fc1 is the gate, fc3 goes up, fc2 comes down."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        self.fc3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.fc2(F.silu(self.fc1(x)) * self.fc3(x))
        return down


class Block(nn.Module):
    """A pre-norm block, (B, N, D) to (B, N, D): the encoder's and the pre-training decoder's.

    Under a `Packing` the shapes are (S, D), and with `rows` (P,) only these come back: (P, D).
    """

    def __init__(self, width: int, hidden: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(width, eps)
        self.attn = Attention(width, num_heads)
        self.norm_2 = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, hidden)

    def forward(
        self,
        x: Tensor,
        mask: Mask = None,
        is_causal: bool = False,
        rows: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attn(self.norm_1(x), mask, is_causal)
        if rows is not None:
            # index_select, not x[rows]: its backward is far faster on CPU.
            x = x.index_select(0, rows)
        refined: Tensor = self.mlp(self.norm_2(x))
        return x + refined


class Trunk(nn.Module):
    """Blocks and a final norm, (B, N, D) to (B, N, D), or (S, D) under a `Packing`: the encoder's,
    and those of the text tower of LiT."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.blocks = nn.ModuleList(
            Block(width, config.intermediate_size, config.num_attention_heads, eps)
            for _ in range(config.num_hidden_layers)
        )
        self.post_trunk_norm = RMSNorm(width, eps)

    def forward(self, tokens: Tensor, mask: Mask = None, is_causal: bool = False) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, mask, is_causal)
        features: Tensor = self.post_trunk_norm(tokens)
        return features


@torch.no_grad()
def initialise_linears(module: nn.Module) -> None:
    """Draw every linear and convolution below `module` anew: Xavier-uniform weights, zero biases.

    As the authors trained it; a convolution counts as the linear layer over its flattened patch,
    and the fused query-key-value product as one layer.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
