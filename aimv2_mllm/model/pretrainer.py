"""The pre-training model: a prefix-masked encoder, a causal decoder over [patches ; caption].

Paper: arXiv 2411.14402, sections 3.1 and 3.2. Owns the decoder and its two heads; losses are the
objective's.

Letters in shapes: B samples, I patches, T caption tokens, S tokens of all samples, D decoder width,
V words, P and Q scored rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, RMSNorm, initialise_linears
from .encoder import AIMv2Encoder
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
        area = self.encoder.config.patch_size**2
        num_patches = [image.shape[-2] * image.shape[-1] // area for image in pixel_values]
        prefixes, num_words = prefix_length.tolist(), caption_length.tolist()
        self._check(num_patches, prefixes, num_words, caption_ids.shape[1])
        if scored_only:
            num_texts = [1 + length for length in num_words]
            # Position i predicts patch i + 1, scored from patch M on; the last patch predicts none.
            spans = [(m - 1, i - 1) for m, i in zip(prefixes, num_patches, strict=True)]
        else:
            num_texts = [1 + caption_ids.shape[1]] * len(num_words)
            spans = [(0, i) for i in num_patches]
            if len(set(num_patches)) > 1:
                raise ValueError("images of different sizes need scored_only=True")
        if isinstance(pixel_values, Tensor):
            features = self.encoder(pixel_values, prefix_length).flatten(0, 1)
        else:
            features = torch.cat(self.encoder.encode_images(pixel_values, prefixes))
        patches = torch.split(self.projection(features), num_patches)  # B of (I, D)
        texts = self._embed(caption_ids, caption_length, num_texts)  # B of (1 + T, D)
        image, text = self._decode(patches, texts, spans)  # (P, D) and (Q, D)
        predictions = Predictions(self.patch_head(image), self.word_head(text))
        if scored_only:
            return predictions
        return Predictions(*(x.view(len(spans), -1, x.shape[-1]) for x in predictions))

    def _decode(
        self, patches: Sequence[Tensor], texts: Sequence[Tensor], spans: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """What the heads read, in (sample, position) order: (P, D) and (Q, D).

        `patches` are B of (I, D) and `texts` B of (1 + T, D); of the patches' positions only those
        in the half-open `spans` come back.
        """
        lengths = [len(image) + len(text) for image, text in zip(patches, texts, strict=True)]
        # Samples of equal length lie side by side, and so share a product in attention.
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        hidden = torch.cat([part for i in order for part in (patches[i], texts[i])])  # (S, D)
        starts = dict(zip(order, accumulate((lengths[i] for i in order), initial=0), strict=False))
        image_rows = [torch.arange(*span) + starts[i] for i, span in enumerate(spans)]
        # Position I + t predicts caption token t, or the end token at t = caption_length.
        text_rows = [
            torch.arange(len(patches[i]), lengths[i]) + starts[i] for i in range(len(lengths))
        ]
        rows = torch.cat([*image_rows, *text_rows]).to(hidden.device)
        packing = Packing([lengths[i] for i in order], is_causal=True)
        for block in self.blocks[:-1]:
            hidden = block(hidden, packing)
        # Other rows have had their say once the last block has attended to them.
        hidden = self.norm(self.blocks[-1](hidden, packing, rows=rows))
        sizes = [sum(map(len, image_rows)), sum(map(len, text_rows))]
        image, text = torch.split(hidden, sizes)
        return image, text

    def _embed(
        self, caption_ids: Tensor, caption_length: Tensor, num_texts: list[int]
    ) -> tuple[Tensor, ...]:
        """[start] w1 … of each sample with the text positions added, cut to `num_texts` rows."""
        samples = [torch.full((n,), i) for i, n in enumerate(num_texts)]
        sample = torch.cat(samples).to(caption_ids.device)  # (Q,)
        place = torch.cat([torch.arange(n) for n in num_texts]).to(caption_ids.device)  # (Q,)
        ids = F.pad(caption_ids, (1, 0))[sample, place]  # (Q,), anything in place of the start
        # Padding may be anything, -100 too. Causality keeps it from what stands before it.
        words = self.text_embedding(ids.masked_fill(place > caption_length[sample], 0))
        tokens = torch.where((place == 0)[:, None], self.start, words)  # (Q, D)
        return torch.split(tokens + F.embedding(place, self.text_positions), num_texts)

    def _check(
        self, num_patches: list[int], prefixes: list[int], num_words: list[int], num_tokens: int
    ) -> None:
        most = self.decoder_config.max_text_tokens
        if num_tokens > most:
            raise ValueError(
                f"captions of {num_tokens} tokens do not fit max_text_tokens {most}: cut them"
            )
        for name, lengths, low, highs in (
            ("prefix_length", prefixes, 1, num_patches),
            ("caption_length", num_words, 0, [num_tokens] * len(num_words)),
        ):
            for length, high in zip(lengths, highs, strict=True):
                if not low <= length <= high:
                    raise ValueError(f"{name} must lie in {low}..{high}, and is {length}")
