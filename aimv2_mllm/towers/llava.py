"""AIMv2 towers and our connectors inside LLaVA, which stays as it is: `install()`, once.

Then LLaVA takes `--vision_tower aimv2:FOLDER_OR_HUB_ID` and, for `--mm_projector_type`, the names
of `CONNECTORS` with their options, as in `pixel_shuffle:factor=2`. LLaVA 1.2 and newer: git
c121f04, and `llava-torch` 1.2.2.post1 on PyPI.

LLaVA's own names go to LLaVA, but for folders of other encoders, which it would take for CLIP and
fill with random weights.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import UsageError
from ..folders import CONFIG_FILE, config_of
from .llava_compat import install_generation
from .llava_connectors import build_projector
from .llava_images import install_images, join
from .tower import VisionTower
from .words import is_ours

HOST = "LLaVA"
INSTALL = (
    "pip install 'aimv2-mllm[llava]' (its pinned libraries), or beside current libraries "
    "pip install --no-deps llava-torch==1.2.2.post1"
)
CLIP_TYPES = ("clip", "clip_vision_model")


class LlavaTower(VisionTower):
    """A tower with the constructor and the properties that LLaVA reads."""

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False, **_: Any) -> None:
        super().__init__(vision_tower, layer=getattr(args, "mm_vision_select_layer", -1))
        feature = getattr(args, "mm_vision_select_feature", "patch")
        if feature not in ("patch", "cls_patch"):
            raise UsageError(
                f"mm_vision_select_feature is {feature!r}, and must be patch: "
                "this tower has no class token"
            )
        side = self.config.image_size // self.config.patch_size
        # As LLaVA counts, of an image of `image_size`: the connector's tokens, once it is known.
        self.num_patches = side * side
        self.num_patches_per_side = side
        if not delay_load:
            self.load_model()

    @property
    def hidden_size(self) -> int:
        """The width of the tokens."""
        return self.config.hidden_size


def install() -> None:
    """Put towers and connectors into the `llava` of this process. A second call changes nothing.

    Raises UsageError where there is no LLaVA, or one that this was not made for.
    """
    arch: Any = host()
    if getattr(arch, "aimv2_mllm", False):
        return
    towers: Any = importlib.import_module("llava.model.multimodal_encoder.builder")
    projectors: Any = importlib.import_module("llava.model.multimodal_projector.builder")
    # llava_arch has bound both names at its import.
    builder = tower_builder(towers.build_vision_tower, meant_for_us, LlavaTower)
    for module in (towers, arch):
        module.build_vision_tower = builder
    builder = projector_builder(projectors.build_vision_projector, build_projector)
    for module in (projectors, arch):
        module.build_vision_projector = builder
    meta = arch.LlavaMetaModel
    meta.__init__ = then(meta.__init__, join_model)
    meta.initialize_vision_modules = then(meta.initialize_vision_modules, join_model)
    install_images(arch.LlavaMetaForCausalLM)
    install_generation()
    arch.aimv2_mllm = True


def host() -> ModuleType:
    """LLaVA's module of model parts; UsageError with what to do where it is another or none."""
    try:
        # Not `llava.model`, which swallows what went wrong below it.
        importlib.import_module("llava.model.language_model.llava_llama")
        arch = importlib.import_module("llava.model.llava_arch")
    except ImportError as error:
        if error.name == "llava":
            raise UsageError(f"there is no llava here: {INSTALL}") from None
        raise UsageError(
            f"the package llava in {_folder('llava')} cannot be imported ({error})"
        ) from None
    where = Path(str(arch.__file__)).parents[1]
    if not hasattr(arch, "LlavaMetaForCausalLM") or hasattr(arch, "build_vision_resampler"):
        raise UsageError(
            f"the package llava in {where} is not LLaVA but another of that name (LLaVA-NeXT?): "
            f"in an environment of its own, {INSTALL}"
        )
    prepare = arch.LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal
    if "image_sizes" not in inspect.signature(prepare).parameters:
        raise UsageError(f"the llava in {where} is older than 1.2, the first that works: {INSTALL}")
    return arch


def _folder(package: str) -> str:
    spec = importlib.util.find_spec(package)
    return ", ".join(spec.submodule_search_locations or []) if spec else "?"


def meant_for_us(name: object) -> bool:
    """Whether the tower `name` is ours; UsageError for another that LLaVA would take for CLIP's."""
    if is_ours(name, HOST):
        return True
    if isinstance(name, str) and (Path(name) / CONFIG_FILE).is_file():
        config = config_of(Path(name), "give the folder of a tower")
        kind = config.get("model_type") or config.get("architecture")
        if kind not in (None, *CLIP_TYPES):
            raise UsageError(
                f"vision tower {name} is a {kind}, and {HOST} would take it for CLIP: "
                f"type hf:{name}"
            )
    return False


def beside(name: str, config: Any) -> str:
    """A tower's `name`, its path beside the model's folder where the model's `config` names it so:
    `aimv2:./FOLDER` in a config.json is the folder next to that file, wherever both were moved.

    A path that starts otherwise, or is not there, is as it was typed.
    """
    kind, _, place = name.partition(":")
    path, _, query = place.partition("?")
    folder = Path(getattr(config, "_name_or_path", None) or "")
    if not path.startswith("./") or not (folder / path).is_dir():
        return name
    return f"{kind}:{folder / path}{f'?{query}' if query else ''}"


def tower_builder(
    stock: Callable[..., nn.Module], is_meant: Callable[[object], bool], tower: type[LlavaTower]
) -> Callable[..., nn.Module]:
    """The host's builder of towers, which builds a `tower` where the name is ours."""

    @functools.wraps(stock)
    def build_vision_tower(config: Any, **options: Any) -> nn.Module:
        # From a model's config, or from the arguments of training.
        name = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_tower", None)
        if not is_meant(name):
            return stock(config, **options)
        return tower(beside(str(name), config), config, **options)

    return build_vision_tower


def projector_builder(
    stock: Callable[..., nn.Module], build: Callable[[Any], nn.Module | None]
) -> Callable[..., nn.Module]:
    """The host's builder of projectors, and before it ours, which knows its own names."""

    @functools.wraps(stock)
    def build_vision_projector(config: Any, *rest: Any, **options: Any) -> nn.Module:
        ours = build(config)
        return stock(config, *rest, **options) if ours is None else ours

    return build_vision_projector


def then(method: Callable[..., None], after: Callable[[Any], None]) -> Callable[..., None]:
    """`method` of the host's model, and then `after` it where the tower is ours."""

    @functools.wraps(method)
    def both(self: Any, *rest: Any, **options: Any) -> None:
        method(self, *rest, **options)
        if isinstance(self.get_vision_tower(), LlavaTower):
            after(self)

    return both


def join_model(model: Any) -> None:
    """Tell the tower of the host's `model` what its projector makes of the grid."""
    join(model.get_vision_tower(), model.mm_projector, model.config)
