"""AIMv2 and our connectors inside nanoVLM, whose source stays as it is.

`install()` makes nanoVLM understand `VLMConfig(vit_model_type="aimv2:SOURCE")` and, after a `#`,
one of our connectors in place of its own: `aimv2:SOURCE#average_pool:factor=2`.
`install("aimv2:SOURCE")` makes that what `VLMConfig()` says, so that nanoVLM's own programs, which
have no flag for the tower, use it.

A saved nanoVLM holds all that it needs: the encoder's numbers in its config, and beside the weights
the mean and deviation of the pixels, which nanoVLM does not normalise.
"""

import sys
from dataclasses import field, fields, make_dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.connectors import build_connector
from ..model.encoder import AIMv2Encoder, EncoderConfig
from ..model.grids import divided
from .nanovlm_compat import install_tokenizer
from .own import AIMv2Source
from .sources import open_source
from .words import OURS, count_tokens, is_ours, read_connector

# What a saved config says of an encoder that computes its positions.
NATIVE = "aimv2-native:"
CONFIG, VLM = "models.config", "models.vision_language_model"  # nanoVLM has no package of its own
# What the plug-in builds on; the last field came in June 2025.
PARTS = ("ViT", "ModalityProjector", "VisionLanguageModel")
FIELDS = ("vit_model_type", "vit_img_size", "mp_pixel_shuffle_factor", "mp_image_token_length")


class AIMv2ViT(nn.Module):
    """nanoVLM's ViT with AIMv2 inside: pixels (B, 3, H, W) in 0..1 to features (B, N, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.encoder = AIMv2Encoder(
            EncoderConfig(
                hidden_size=cfg.vit_hidden_dim,
                intermediate_size=cfg.vit_inter_dim,
                num_hidden_layers=cfg.vit_n_blocks,
                num_attention_heads=cfg.vit_n_heads,
                image_size=cfg.vit_img_size,
                patch_size=cfg.vit_patch_size,
                rms_norm_eps=cfg.vit_ln_eps,
                native=cfg.vit_model_type.startswith(NATIVE),
            )
        )
        # In the checkpoint, for the folder that they come from may be gone when it is loaded.
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    @classmethod
    def from_pretrained(cls, cfg: Any) -> "AIMv2ViT":
        """The tower with the weights that `cfg.vit_model_type` names; writes its numbers to `cfg`.

        UsageError if it does not take images of `cfg.vit_img_size`, for which nanoVLM cuts them.
        """
        name, _ = split(cfg.vit_model_type)
        assert name is not None, cfg.vit_model_type
        source = open_aimv2(name)
        config = _at(source, cfg.vit_img_size)
        for field_name, value in _numbers(config, cfg.vit_model_type).items():
            setattr(cfg, field_name, value)
        tower = cls(cfg)
        tower.encoder.load_state_dict(source.read().state_dict(), strict=True)
        processor = source.processor()
        tower.mean.copy_(torch.tensor(processor.image_mean).view(3, 1, 1))
        tower.std.copy_(torch.tensor(processor.image_std).view(3, 1, 1))
        return tower

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.encoder((pixels.to(self.mean) - self.mean) / self.std)
        return features


def install(tower: str | None = None, **values: Any) -> None:
    """Make nanoVLM understand our words in `VLMConfig.vit_model_type`.

    With `tower`, also make `VLMConfig()` say so, with the numbers that go with it; `values` are
    further fields of it. Call it where `import models` finds nanoVLM, before its `train` or
    `generate` are imported. Raises UsageError, with what to do, where that cannot be.
    """
    config, vlm = _host()
    if not hasattr(vlm.ViT, "original"):
        vlm.ViT = _tower_builder(vlm.ViT)
        vlm.ModalityProjector = _projector_builder(vlm.ModalityProjector)
        install_tokenizer(vlm)
    known = [f.name for f in fields(config.VLMConfig)]
    for name in values:
        if name not in known:
            raise UsageError(f"VLMConfig has no field {name}, and install() was given one")
    if tower is not None:
        values = _default(config.VLMConfig(**values), tower, values.get("vit_img_size")) | values
    new = [
        (name, type(value), field(default_factory=lambda value=value: value))  # type: ignore[misc]
        for name, value in values.items()
    ]
    config.VLMConfig = make_dataclass("VLMConfig", new, bases=(config.VLMConfig,))


def split(word: str) -> tuple[str | None, str | None]:
    """The source and the connector of a `vit_model_type`; None for what is nanoVLM's own."""
    name, _, connector = word.partition("#")
    if name.startswith(NATIVE):
        name = OURS + name.removeprefix(NATIVE)
    return (name, connector or None) if is_ours(name, "nanoVLM") else (None, None)


def open_aimv2(name: str) -> AIMv2Source:
    """The source of a tower's name; UsageError for one that is no AIMv2 encoder."""
    source = open_source(name)
    if not isinstance(source, AIMv2Source):
        raise UsageError(f"vision tower {name!r}: nanoVLM takes {OURS}FOLDER_OR_HUB_ID from us")
    return source


