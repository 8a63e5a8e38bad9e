"""The pre-training model one row at a time: patches and words that come later cost a row each.

Attention behind the prefix is causal, in the encoder and in the decoder, so keys and values of what
was there before can be kept. Owns them; refuses several rows at once behind the first ones.

Letters in shapes: B samples, n new rows, L rows in all, D width, h heads, I patches, V vocabulary.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2_mllm.model.blocks import Block
from aimv2_mllm.model.encoder import AIMv2Encoder
from aimv2_mllm.model.positions import sincos_positions
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining


class CachedBlocks:
    """Blocks that keep the keys and values of the rows they were given, at most `most` of them."""

    def __init__(self, blocks: Iterable[torch.nn.Module], most: int) -> None:
        self.blocks = [cast(Block, block) for block in blocks]
        self.most, self.length = most, 0
        self.kept: list[tuple[Tensor, Tensor]] = []  # of each block 2 of (B, h, most, D / h)

    def __call__(self, x: Tensor, *, is_causal: bool) -> Tensor:
        """The blocks' output (B, n, D) for the rows `x` (B, n, D) behind those given so far.

        The first rows see each other, only the earlier ones if `is_causal`; from then on it is one
        row a call, which sees all before it.
        """
        new = x.shape[1]
        assert new == 1 or self.length == 0, (new, self.length)
        assert self.length + new <= self.most, (self.length, new, self.most)
        for index, block in enumerate(self.blocks):
            x = x + self._attend(index, block, block.norm_1(x), is_causal and new > 1)
            x = x + block.mlp(block.norm_2(x))
        self.length += new
        return x

    def _attend(self, index: int, block: Block, x: Tensor, is_causal: bool) -> Tensor:
        batch, new, width = x.shape
        attention, end = block.attn, self.length + new
        heads = attention.num_heads
        qkv = attention.qkv(x).view(batch, new, 3, heads, width // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 of (B, h, n, D / h)
        if index == len(self.kept):
            shape = (batch, heads, self.most, width // heads)
            self.kept.append((x.new_empty(shape), x.new_empty(shape)))
        keys, values = self.kept[index]
        keys[:, :, self.length : end], values[:, :, self.length : end] = key, value
        mixed = F.scaled_dot_product_attention(
            query, keys[:, :, :end], values[:, :, :end], is_causal=is_causal
        )
        merged: Tensor = attention.proj(mixed.transpose(1, 2).reshape(batch, new, width))
        return merged


class PatchByPatch:
    """The next patches of pictures of one grid, (rows, columns), whose patches come in order.

    No caption is given, as behind a prefix of pre-training.
    """

    def __init__(self, model: AIMv2ForPreTraining, grid: tuple[int, int]) -> None:
        self.model, self.grid = model, grid
        num_patches = grid[0] * grid[1]
        self.encoder = CachedBlocks(model.encoder.trunk.blocks, num_patches)
        self.decoder = CachedBlocks(model.blocks, num_patches)

    def __call__(self, patches: Tensor) -> Tensor:
        """The standardised patch (B, 588) that follows `patches` (B, n, 588): first all of the
        prefix, from then on one a call."""
        first, trunk = self.encoder.length, self.model.encoder.trunk
        tokens = _embed(self.model.encoder, patches, first, self.grid)  # (B, n, D)
        # Within the prefix every patch sees every patch.
        features = trunk.post_trunk_norm(self.encoder(tokens, is_causal=False))
        hidden = self.decoder(self.model.projection(features), is_causal=True)
        predicted: Tensor = self.model.patch_head(self.model.norm(hidden[:, -1]))
        return predicted


class WordByWord:
    """The next words about whole pictures (B, C, H, W), whose words come in order."""

    def __init__(self, model: AIMv2ForPreTraining, pixel_values: Tensor) -> None:
        self.model, self.num_words = model, 0
        features = model.encoder(pixel_values)  # all prefix: every patch sees every patch
        batch, num_patches, _ = features.shape
        most = num_patches + 1 + model.decoder_config.max_text_tokens
        self.decoder = CachedBlocks(model.blocks, most)
        start = (model.start + model.text_positions[0]).expand(batch, 1, -1)
        rows = torch.cat([model.projection(features), start], dim=1)  # (B, I + 1, D)
        self.logits = self._read(self.decoder(rows, is_causal=True))  # (B, V), of the next word

    def append(self, words: Tensor) -> None:
        """Take the words (B,) as said; `logits` are then those of the word after them."""
        self.num_words += 1
        position = self.model.text_positions[self.num_words]
        rows = (self.model.text_embedding(words) + position)[:, None]  # (B, 1, D)
        self.logits = self._read(self.decoder(rows, is_causal=True))

    def _read(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.word_head(self.model.norm(hidden[:, -1]))
        return logits


def _embed(encoder: AIMv2Encoder, patches: Tensor, first: int, grid: tuple[int, int]) -> Tensor:
    """Patches (B, n, 588), the first of them number `first`, with their positions: (B, n, D)."""
    config, (batch, new, _) = encoder.config, patches.shape
    size, channels = config.patch_size, config.num_channels
    # Each patch as a picture of its own: (B * n, C, size, size), from (row, column, channel) order.
    pixels = patches.reshape(batch * new, size, size, channels).permute(0, 3, 1, 2)
    tokens = encoder.preprocessor.patchifier(pixels).view(batch, new, -1)
    table = encoder.preprocessor.pos_embed
    positions = (
        sincos_positions(*grid, tokens.shape[-1], tokens.device, tokens.dtype)
        if table is None
        else table[0]
    )  # (I, D)
    embedded: Tensor = tokens + positions[first : first + new]
    return embedded
