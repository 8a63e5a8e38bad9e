"""AIMv2 with a text tower for zero-shot classification (LiT): images and texts in one space.

Paper, section 3: the encoder is locked, its features are pooled by attention, a causal text tower
stands beside it, and both are projected to the same width. Needs torch and nothing else. Refuses
texts without an end, whose pooled token would be any.

Letters in shapes: B images, C texts, T tokens, N patches, D width, h heads, P projected width.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Trunk, initialise_linears
from .encoder import AIMv2Encoder, EncoderConfig

INITIAL_TEMPERATURE = 0.07  # paper, section 3


@dataclass(frozen=True)
class TextConfig:
    """Every number of a text tower, under transformers' key names; the defaults are those of the
    released one. Raises ValueError on impossible numbers."""

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    vocab_size: int = 49_408
    max_position_embeddings: int = 77
    eos_token_id: int = 49_407
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if name != "rms_norm_eps" and not (whole and value >= (name != "eos_token_id")):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be above 0, not {self.rms_norm_eps!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(
                f"eos_token_id {self.eos_token_id} is not below vocab_size {self.vocab_size}"
            )


@dataclass(frozen=True)
class LiTConfig:
    """Every number of a LiT model; the defaults beside the encoder are the released one's. Raises
    ValueError on impossible numbers."""

    vision: EncoderConfig
    text: TextConfig = field(default_factory=TextConfig)
    projection_dim: int = 768
    max_logit_scale: float = 100.0

    def __post_init__(self) -> None:
        if not isinstance(self.projection_dim, int) or self.projection_dim < 1:
            raise ValueError(f"projection_dim must be at least 1, not {self.projection_dim!r}")
        if not self.max_logit_scale >= 1:
            raise ValueError(f"max_logit_scale must be at least 1, not {self.max_logit_scale!r}")


class AttentionPool(nn.Module):
    """One learned query that attends to all patches, (B, N, D) to (B, D), and a linear layer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, width)
        nn.init.normal_(self.cls_token, std=0.02)
        initialise_linears(self)

    def forward(self, features: Tensor) -> Tensor:
        query = self.cls_token.expand(features.shape[0], -1, -1)  # (B, 1, D)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, 1 or N, D / h)
            for x in (query, self.k(features), self.v(features))
        )
        pooled = F.scaled_dot_product_attention(query, key, value)  # (B, h, 1, D / h)
        merged: Tensor = self.linear(pooled.flatten(1))
        return merged


class PooledEncoder(AIMv2Encoder):
    """The encoder, with the head that pools its features beside it, as the first release has it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.head = AttentionPool(config.hidden_size, config.num_attention_heads)


class TextPreprocessor(nn.Module):
    """Token ids (C, T) to embeddings with their positions added, (C, T, D)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.text_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positional_embedding = nn.Parameter(
            torch.empty(config.max_position_embeddings, config.hidden_size)
        )
        nn.init.normal_(self.text_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens: Tensor = self.text_embedding(input_ids)
        return tokens + self.positional_embedding[: input_ids.shape[1]]


class TextEncoder(nn.Module):
    """Token ids (C, T) to one vector a text (C, D): that of its first end-of-text token.

    What stands after the end changes nothing, so padding may be any token.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocessor = TextPreprocessor(config)
        self.trunk = Trunk(config)
        initialise_linears(self.trunk)

    def forward(self, input_ids: Tensor) -> Tensor:
        config, shape = self.config, tuple(input_ids.shape)
        if len(shape) != 2 or not 1 <= shape[1] <= config.max_position_embeddings:
            raise ValueError(
                f"input_ids must be (texts, 1 to {config.max_position_embeddings} tokens), "
                f"not {shape}"
            )
        ends = input_ids == config.eos_token_id  # (C, T)
        endless = (~ends.any(1)).nonzero().flatten().tolist()
        if endless:
            raise ValueError(
                f"text {endless[0]} has no end-of-text token {config.eos_token_id}: "
                "cut it and put that token last"
            )
        features = self.trunk(self.preprocessor(input_ids), is_causal=True)  # (C, T, D)
        last = ends.int().argmax(1)  # the first one that is true
        pooled: Tensor = features[torch.arange(shape[0], device=features.device), last]
        return pooled


class AIMv2LiT(nn.Module):
    """The LiT model, freshly drawn; `config` is kept as the attribute of that name."""

    def __init__(self, config: LiTConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = PooledEncoder(config.vision)
        self.text_encoder = TextEncoder(config.text)
        width = config.projection_dim
        self.image_projector = nn.Linear(config.vision.hidden_size, width, bias=False)
        self.text_projector = nn.Linear(config.text.hidden_size, width, bias=False)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(1 / INITIAL_TEMPERATURE)))
        for projector in (self.image_projector, self.text_projector):
            initialise_linears(projector)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels (B, 3, H, W) as vectors (B, P) of length 1."""
        pooled = self.image_encoder.head(self.image_encoder(pixel_values))  # (B, D)
        return F.normalize(self.image_projector(pooled), dim=-1)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """Token ids (C, T), each text with an end-of-text token, as vectors (C, P) of length 1.

        Raises ValueError for texts that are too long or have no end.
        """
        return F.normalize(self.text_projector(self.text_encoder(input_ids)), dim=-1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """How well each text fits each image: logits (B, C), cosines times the learned scale.

        The scale is at least 1 and at most the config's `max_logit_scale`.
        """
        most = math.log(self.config.max_logit_scale)
        scale = self.log_logit_scale.clamp(0.0, most).exp()
        return scale * self.encode_image(pixel_values) @ self.encode_text(input_ids).t()
