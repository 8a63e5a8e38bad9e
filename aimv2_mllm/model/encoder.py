"""The AIMv2 vision encoder: a plain Vision Transformer without a class token.

Paper: arXiv 2411.14402. Needs torch (2.1 or newer) and nothing else, so that it can live inside any
host. Parameters bear the words of the original release. Refuses what would silently give other
features: images of another size than the learned positions'.

Letters in shapes: B samples, C channels, H, W pixels, N patches of one sample, S patches of all, D
width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import RMSNorm, Trunk, initialise_linears
from .packed import Packing, prefix_mask
from .positions import sincos_positions


@dataclass(frozen=True)
class EncoderConfig:
    """Every number of an encoder, under the key names of the published `config.json`.

    `native` replaces the learned positions, which fit one image size, by a sine-cosine table
    computed for any grid; `image_size` (pixels) is then only the size that the encoder is meant
    for. Raises ValueError on impossible numbers.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    rms_norm_eps: float = 1e-5
    native: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if name not in ("rms_norm_eps", "native") and not (is_whole and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be above 0, not {self.rms_norm_eps!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.native and self.hidden_size % 4:
            raise ValueError(
                f"native positions need a hidden_size divisible by 4, not {self.hidden_size}"
            )

    @property
    def num_patches(self) -> int:
        """The number of patches of an image of `image_size` x `image_size` pixels."""
        return (self.image_size // self.patch_size) ** 2


class Patchifier(nn.Module):
    """Pixels (B, C, H, W) to normalised patch tokens (B, N, D) in raster order."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.proj(pixel_values).flatten(2).transpose(1, 2))
        return tokens

    def pack(self, images: Sequence[Tensor]) -> Tensor:
        """The tokens (S, D) of images (C, H, W) of any sizes, one image after the other."""
        size = self.proj.stride[0]
        patches = torch.cat(
            [
                image.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).transpose(0, 1)
                for image in images
            ]
        )  # (S, C, patch, patch)
        weight, bias = self.proj.weight.flatten(1), self.proj.bias
        tokens: Tensor = self.norm(F.linear(patches.flatten(1), weight, bias))
        return tokens


class Preprocessor(nn.Module):
    """Patch tokens (B, N, D) with positions added: learned ones, or computed ones if native."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.patchifier = Patchifier(config)
        self.pos_embed: nn.Parameter | None = None
        if not config.native:
            table = torch.empty(1, config.num_patches, config.hidden_size)
            self.pos_embed = nn.Parameter(table)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens: Tensor = self.patchifier(pixel_values)  # (B, N, D)
        return tokens + self._positions(pixel_values.shape, tokens)

    def pack(self, images: Sequence[Tensor]) -> Tensor:
        """The same tokens of images (C, H, W) of any sizes, one image after the other: (S, D)."""
        tokens = self.patchifier.pack(images)
        return tokens + torch.cat([self._positions(image.shape, tokens) for image in images])

    def _positions(self, shape: torch.Size, tokens: Tensor) -> Tensor:
        """The positions (N, D) of an image of that `shape`, of the kind that `tokens` are."""
        if self.pos_embed is not None:
            return self.pos_embed[0]
        size = self.patchifier.proj.stride[0]
        rows, columns = shape[-2] // size, shape[-1] // size
        return sincos_positions(rows, columns, tokens.shape[-1], tokens.device, tokens.dtype)


class AIMv2Encoder(nn.Module):
    """The AIMv2 encoder, freshly drawn; `config` is kept as the attribute of that name."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)
        initialise_linears(self)
        if self.preprocessor.pos_embed is not None:
            nn.init.normal_(self.preprocessor.pos_embed, std=0.02)

    def forward(self, pixel_values: Tensor, prefix_length: Tensor | None = None) -> Tensor:
        """The features (B, N, D) of all patches in raster order, after the final norm.

        `pixel_values` (B, C, H, W) is normalised already. With `prefix_length` (B,) attention is
        the pre-training's (see `prefix_mask`); without it every patch sees every patch. Raises
        ValueError on a size it cannot take.
        """
        self.check(pixel_values)
        tokens = self.preprocessor(pixel_values)  # (B, N, D)
        mask = None if prefix_length is None else prefix_mask(prefix_length, tokens.shape[1])
        features: Tensor = self.trunk(tokens, mask)
        return features

    def encode_images(
        self, images: Sequence[Tensor], prefix_lengths: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The features (N, D) of each image (C, H, W), as `forward` gives them one by one.

        The images may differ in size; they are encoded together, without padding. `prefix_lengths`
        has one number for each image. Raises ValueError on what the encoder cannot take.
        """
        if not images:
            return []
        for image in images:
            self.check(image[None])
        area = self.config.patch_size**2
        num_patches = [image.shape[-2] * image.shape[-1] // area for image in images]
        if prefix_lengths is not None:
            _check_prefixes(prefix_lengths, num_patches)
        # Images of equal length lie side by side, and so share a product in attention.
        order = sorted(range(len(images)), key=num_patches.__getitem__)
        lengths = [num_patches[i] for i in order]
        prefixes = None if prefix_lengths is None else [int(prefix_lengths[i]) for i in order]
        tokens = self.preprocessor.pack([images[i] for i in order])  # (S, D)
        features = torch.split(self.trunk(tokens, Packing(lengths, prefixes)), lengths)
        by_place = dict(zip(order, features, strict=True))
        return [by_place[i] for i in range(len(images))]

    def check(self, pixel_values: Tensor) -> None:
        """ValueError for pixel values of a shape that the encoder cannot take."""
        config, shape = self.config, tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values must be (batch, {config.num_channels}, height, width), not {shape}"
            )
        size = config.patch_size
        if config.native and (shape[2] % size or shape[3] % size or 0 in shape[2:]):
            raise ValueError(
                f"an image of {shape[2]} x {shape[3]} pixels does not divide into patches of "
                f"{size} x {size}: resize height and width to multiples of {size}"
            )
        if not config.native and shape[2:] != (config.image_size, config.image_size):
            raise ValueError(
                f"this encoder has learned positions for {config.image_size} x {config.image_size} "
                f"pixels, and the image has {shape[2]} x {shape[3]}: resize the image, or use an "
                "encoder with native=True"
            )


def _check_prefixes(prefix_lengths: Sequence[int], num_patches: list[int]) -> None:
    if len(prefix_lengths) != len(num_patches):
        raise ValueError(f"{len(prefix_lengths)} prefix_lengths for {len(num_patches)} images")
    for length, most in zip(prefix_lengths, num_patches, strict=True):
        if not 1 <= length <= most:
            raise ValueError(f"prefix_lengths must lie in 1..{most}, and one is {length}")


# The released encoders (paper, table 1, and the hub), whose heads are 128 wide; nano is ours.
SIZES: dict[str, dict[str, int]] = {
    name: {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }
    for name, width, hidden, depth, heads in (
        ("aimv2_nano", 128, 320, 6, 2),
        ("aimv2_base", 768, 2048, 12, 6),
        ("aimv2_large", 1024, 2816, 24, 8),
        ("aimv2_huge", 1536, 4096, 24, 12),
        ("aimv2_1b", 2048, 5632, 24, 16),
        ("aimv2_3b", 3072, 8192, 24, 24),
    )
}


def aimv2_nano(image_size: int = 224, native: bool = False) -> AIMv2Encoder:
    """A new encoder of the project's own small size, for runs on a CPU: 1.2 M parameters."""
    return AIMv2Encoder(EncoderConfig(**SIZES["aimv2_nano"], image_size=image_size, native=native))


def aimv2_base(image_size: int = 224, native: bool = False) -> AIMv2Encoder:
    """A new encoder of size B: 86 M parameters."""
    return AIMv2Encoder(EncoderConfig(**SIZES["aimv2_base"], image_size=image_size, native=native))


def aimv2_large(image_size: int = 224, native: bool = False) -> AIMv2Encoder:
    """A new encoder of size L: 309 M parameters."""
    return AIMv2Encoder(EncoderConfig(**SIZES["aimv2_large"], image_size=image_size, native=native))


def aimv2_huge(image_size: int = 224, native: bool = False) -> AIMv2Encoder:
    """A new encoder of size H: 681 M parameters."""
    return AIMv2Encoder(EncoderConfig(**SIZES["aimv2_huge"], image_size=image_size, native=native))


def aimv2_1b(image_size: int = 224, native: bool = False) -> AIMv2Encoder:
    """A new encoder of size 1B: 1.2 G parameters."""
    return AIMv2Encoder(EncoderConfig(**SIZES["aimv2_1b"], image_size=image_size, native=native))


def aimv2_3b(image_size: int = 224, native: bool = False) -> AIMv2Encoder:
    """A new encoder of size 3B: 2.7 G parameters."""
    return AIMv2Encoder(EncoderConfig(**SIZES["aimv2_3b"], image_size=image_size, native=native))
