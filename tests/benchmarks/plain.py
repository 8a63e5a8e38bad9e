"""The pre-training step as plain PyTorch would have it, written from the paper and not from ours.

What it is measured against: three products for query, key and value; a mask written out for every
head; captions padded to the longest the model takes; both heads on every position, with logits in
float32; a loop over parameters in AdamW. That is how the authors' own library is built as well.
Nothing in it is slow on purpose.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining

IGNORED = -100


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        scaled = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (scaled.type_as(x) * self.weight).type_as(x)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = RMSNorm(width), RMSNorm(width)
        self.query, self.key, self.value, self.proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        normed = self.norm_1(x)
        query, key, value = (
            layer(normed).reshape(batch, length, self.num_heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if mask is not None:
            mask = mask[:, None].expand(-1, self.num_heads, -1, -1)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        normed = self.norm_2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class PlainPreTraining(nn.Module):
    """The whole model, with the weights of `ours` copied in."""

    def __init__(self, ours: AIMv2ForPreTraining) -> None:
        super().__init__()
        encoder, decoder = ours.encoder.config, ours.decoder_config
        width = decoder.hidden_size
        self.patch_size, self.max_text_tokens = encoder.patch_size, decoder.max_text_tokens
        self.patchify = nn.Conv2d(
            3, encoder.hidden_size, encoder.patch_size, stride=encoder.patch_size
        )
        self.patch_norm = RMSNorm(encoder.hidden_size)
        self.patch_positions = nn.Parameter(
            torch.empty(1, encoder.num_patches, encoder.hidden_size)
        )
        self.encoder_blocks = nn.ModuleList(
            Block(encoder.hidden_size, encoder.intermediate_size, encoder.num_attention_heads)
            for _ in range(encoder.num_hidden_layers)
        )
        self.encoder_norm = RMSNorm(encoder.hidden_size)
        self.projection = nn.Linear(encoder.hidden_size, width)
        self.words = nn.Embedding(decoder.vocab_size, width)
        self.start = nn.Parameter(torch.empty(width))
        self.text_positions = nn.Parameter(torch.empty(self.max_text_tokens + 1, width))
        self.decoder_blocks = nn.ModuleList(
            Block(width, decoder.intermediate_size, decoder.num_attention_heads)
            for _ in range(decoder.num_hidden_layers)
        )
        self.decoder_norm = RMSNorm(width)
        self.patch_head = nn.Linear(width, 3 * encoder.patch_size**2, bias=False)
        self.word_head = nn.Linear(width, decoder.vocab_size, bias=False)
        self.load_state_dict(renamed(ours.state_dict()))

    def forward(
        self, pixel_values: Tensor, prefix_length: Tensor, caption_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Patches (B, I, 588) and words (B, T + 1, V); `caption_ids` (B, T) is padded."""
        features = self.encode(pixel_values, prefix_length)
        batch, num_patches, _ = features.shape
        image = self.projection(features)
        text = torch.cat([self.start.expand(batch, 1, -1), self.words(caption_ids)], dim=1)
        x = torch.cat([image, text + self.text_positions], dim=1)
        for block in self.decoder_blocks:
            x = block(x, None)
        x = self.decoder_norm(x)
        return self.patch_head(x[:, :num_patches]), self.word_head(x[:, num_patches:])

    def encode(self, pixel_values: Tensor, prefix_length: Tensor | None = None) -> Tensor:
        """The features (B, I, D), under the prefix mask if there are prefixes."""
        x = self.patch_norm(self.patchify(pixel_values).flatten(2).transpose(1, 2))
        x = x + self.patch_positions
        batch, num_patches, _ = x.shape
        causal = torch.ones(num_patches, num_patches, dtype=torch.bool, device=x.device).tril()
        mask = torch.ones_like(causal).expand(batch, -1, -1)
        if prefix_length is not None:
            in_prefix = torch.arange(num_patches, device=x.device) < prefix_length[:, None]
            mask = causal.expand(batch, -1, -1) | in_prefix[:, None, :].expand(-1, num_patches, -1)
        for block in self.encoder_blocks:
            x = block(x, mask)
        features: Tensor = self.encoder_norm(x)
        return features

    def loss(self, batch: dict[str, Tensor], end_token_id: int) -> Tensor:
        """text + 0.4 * image, for the same batch that ours takes."""
        pixels, prefix = batch["pixel_values"], batch["prefix_length"]
        length = batch["caption_length"]
        room = self.max_text_tokens - batch["caption_ids"].shape[1]
        ids = F.pad(batch["caption_ids"], (0, room))
        patches, words = self(pixels, prefix, ids)

        size = self.patch_size
        rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
        target = pixels.reshape(len(pixels), 3, rows, size, columns, size)
        target = torch.einsum("bcrpsq->brspqc", target).reshape(len(pixels), rows * columns, -1)
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        scored = torch.arange(1, rows * columns, device=pixels.device) >= prefix[:, None]
        errors = (patches[:, :-1] - target[:, 1:]).square().mean(-1)
        image = (errors * scored).sum() / scored.sum()

        wanted = F.pad(ids, (0, 1)).scatter(1, length[:, None], end_token_id)
        unread = torch.arange(wanted.shape[1], device=ids.device) > length[:, None]
        wanted = wanted.masked_fill(unread, IGNORED)
        text = F.cross_entropy(words.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        return text + 0.4 * image


# Ours on the left, in the order in which the pieces are to be replaced.
NAMES = {
    "encoder.preprocessor.patchifier.proj": "patchify",
    "encoder.preprocessor.patchifier.norm": "patch_norm",
    "encoder.preprocessor.pos_embed": "patch_positions",
    "encoder.trunk.blocks": "encoder_blocks",
    "encoder.trunk.post_trunk_norm": "encoder_norm",
    "text_embedding": "words",
    "attn.proj": "proj",
    "mlp.fc1": "gate",
    "mlp.fc2": "down",
    "mlp.fc3": "up",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of the plain model, with query, key and value apart."""
    plain = {}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            name = f"decoder_{name}"
        if name.startswith("norm."):
            name = f"decoder_{name}"
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if "attn.qkv" in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                plain[name.replace("attn.qkv", part)] = piece
        else:
            plain[name] = tensor
    return plain
