"""A Llava of any tower and any connector, where transformers' own cannot express the pair.

Importing this module makes transformers' Auto classes know it, as `model_type` aimv2_mllm_llava.
Whoever loads such a folder needs this package: `aimv2_mllm.load_model`, or
`import aimv2_mllm.model.llava` before transformers' own `from_pretrained`.

Letters in shapes: B pictures, H, W pixels, N patches and M tokens of one picture, D and E widths.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
)
from transformers.image_utils import SizeDict
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import ImagesKwargs

from aimv2_mllm.model.connectors import Connector, build_connector
from aimv2_mllm.model.families import chosen_layers, grid_of, read_patches
from aimv2_mllm.model.grids import Grid, fitting_grid

MODEL_TYPE = "aimv2_mllm_llava"


class AnyLlavaConfig(LlavaConfig):
    """A Llava's configuration, with the `tower`'s family, whether its features come after its last
    norm ("post") or before ("pre"), and the `connector`: its name, and its options."""

    model_type = MODEL_TYPE

    tower: str = "aimv2"
    vision_feature_norm: str = "post"
    connector: dict[str, Any] | None = None


class AnyLlavaModel(LlavaModel):
    """Llava's body with a connector of ours, which reads patch tokens and nothing else."""

    config: AnyLlavaConfig

    def __init__(self, config: AnyLlavaConfig) -> None:
        super().__init__(config)
        depth = self.vision_tower.config.num_hidden_layers
        self.layers = chosen_layers(config.vision_feature_layer, depth)
        width = self.vision_tower.config.hidden_size * len(self.layers)
        assert config.connector is not None, "a default is there for transformers alone"
        self.multi_modal_projector = build_connector(
            **config.connector, in_features=width, out_features=config.text_config.hidden_size
        )
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """The LLM's embeddings of each picture as `pooler_output`, a list of (M, E).

        `image_sizes` (B, 2) are height and width of pictures which lie in the corner of
        `pixel_values` (B, 3, H, W); those of one size go through the tower together.
        """
        size = tuple(pixel_values.shape[-2:])
        sizes = [size] * len(pixel_values) if image_sizes is None else image_sizes.tolist()
        places: dict[tuple[int, int], list[int]] = {}
        for index, (height, width) in enumerate(sizes):
            places.setdefault((height, width), []).append(index)
        embedded: dict[int, Tensor] = {}
        for (height, width), indices in places.items():
            pictures = pixel_values[indices, :, :height, :width].to(self.vision_tower.dtype)
            embedded |= zip(indices, self._connected(pictures), strict=True)
        return BaseModelOutputWithPooling(pooler_output=[embedded[i] for i in range(len(sizes))])

    def _connected(self, pictures: Tensor) -> Tensor:
        tower, config = self.vision_tower, self.config
        tokens = read_patches(
            config.tower, tower, pictures, self.layers, config.vision_feature_norm
        )  # (B, N, D)
        connected: Tensor = self.multi_modal_projector(
            tokens, grid_of(pictures.shape, tower.config)
        )
        return connected


class AnyLlava(LlavaForConditionalGeneration):
    """Llava with any tower of ours and any connector."""

    config: AnyLlavaConfig

    def __init__(self, config: AnyLlavaConfig) -> None:
        # Llava's own __init__ would draw a whole second model.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = AnyLlavaModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


class NativeImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What else `NativeImageProcessor` is told: the side of a patch in pixels, and of what number
    of patches rows and columns must be multiples."""

    patch_size: int
    unit: int


class NativeImageProcessor(CLIPImageProcessorPil):
    """Pictures in their own aspect ratio, with as many patches as a square of `crop_size` has.

    They lie in the upper left corner of `pixel_values` (B, 3, H, W), zeros elsewhere;
    `image_sizes` (B, 2) says how high and wide each is.
    """

    valid_kwargs = NativeImagesKwargs
    patch_size = 14
    unit = 1
    do_center_crop = False
    model_input_names = ("pixel_values", "image_sizes")

    def _preprocess(
        self,
        images: Sequence[np.ndarray],
        *,
        crop_size: SizeDict,
        patch_size: int,
        unit: int,
        return_tensors: Any = None,
        **words: Any,
    ) -> BatchFeature:
        most = (crop_size.height // patch_size) ** 2
        shapes = [image.shape[-2:] for image in images]  # (3, H, W) each
        grids = [fitting_grid(height, width, most, unit=unit) for height, width in shapes]
        sizes = np.array(grids) * patch_size
        values = np.zeros((len(images), 3, *sizes.max(axis=0)), dtype=np.float32)
        for image, row, (height, width) in zip(images, values, sizes.tolist(), strict=True):
            whole = {**words, "size": SizeDict(height=height, width=width), "crop_size": crop_size}
            made = super()._preprocess([image], return_tensors=None, **whole)
            row[:, :height, :width] = made["pixel_values"][0]
        data = {"pixel_values": values, "image_sizes": sizes}
        return BatchFeature(data=data, tensor_type=return_tensors)


class AnyLlavaProcessor(LlavaProcessor):
    """Llava's processor, where a `connector` says how many tokens a picture becomes.

    `connector` has its name, `in_features`, `out_features` and options.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        connector: dict[str, Any] | None = None,
    ) -> None:
        self.connector = connector
        with torch.device("meta"):
            self._counter: Connector = build_connector(**(connector or {}))
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy="full",
            chat_template=chat_template,
            image_token=image_token,
        )

    def num_image_tokens(self, grid: Grid) -> int:
        """How many tokens come of a picture of `grid` (rows, columns) of patches."""
        return self._counter.num_tokens(grid)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        height, width = (
            image_inputs["image_sizes"][image_idx]
            if "image_sizes" in image_inputs
            else image_inputs["pixel_values"][image_idx].shape[-2:]
        )
        grid = int(height) // self.patch_size, int(width) // self.patch_size
        return str(self.image_token * self.num_image_tokens(grid))


AutoConfig.register(MODEL_TYPE, AnyLlavaConfig)
AutoModelForImageTextToText.register(AnyLlavaConfig, AnyLlava)
AutoImageProcessor.register(AnyLlavaConfig, slow_image_processor_class=NativeImageProcessor)
AutoProcessor.register(AnyLlavaConfig, AnyLlavaProcessor)
