"""AIMv2 and our connectors inside TinyLLaVA_Factory, by its own registries: `install()`, once.

Then it takes `--vision_tower aimv2:FOLDER_OR_HUB_ID` and `--connector_type pixel_shuffle:factor=2`.
Its own names stay its own; `aimv2:resampler`, `aimv2:linear` and `aimv2:mlp` are ours.

What it would do wrong with this tower is put right here, and for this tower alone: it reads no
weights of a tower that is no transformers model, asks AutoConfig for a folder's kind, drops a first
token that AIMv2 has not, and its `partially-tune` freezes blocks under names that it does not know.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.connectors import CONNECTORS, build_connector
from ..model.encoder import AIMv2Encoder
from . import tinyllava_compat
from .hosts import host_modules, restore_names
from .sources import SOURCES, open_source
from .tower import WITNESS, VisionTower
from .words import OURS, count_tokens, is_ours, read_connector

HOST = "TinyLLaVA_Factory"
# Its own names, which stay its own: its lookup takes the last key that lies in the name given.
STOCK = ("linear", "mlp", "resampler")
NEEDS = {
    "tinyllava.model.vision_tower": ("VISION_TOWER_FACTORY", "register_vision_tower"),
    "tinyllava.model.connector": ("CONNECTOR_FACTORY", "register_connector"),
    "tinyllava.model.configuration_tinyllava": ("TinyLlavaConfig",),
    "tinyllava.training_recipe.base": ("BaseTrainingRecipe",),
}


class Network(VisionTower):
    """Our tower as TinyLLaVA saves it: by its parameters alone, without the witness."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **more: Any) -> None:
        own = self.vision_tower.state_dict()
        if all(f"{prefix}vision_tower.{name}" in state_dict for name in own):
            state_dict.setdefault(f"{prefix}witness", torch.tensor([WITNESS]))
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


def install() -> None:
    """Register tower and connectors with the `tinyllava` of this process; once is enough.

    Raises UsageError, with what to do, where there is no TinyLLaVA_Factory or one without what this
    builds on.
    """
    restore_names()
    towers, connectors, configuration, recipes = host_modules(HOST, NEEDS)
    registry = towers.VISION_TOWER_FACTORY
    if any(hasattr(tower, "aimv2_mllm") for tower in registry.values()):
        return
    tower = _tower(import_module(f"{towers.__name__}.base"), registry)
    for kind in SOURCES:
        if towers.register_vision_tower(kind)(tower) is not tower:
            raise UsageError(f"this {HOST} has a vision tower {kind} already: remove that one")
    connector = _connector(import_module(f"{connectors.__name__}.base"))
    for name in (*(n for n in CONNECTORS if n not in STOCK), OURS[:-1]):  # the last one wins
        if connectors.register_connector(name)(connector) is not connector:
            raise UsageError(f"this {HOST} has a connector {name} already: remove that one")
    config = configuration.TinyLlavaConfig
    config._load_vision_config = _vision_config(config._load_vision_config)
    recipe = recipes.BaseTrainingRecipe
    recipe._vision_tower_tune_type_setting = _partially(recipe._vision_tower_tune_type_setting)
    tinyllava_compat.install_model()


def train() -> None:
    """TinyLLaVA's training, by its own flags, with our parts in place."""
    install()
    tinyllava_compat.install_training()
    import_module("tinyllava.train.train").train()


def _tower(base: Any, registry: dict[str, type]) -> type:
    """A class of the registry, on TinyLLaVA's own base."""

    class AIMv2Tower(base.VisionTower):  # type: ignore[misc]
        aimv2_mllm = True

        def __new__(cls, cfg: Any) -> Any:
            name = cfg.model_name_or_path
            if is_ours(name, HOST):
                return super().__new__(cls)
            # Our key lies in that name by chance: the last of its own keys that does is meant.
            others = [c for key, c in registry.items() if key.lower() in name.lower()]
            others = [other for other in others if other is not cls]
            if not others:
                raise UsageError(f"vision tower {name!r} is neither {HOST}'s nor {OURS}SOURCE")
            return others[-1](cfg)

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self._vision_tower = Network(cfg.model_name_or_path)
            self._image_processor = self._vision_tower.image_processor
            # It stacks the images of a batch, so all are of one size, of a native encoder's too.
            self._image_processor.patch_size = None

        def _load_model(self, vision_tower_name: str, **options: Any) -> None:
            folder = options.get("pretrained_vision_tower_path")
            if folder is not None:
                weights = torch.load(
                    Path(folder) / "pytorch_model.bin", map_location="cpu", weights_only=True
                )
                self._vision_tower.load_state_dict(weights, strict=True)
            self._vision_tower.load_model()

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            feature = options.get("vision_feature_select_strategy", "patch")
            if feature != "patch":
                raise UsageError(
                    f"mm_vision_select_feature is {feature!r}, and must be patch: "
                    "this tower has no class token"
                )
            network = self._vision_tower
            network.layer = network.counted(options.get("vision_feature_layer", -1))
            features: Tensor = network(x)
            return features

    return AIMv2Tower


def _connector(base: Any) -> type:
    class OurConnector(base.Connector):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__()
            words = read_connector(config.connector_type)
            assert words is not None, config.connector_type
            name, options = words
            vision = config.vision_config
            side = vision.image_size // vision.patch_size
            count_tokens(name, options, vision.hidden_size, (side, side))
            self._connector: nn.Module = build_connector(
                name, config.vision_hidden_size, config.hidden_size, **options
            )

    return OurConnector


def _vision_config(stock: Callable[..., None]) -> Callable[..., None]:
    """TinyLlavaConfig's own, which asks AutoConfig: older ones do not know AIMv2, and newer ones
    take the original layout for an image-text model and give its defaults."""

    @functools.wraps(stock)
    def _load_vision_config(self: Any, vision_config: Any = None) -> None:
        name = self.vision_model_name_or_path
        if not is_ours(name, HOST):
            stock(self, vision_config)
            return
        from transformers import PretrainedConfig

        numbers = open_source(name).config
        keys = ("hidden_size", "image_size", "patch_size", "num_hidden_layers")
        self.vision_config = PretrainedConfig(
            **{key: getattr(numbers, key) for key in keys}, model_name_or_path=name
        )
        self.vision_hidden_size = numbers.hidden_size

    return _load_vision_config


def _partially(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The recipe's own, and `partially-tune` for our blocks too: from a layer on, as it means."""

    @functools.wraps(stock)
    def _vision_tower_tune_type_setting(self: Any, model: Any) -> Any:
        model = stock(self, model)
        arguments, network = self.training_arguments, model.vision_tower.vision_tower
        first = arguments.tune_vision_tower_from_layer
        partially = arguments.tune_type_vision_tower.lower() == "partially-tune"
        ours = isinstance(network, Network)
        if ours and partially and first is not None and first > -1:
            tune_from(network, first)
        return model

    return _vision_tower_tune_type_setting


def tune_from(network: VisionTower, first: int) -> None:
    """Train the blocks of `network` from number `first` on; UsageError where there are none."""
    depth = network.config.num_hidden_layers
    if first >= depth:
        raise UsageError(
            f"tune_vision_tower_from_layer is {first}, and {network.name} has {depth} blocks: "
            f"give a number below {depth}"
        )
    if not isinstance(network.vision_tower, AIMv2Encoder):
        raise UsageError(
            f"tune_type_vision_tower is partially-tune, and {network.name} is not AIMv2's: "
            "give full, or frozen"
        )
    network.requires_grad_(False)
    for block in network.vision_tower.trunk.blocks[first:]:
        block.requires_grad_(True)
