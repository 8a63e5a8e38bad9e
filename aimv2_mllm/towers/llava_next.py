"""AIMv2 and our connectors inside LLaVA-NeXT, which stays as it is: `install()`, once.

Then it takes `--vision_tower aimv2:FOLDER_OR_HUB_ID` and `--mm_projector_type
pixel_shuffle:factor=2`. Its own names stay its own; `aimv2:linear` and `aimv2:mlp` are ours. Its
package is called `llava`, as LLaVA's is: one of the two in an environment.

It loads a tower inside the outer `from_pretrained`, which then loses the weights again; ours waits
until that is done.
"""

import functools
import re
from importlib import import_module
from typing import Any

from ..errors import UsageError
from .hosts import host_modules, restore_names
from .llava import LlavaTower, join_model, projector_builder, then, tower_builder
from .llava_connectors import build_projector
from .llava_images import install_images
from .words import is_ours

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
    is_next = functools.partial(is_ours, host=HOST)
    build = functools.partial(build_projector, own=OWN, pattern=_OWN)
    # llava_arch has bound both names at its import.
    towers.build_vision_tower = arch.build_vision_tower = tower_builder(
        towers.build_vision_tower, is_next, NextTower
    )
    projectors.build_vision_projector = arch.build_vision_projector = projector_builder(
        projectors.build_vision_projector, build
    )
    model = arch.LlavaMetaModel
    model.__init__ = then(model.__init__, join_model)
    model.initialize_vision_modules = then(model.initialize_vision_modules, _load)
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


def _load(model: Any) -> None:
    # Before the trainer says what is trained, for loading freezes.
    model.get_vision_tower().load_model()
    join_model(model)