def _host() -> tuple[Any, Any]:
    """nanoVLM's modules of the config and of the model; UsageError for none, or an old one."""
    try:
        config, vlm = import_module(CONFIG), import_module(VLM)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("models", "data"):
            raise  # a library that nanoVLM itself needs
        raise UsageError(
            f"there is no module {error.name}, so nanoVLM is not here: start in its checkout, or "
            "put that on PYTHONPATH"
        ) from None
    absent = [f"{VLM}.{name}" for name in PARTS if not hasattr(vlm, name)]
    known = {f.name for f in fields(config.VLMConfig)}
    absent += [f"VLMConfig.{name}" for name in FIELDS if name not in known]
    if absent:
        raise UsageError(
            f"this nanoVLM has no {absent[0]}: update the checkout (git pull) to June 2025 or later"
        )
    if hasattr(sys.modules.get("train"), "VisionLanguageModel"):
        raise UsageError("nanoVLM's train is imported already: call install() before it")
    return config, vlm


def _tower_builder(original: Any) -> Any:
    """What stands in for nanoVLM's class ViT: ours for our prefix, else the original."""

    class ViT:
        def __new__(cls, cfg: Any) -> Any:
            return cls.chosen(cfg)(cfg)

        @classmethod
        def from_pretrained(cls, cfg: Any) -> Any:
            return cls.chosen(cfg).from_pretrained(cfg)

        @staticmethod
        def chosen(cfg: Any) -> Any:
            return original if split(cfg.vit_model_type)[0] is None else AIMv2ViT

    ViT.original = original  # type: ignore[attr-defined]
    return ViT


def _projector_builder(original: Any) -> Any:
    """What stands in for nanoVLM's class ModalityProjector, whose tokens must be as many as its
    config says; the wrong number would only show in the middle of a run."""

    def projector(cfg: Any) -> nn.Module:
        name, connector = split(cfg.vit_model_type)
        if name is None:
            return original(cfg)  # type: ignore[no-any-return]
        expected = _num_tokens(cfg, connector)
        if cfg.mp_image_token_length != expected:
            raise UsageError(
                f"VLMConfig.mp_image_token_length is {cfg.mp_image_token_length}, and an image of "
                f"{cfg.vit_img_size} pixels becomes {expected} tokens: write {expected}"
            )
        if (words := read_connector(connector)) is None:
            return original(cfg)  # type: ignore[no-any-return]
        name, options = words
        return build_connector(name, cfg.vit_hidden_dim, cfg.lm_hidden_dim, **options)

    return projector


def _num_tokens(cfg: Any, connector: str | None) -> int:
    """How many tokens an image becomes, by our `connector` or by nanoVLM's own."""
    side = cfg.vit_img_size // cfg.vit_patch_size
    if words := read_connector(connector):
        return count_tokens(*words, cfg.vit_hidden_dim, (side, side))
    rows, columns = divided((side, side), cfg.mp_pixel_shuffle_factor, "of nanoVLM")
    return rows * columns


def _default(cfg: Any, tower: str, image_size: int | None) -> dict[str, Any]:
    """The fields of `cfg` that make `tower` the one it names."""
    name, connector = split(tower)
    if name is None:
        raise UsageError(f"vision tower is {tower!r}: type {OURS}FOLDER_OR_HUB_ID")
    source = open_aimv2(name)
    config = source.config if image_size is None else _at(source, image_size)
    numbers = _numbers(config, tower)
    for field_name, value in numbers.items():
        setattr(cfg, field_name, value)
    return {**numbers, "mp_image_token_length": _num_tokens(cfg, connector)}


def _at(source: AIMv2Source, image_size: int) -> EncoderConfig:
    """The encoder of `source` for images of `image_size` pixels; UsageError if it takes others."""
    config, patch = source.config, source.config.patch_size
    if config.native and image_size >= patch and image_size % patch == 0:
        return replace(config, image_size=image_size)
    if image_size != config.image_size:
        takes = f"multiples of {patch}" if config.native else f"{config.image_size}"
        other = "" if config.native else f", or for other sizes {OURS}...?image_size=N in its name"
        raise UsageError(
            f"VLMConfig.vit_img_size is {image_size}, and {OURS}{source.location} takes {takes}: "
            f"write vit_img_size={config.image_size}{other}"
        )
    return config


def _numbers(config: EncoderConfig, word: str) -> dict[str, Any]:
    """What VLMConfig says of an encoder; the rest of `word` after its prefix is kept."""
    rest = word.removeprefix(OURS).removeprefix(NATIVE)
    return {
        "vit_model_type": (NATIVE if config.native else OURS) + rest,
        "vit_hidden_dim": config.hidden_size,
        "vit_inter_dim": config.intermediate_size,
        "vit_patch_size": config.patch_size,
        "vit_img_size": config.image_size,
        "vit_n_heads": config.num_attention_heads,
        "vit_n_blocks": config.num_hidden_layers,
        "vit_ln_eps": config.rms_norm_eps,
        "vit_dropout": 0.0,
        "vit_cls_flag": False,
    }
