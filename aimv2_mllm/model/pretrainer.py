"""The pre-training model: a prefix-masked encoder, a causal decoder over [patches ; caption].

Paper: arXiv 2411.14402, sections 3.1 and 3.2. Owns the decoder and its two heads; losses are the
objective's.

Letters in shapes: B samples, I patches, T caption tokens, D decoder width, V words, P and Q scored
rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .encoder import AIMv2Encoder, Block, RMSNorm, initialise_linears

# What cutting a unit normal at -2 and 2 leaves of its standard deviation.
CUT_NORMAL_STD = 0.87962566103423978


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers of the decoder; the defaults are the authors', for every encoder size.

    Raises ValueError on impossible numbers.
    """

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    vocab_size: int = 32000
    max_text_tokens: int = 77
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"decoder: {name} must be above 0, not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"decoder: hidden_size {self.hidden_size} is not divisible by "
                f"num_attention_heads {self.num_attention_heads}"
            )


class Predictions(NamedTuple):
    """What the heads say; see `AIMv2ForPreTraining.forward` for the meaning of the rows."""

    patches: Tensor
    words: Tensor


class AIMv2ForPreTraining(nn.Module):
    """The given encoder, as it is, with a freshly drawn multimodal decoder on top."""

    def __init__(self, encoder: AIMv2Encoder, decoder_config: DecoderConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder_config = config = decoder_config
        width, eps = config.hidden_size, config.rms_norm_eps
        self.projection = nn.Linear(encoder.config.hidden_size, width)
        self.text_embedding = nn.Embedding(config.vocab_size, width)
        self.start = nn.Parameter(torch.empty(width))
        self.text_positions = nn.Parameter(torch.empty(config.max_text_tokens + 1, width))
        self.blocks = nn.ModuleList(
            Block(width, config.intermediate_size, config.num_attention_heads, eps)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(width, eps)
        patch_values = encoder.config.num_channels * encoder.config.patch_size**2
        self.patch_head = nn.Linear(width, patch_values, bias=False)
        self.word_head = nn.Linear(width, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Draw what is above the encoder as the authors do (the start vector: our choice)."""
        initialise_linears(self.projection)
        initialise_linears(self.blocks)
        nn.init.normal_(self.text_embedding.weight, std=0.02)
        nn.init.normal_(self.start, std=0.02)
        nn.init.normal_(self.text_positions, std=0.01)
        fan_in = self.decoder_config.hidden_size
        std = (1 / (1 + self.decoder_config.num_hidden_layers) / fan_in) ** 0.5 / CUT_NORMAL_STD
        for head in (self.patch_head, self.word_head):
            nn.init.trunc_normal_(head.weight, std=std, a=-2 * std, b=2 * std)

    def forward(
        self,
        pixel_values: Tensor,
        prefix_length: Tensor,
        caption_ids: Tensor,
        caption_length: Tensor,
        *,
        scored_only: bool = False,
    ) -> Predictions:
        """Predictions of the next patch and of the next word.

        `pixel_values` (B, C, H, W); `prefix_length` (B,) in 1..I; `caption_ids` (B, T) int64,
        whatever stands at and after `caption_length` (B,) is ignored. Returns patches (B, I, 588),
        whose row i predicts patch i + 1 (so the last row predicts nothing), and words (B, T + 1,
        V), whose row t predicts caption token t, counted from 0, and whose row `caption_length`
        predicts the end token. With `scored_only` the heads run on the scored rows alone and these
        come back in (sample, position) order: patches (P, 588) for the patches outside the prefix,
        words (Q, V) for t <= caption_length. Raises ValueError on lengths out of range and on
        captions that are too long.
        """
        self._check(pixel_values, prefix_length, caption_ids, caption_length)
        features = self.encoder(pixel_values, prefix_length)  # (B, I, encoder width)
        captions = self._embed(caption_ids, caption_length)  # (B, 1 + T, D)
        hidden = torch.cat([self.projection(features), captions], dim=1)
        for block in self.blocks:
            hidden = block(hidden, is_causal=True)  # (B, I + 1 + T, D)
        num_patches = features.shape[1]
        image, text = hidden[:, :num_patches], hidden[:, num_patches:]
        if scored_only:
            at = torch.arange(hidden.shape[1], device=hidden.device)
            first, end = prefix_length[:, None], num_patches + caption_length[:, None]
            # Position i predicts patch i + 1, scored from patch M on; the last patch predicts none.
            image = _rows(hidden, (at >= first - 1) & (at < num_patches - 1))  # (P, D)
            # Position I + t predicts caption token t, or the end token at t = caption_length.
            text = _rows(hidden, (at >= num_patches) & (at <= end))  # (Q, D)
        return Predictions(self.patch_head(self.norm(image)), self.word_head(self.norm(text)))

    def _embed(self, caption_ids: Tensor, caption_length: Tensor) -> Tensor:
        """[start] w1 … wT with the text positions added: (B, 1 + T, D)."""
        batch, num_tokens = caption_ids.shape
        # Padding may be anything, -100 too. Causality keeps it from what stands before it.
        at = torch.arange(num_tokens, device=caption_ids.device)
        padding = at >= caption_length[:, None]  # (B, T)
        words = self.text_embedding(caption_ids.masked_fill(padding, 0))  # (B, T, D)
        start = self.start.expand(batch, 1, -1)
        return torch.cat([start, words], dim=1) + self.text_positions[: num_tokens + 1]

    def _check(
        self,
        pixel_values: Tensor,
        prefix_length: Tensor,
        caption_ids: Tensor,
        caption_length: Tensor,
    ) -> None:
        size = self.encoder.config.patch_size
        num_patches = (pixel_values.shape[-2] // size) * (pixel_values.shape[-1] // size)
        num_tokens, most = caption_ids.shape[1], self.decoder_config.max_text_tokens
        if num_tokens > most:
            raise ValueError(
                f"captions of {num_tokens} tokens do not fit max_text_tokens {most}: cut them"
            )
        for name, lengths, low, high in (
            ("prefix_length", prefix_length, 1, num_patches),
            ("caption_length", caption_length, 0, num_tokens),
        ):
            smallest, largest = lengths.min().item(), lengths.max().item()
            if smallest < low or largest > high:
                raise ValueError(
                    f"{name} must lie in {low}..{high}, and goes from {smallest} to {largest}"
                )


def _rows(hidden: Tensor, wanted: Tensor) -> Tensor:
    """The rows of `hidden` (B, L, D) where `wanted` (B, L) is true, in order: (P, D)."""
    # index_select, not hidden[wanted]: its backward is far faster on CPU.
    return hidden.flatten(0, 1).index_select(0, wanted.flatten().nonzero().squeeze(1))
