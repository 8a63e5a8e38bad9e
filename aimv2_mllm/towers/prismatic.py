"""AIMv2 and our connectors inside prismatic-vlms, by its registry: `install()`, once.

Then it takes `--model.vision_backbone_id aimv2:FOLDER_OR_HUB_ID` and, for
`--model.arch_specifier`, `pixel_shuffle:factor=2`, also as `no-align+pixel_shuffle:factor=2`.
Its own names stay its own; `aimv2:linear` is ours.

A backbone that was trained (stage `full-finetune`) stands in its checkpoint, and it does not read
it again; of our backbones it does with this plug-in.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.distributed.fsdp import wrap

from ..errors import UsageError
from ..model.blocks import Block
from ..model.connectors import Connector, build_connector
from ..model.preprocessing import Preprocessing
from .hosts import host_modules
from .sources import open_source
from .words import count_tokens, is_ours, read_connector

HOST = "prismatic-vlms"
OWN = ("linear", "gelu-mlp", "fused-gelu-mlp")
NEEDS = {
    "prismatic.models.materialize": ("VISION_BACKBONES", "get_vision_backbone_and_transform"),
    "prismatic.models.backbones.vision": ("VisionBackbone",),
    "prismatic.models.vlms": ("PrismaticVLM",),
}
STRATEGIES = ("resize-naive", "resize-crop", "letterbox")


@dataclass
class ImageTransform:
    """A picture of Pillow to pixel values (3, S, S), made square by one of prismatic's ways."""

    preprocessing: Preprocessing
    strategy: str

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UsageError(
                f"image_resize_strategy is {self.strategy!r}, and must be one of "
                f"{', '.join(STRATEGIES)}"
            )
        self.preprocessing = replace(self.preprocessing, squash=self.strategy == "resize-naive")

    def __call__(self, img: Image.Image, **_: Any) -> Tensor:
        if self.strategy == "letterbox":
            red, green, blue = (int(value * 255) for value in self.preprocessing.mean)
            x, y = ((max(img.size) - length) // 2 for length in img.size)
            img = ImageOps.expand(img.convert("RGB"), (x, y, x, y), (red, green, blue))
        return self.preprocessing.prepare([img])[0]


def install() -> None:
    """Make the registry of this process's `prismatic` know our towers, and its VLM our connectors.

    Once is enough. Raises UsageError, with what to do, where there is no prismatic-vlms or one
    without what this builds on.
    """
    materialize, vision, vlms = host_modules(HOST, NEEDS)
    if isinstance(materialize.VISION_BACKBONES, Backbones):
        return
    backbone = _backbone(vision.VisionBackbone)
    materialize.VISION_BACKBONES = Backbones(materialize.VISION_BACKBONES, backbone)
    vlm = vlms.PrismaticVLM
    vlm.__init__ = _with_connector(vlm.__init__)
    vlm.get_fsdp_wrapping_policy = _with_policy(vlm.get_fsdp_wrapping_policy)
    vlm.from_pretrained = classmethod(_with_backbone(vlm.from_pretrained.__func__))


class Backbones(dict[str, Any]):
    """The registry, in which every word for a tower of ours is a key, though it names none."""

    def __init__(self, stock: dict[str, Any], backbone: type) -> None:
        super().__init__(stock)
        self.backbone = backbone

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or is_ours(key, HOST)

    def __missing__(self, key: str) -> dict[str, Any]:
        if not is_ours(key, HOST):
            raise KeyError(key)
        return {"cls": self.backbone, "kwargs": {}}


def _backbone(base: Any) -> type:
    """A class of the registry, on prismatic's own base."""

    class Backbone(base):  # type: ignore[misc]
        aimv2_mllm = True

        def __init__(self, vision_backbone_id: str, image_resize_strategy: str) -> None:
            source = open_source(vision_backbone_id)
            super().__init__(vision_backbone_id, image_resize_strategy, source.config.image_size)
            self.source, self.dtype = source, torch.bfloat16
            self.featurizer = source.read().float().eval()
            # Squares also for a native encoder, for prismatic stacks the images of a batch.
            preprocessing = source.processor().preprocessing
            self.image_transform = ImageTransform(preprocessing, image_resize_strategy)

        def forward(self, pixel_values: Tensor) -> Tensor:
            pixels = pixel_values.to(next(self.featurizer.parameters()).dtype)
            last = self.source.config.num_hidden_layers
            return self.source.features(self.featurizer, pixels, layer=last, save=False)

        def get_fsdp_wrapping_policy(self) -> Callable[..., bool]:
            whole = functools.partial(
                wrap._module_wrap_policy, module_classes={type(self.featurizer)}
            )
            blocks = functools.partial(
                wrap.transformer_auto_wrap_policy, transformer_layer_cls={Block}
            )
            return functools.partial(wrap._or_policy, policies=[whole, blocks])

        @property
        def default_image_resolution(self) -> tuple[int, int, int]:
            return (3, self.default_image_size, self.default_image_size)

        @property
        def embed_dim(self) -> int:
            width: int = self.source.config.hidden_size
            return width

        @property
        def num_patches(self) -> int:
            side: int = self.default_image_size // self.source.config.patch_size
            return side * side

        @property
        def half_precision_dtype(self) -> torch.dtype:
            return self.dtype

    return Backbone


def _with_connector(stock: Callable[..., None]) -> Callable[..., None]:
    """PrismaticVLM's own `__init__`, which knows its own projectors alone, and then ours in it."""

    @functools.wraps(stock)
    def __init__(  # noqa: N807
        self: Any, model_id: str, vision_backbone: Any, llm_backbone: Any, **options: Any
    ) -> None:
        specifier = options.get("arch_specifier", "gelu-mlp")
        # `no-align+` may stand before it.
        words = read_connector(specifier.rpartition("+")[2], OWN)
        if words is None:
            stock(self, model_id, vision_backbone, llm_backbone, **options)
            return
        name, chosen = words
        side = round(vision_backbone.num_patches**0.5)
        width = vision_backbone.embed_dim
        count_tokens(name, chosen, width, (side, side))
        options["arch_specifier"] = "linear"
        stock(self, model_id, vision_backbone, llm_backbone, **options)
        torch.manual_seed(width)  # as prismatic draws its own
        self.projector = build_connector(name, width, llm_backbone.embed_dim, **chosen)
        self.arch_specifier = specifier

    return __init__


def _with_policy(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Its FSDP policy, which wraps the projector on its own too where it is ours."""

    @functools.wraps(stock)
    def get_fsdp_wrapping_policy(self: Any) -> Any:
        policy = stock(self)
        if not isinstance(self.projector, Connector):
            return policy
        ours = functools.partial(wrap._module_wrap_policy, module_classes={type(self.projector)})
        return functools.partial(wrap._or_policy, policies=[policy, ours])

    return get_fsdp_wrapping_policy


def _with_backbone(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Its `from_pretrained`, which also reads a backbone of ours that the checkpoint holds."""

    @functools.wraps(stock)
    def from_pretrained(cls: type, pretrained_checkpoint: Any, *rest: Any, **options: Any) -> Any:
        vlm = stock(cls, pretrained_checkpoint, *rest, **options)
        if getattr(vlm.vision_backbone, "aimv2_mllm", False):
            # Mapped, for the LLM's weights are in the file too, and have been read.
            held = torch.load(
                str(pretrained_checkpoint), map_location="cpu", mmap=True, weights_only=True
            )["model"]
            if "vision_backbone" in held:
                vlm.vision_backbone.load_state_dict(held["vision_backbone"], strict=True)
        return vlm

    return from_pretrained
