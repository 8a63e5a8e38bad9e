"""The pre-training model: a prefix-masked encoder, a causal decoder over [patches ; caption].

Paper: arXiv 2411.14402, sections 3.1 and 3.2. Owns the decoder and its two heads; losses are the
objective's.

Letters in shapes: B samples, I patches, T caption tokens, S tokens of all samples, D decoder width, V
words, P and Q scored rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import AIMv2Encoder, Block, RMSNorm, initialise_linears
from .packed import Packing

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
        pixel_values: Tensor | Sequence[Tensor],
        prefix_length: Tensor,
        caption_ids: Tensor,
        caption_length: Tensor,
        *,
        scored_only: bool = False,
    ) -> Predictions:
        """Predictions of the next patch and of the next word.

        `pixel_values` (B, C, H, W), or B images (C, H, W) of different sizes; `prefix_length` (B,)
        in 1..I; `caption_ids` (B, T) int64, whatever stands at and after `caption_length` (B,) is
        ignored. Returns patches (B, I, 588), whose row i predicts patch i + 1 (so the last row
        predicts nothing), and words (B, T + 1, V), whose row t predicts caption token t, counted
        from 0, and whose row `caption_length` predicts the end token. With `scored_only` padding
        costs nothing, the heads run on the scored rows alone, and these come back in (sample,
        position) order: patches (P, 588) for the patches outside the prefix, words (Q, V) for
        t <= caption_length. Raises ValueError on lengths out of range, on captions that are too
        long, and on images of different sizes without `scored_only`.
        """
        num_patches = self._num_patches(pixel_values, scored_only)
        prefixes, num_words = prefix_length.tolist(), caption_length.tolist()
        self._check(num_patches, prefixes, caption_ids, num_words)
        num_texts = [(n if scored_only else caption_ids.shape[1]) + 1 for n in num_words]
        if isinstance(pixel_values, Tensor):
            features = self.encoder(pixel_values, prefix_length).flatten(0, 1)
        else:
            features = torch.cat(self.encoder.encode_images(pixel_values, prefixes))
        patches = self.projection(features).split(num_patches)  # B of (I, D)
        texts = self._embed(caption_ids, caption_length, num_texts)  # B of (1 + T, D)
        lengths = [i + t for i, t in zip(num_patches, num_texts, strict=True)]
        # Samples of equal length lie side by side, and so share a product in attention.
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        hidden = torch.cat([part for i in order for part in (patches[i], texts[i])])  # (S, D)
        packing = Packing([lengths[i] for i in order], is_causal=True)
        for block in self.blocks:
            hidden = block(hidden, packing)
        image_rows, text_rows, start = {}, {}, 0
        for i in order:
            # Position i predicts patch i + 1, scored from patch M on; the last patch predicts none.
            first, end = (prefixes[i] - 1, num_patches[i] - 1) if scored_only else (0, num_patches[i])
            image_rows[i] = torch.arange(start + first, start + end)
            # Position I + t predicts caption token t, or the end token at t = caption_length.
            text_rows[i] = torch.arange(start + num_patches[i], start + lengths[i])
            start += lengths[i]
        image = _rows(hidden, [image_rows[i] for i in range(len(order))])  # (P, D)
        text = _rows(hidden, [text_rows[i] for i in range(len(order))])  # (Q, D)
        predictions = Predictions(self.patch_head(self.norm(image)), self.word_head(self.norm(text)))
        if scored_only:
            return predictions
        return Predictions(*(rows.unflatten(0, (len(order), -1)) for rows in predictions))

    def _embed(
        self, caption_ids: Tensor, caption_length: Tensor, num_texts: list[int]
    ) -> tuple[Tensor, ...]:
        """[start] w1 … of each sample with the text positions added, cut to `num_texts` rows."""
        places = torch.cat([torch.arange(n) for n in num_texts]).to(caption_ids.device)  # (Q,)
        samples = torch.arange(len(num_texts)).repeat_interleave(torch.tensor(num_texts))
        samples = samples.to(caption_ids.device)
        ids = F.pad(caption_ids, (1, 0))[samples, places]  # (Q,), anything in place of the start
        # Padding may be anything, -100 too. Causality keeps it from what stands before it.
        ids = ids.masked_fill(places > caption_length[samples], 0)
        words = self.text_embedding(ids)
        tokens = torch.where((places == 0)[:, None], self.start, words)  # (Q, D)
        return (tokens + F.embedding(places, self.text_positions)).split(num_texts)

    def _num_patches(
        self, pixel_values: Tensor | Sequence[Tensor], scored_only: bool
    ) -> list[int]:
        """The number of patches of each image."""
        area = self.encoder.config.patch_size**2
        num_patches = [image.shape[-2] * image.shape[-1] // area for image in pixel_values]
        if not scored_only and len(set(num_patches)) > 1:
            raise ValueError("images of different sizes need scored_only=True")
        return num_patches

    def _check(
        self,
        num_patches: list[int],
        prefixes: list[int],
        caption_ids: Tensor,
        num_words: list[int],
    ) -> None:
        num_tokens, most = caption_ids.shape[1], self.decoder_config.max_text_tokens
        if num_tokens > most:
            raise ValueError(
                f"captions of {num_tokens} tokens do not fit max_text_tokens {most}: cut them"
            )
        for name, lengths, low, high in (
            ("prefix_length", prefixes, 1, min(num_patches)),
            ("caption_length", num_words, 0, num_tokens),
        ):
            if min(lengths) < low or max(lengths) > high:
                raise ValueError(
                    f"{name} must lie in {low}..{high}, and goes from {min(lengths)} to "
                    f"{max(lengths)}"
                )


def _rows(hidden: Tensor, rows: list[Tensor]) -> Tensor:
    """The given rows of `hidden` (S, D), one sample's after the other's: (P, D)."""
    # index_select, not hidden[rows]: its backward is far faster on CPU.
    return hidden.index_select(0, torch.cat(rows).to(hidden.device))
