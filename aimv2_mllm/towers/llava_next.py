"""AIMv2 and our connectors inside LLaVA-NeXT, which stays as it is: `install()`, once.

Then it takes `--vision_tower aimv2:FOLDER_OR_HUB_ID` and `--mm_projector_type
pixel_shuffle:factor=2`. Its own names stay its own; `aimv2:linear` and `aimv2:mlp` are ours. Its
package is called `llava`, as LLaVA's is: one of the two in an environment.

It loads a tower inside the outer `from_pretrained`, which then loses the weights again; ours waits
until that is done.
"""

import functools
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from ..errors import UsageError
from ..model.connectors import build_connector
from .hosts import host_modules, restore_names
from .llava import LlavaTower
from .llava_images import install_images, join
from .words import is_ours, read_connector

HOST = "LLaVA-NeXT"
OWN = ("linear", "pooler", "identity", "mlp2x_gelu")
_OWN = re.compile(r"mlp\d+x(_res\d+x)?_gelu")
NEEDS = {
    "llava.model.llava_arch": (
        "build_vision_resampler",  # what LLaVA itself has not
        "LlavaMetaModel",
        "LlavaMetaForCausalLM",
    ),
    "llava.model.multimodal_encoder.builder": ("build_vision_tower",),
    "llava.model.multimodal_projector.builder": ("build_vision_projector",),
}


class NextTower(LlavaTower):
    """A tower with what LLaVA-NeXT reads of it, which never loads while it is built."""

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False, **_: Any) -> None:
        super().__init__(vision_tower, args, delay_load=True)
        if getattr(args, "s2", False):
            raise UsageError(f"s2 is asked for, and {vision_tower} has one scale: leave --s2 out")

    @property
    def image_size(self) -> int:
        """The side of an image or tile, pixels."""
        return self.config.image_size


def install() -> None:
    """Put towers and connectors into the `llava` of this process. A second call changes nothing.

    Raises UsageError, with what to do, where there is no LLaVA-NeXT.
    """
    restore_names()
    arch, towers, projectors = host_modules(HOST, NEEDS)
    if getattr(arch, "aimv2_mllm", False):
        return
    tower_builder = _tower_builder(towers.build_vision_tower)
    projector_builder = _projector_builder(projectors.build_vision_projector)
    # llava_arch has bound both names at its import.
    towers.build_vision_tower = arch.build_vision_tower = tower_builder
    projectors.build_vision_projector = arch.build_vision_projector = projector_builder
    model = arch.LlavaMetaModel
    model.__init__ = _then(model.__init__, _join)
    model.initialize_vision_modules = _then(model.initialize_vision_modules, _load)
    install_images(arch.LlavaMetaForCausalLM)
    arch.aimv2_mllm = True


def train() -> None:
    """LLaVA-NeXT's training, by its own flags, with our parts in place.

    On libraries of its time (transformers 4.40): its trainer does not fit newer ones.
    """
    install()
    program: Any = import_module("llava.train.train")
    own = program.LLaVATrainer
    loop = vars(own).get("_inner_training_loop")
    # At df17966 it has a loop of its own, of which half the names are imported nowhere.
    if loop is not None and "DebugOption" not in loop.__globals__:
        del own._inner_training_loop
    program.train()


def _tower_builder(stock: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(stock)
    def build_vision_tower(config: Any, **options: Any) -> nn.Module:
        # From a model's config, or from the arguments of training.
        name = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None)
        if not is_ours(name, HOST):
            return stock(config, **options)
        return NextTower(str(name), config, **options)

    return build_vision_tower


def _projector_builder(stock: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(stock)
    def build_vision_projector(config: Any, *rest: Any, **options: Any) -> nn.Module:
        name = getattr(config, "mm_projector_type", "linear")
        words = None if _OWN.fullmatch(name) else read_connector(name, OWN)
        if words is None:
            return stock(config, *rest, **options)
        connector, chosen = words
        return build_connector(connector, config.mm_hidden_size, config.hidden_size, **chosen)

    return build_vision_projector


def _then(method: Callable[..., None], after: Callable[[Any], None]) -> Callable[..., None]:
    """`method` of the model, and then `after` it where its tower is ours."""

    @functools.wraps(method)
    def both(self: Any, *rest: Any, **options: Any) -> None:
        method(self, *rest, **options)
        if isinstance(self.get_vision_tower(), NextTower):
            after(self)

    return both


def _join(model: Any) -> None:
    join(model.get_vision_tower(), model.mm_projector, model.config)


def _load(model: Any) -> None:
    # Before the trainer says what is trained, for loading freezes.
    model.get_vision_tower().load_model()
    _join(model)
