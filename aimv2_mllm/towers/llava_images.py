"""Images on their way through LLaVA: grids that are not square, and images of different sizes.

LLaVA joins the images of a batch into one tensor, so images of different sizes die there; and it
tells a projector nothing of the grid. Both are wrapped here for our towers, and for no other.
"""

import functools
import math
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from ..model.connectors import Connector
from .tower import VisionTower


class NativeBatch:
    """Images (1, 3, H, W) of different sizes, which LLaVA takes for one tensor of images: it is no
    list and has four dimensions."""

    ndim = 4

    def __init__(self, images: list[Tensor]) -> None:
        self.images = [image if image.ndim == 4 else image[None] for image in images]


def join(tower: Any, projector: nn.Module, config: Any) -> None:
    """Tell `tower` how many tokens `projector` makes of an image, as LLaVA asks the tower for it.

    UsageError for a grid that the projector cannot serve, and for a merge of tiles that needs a
    grid where the projector leaves none.
    """
    side = tower.config.image_size // tower.config.patch_size
    out: tuple[int, int] | None = (side, side)
    tower.num_patches = side * side
    if isinstance(projector, Connector):
        out = projector.out_grid((side, side))
        tower.num_patches = projector.num_tokens((side, side))
        tower.image_processor.multiple = getattr(projector, "factor", None) or 1
    merge = getattr(config, "mm_patch_merge_type", None) or "flat"
    if merge != "flat" and (out is None or out[0] != out[1]):
        raise UsageError(
            f"mm_patch_merge_type {merge} lays tokens on a square grid, and "
            f"{config.mm_projector_type} leaves none: give --mm_patch_merge_type flat"
        )
    tower.num_patches_per_side = out[0] if out else math.isqrt(tower.num_patches)


def install_images(model: Any) -> None:
    """Wrap the two methods of LLaVA's `LlavaMetaForCausalLM` that images go through."""
    stock_encode = model.encode_images
    stock_prepare = model.prepare_inputs_labels_for_multimodal

    @functools.wraps(stock_encode)
    def encode_images(self: Any, images: Any) -> Any:
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        if isinstance(images, NativeBatch):
            features = tower(images.images)  # a list of (1, N, D)
            sized = zip(features, images.images, strict=True)
            return [project(projector, f, tower.grid(image))[0] for f, image in sized]
        if isinstance(tower, VisionTower):
            return project(projector, tower(images), tower.grid(images))
        return stock_encode(self, images)

    @functools.wraps(stock_prepare)
    def prepare_inputs_labels_for_multimodal(
        self: Any, input_ids: Any, position_ids: Any, attention_mask: Any,
        past_key_values: Any, labels: Any, images: Any, *rest: Any, **more: Any,
    ) -> Any:  # fmt: skip
        if isinstance(self.get_vision_tower(), VisionTower) and _differ(images):
            merge = getattr(self.config, "mm_patch_merge_type", "flat")
            if merge != "flat":
                raise UsageError(
                    f"images of different sizes have no tiles that mm_patch_merge_type {merge} "
                    "could merge: give --mm_patch_merge_type flat"
                )
            images = NativeBatch(images)
        return stock_prepare(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
            *rest, **more,
        )  # fmt: skip

    model.encode_images = encode_images
    model.prepare_inputs_labels_for_multimodal = prepare_inputs_labels_for_multimodal


def _differ(images: Any) -> bool:
    """Whether `images` are single images of different sizes, and not tiles or one tensor."""
    if not isinstance(images, list):
        return False
    single = all(image.ndim == 3 or image.shape[0] == 1 for image in images)
    return single and len({tuple(image.shape[-2:]) for image in images}) > 1


def project(projector: nn.Module, features: Tensor, grid: tuple[int, int]) -> Tensor:
    """The embeddings (B, M, E) that `projector`, LLaVA's or ours, makes of features (B, N, D)."""
    embedded: Tensor = (
        projector(features, grid) if isinstance(projector, Connector) else projector(features)
    )
    return embedded
