"""AIMv2 encoders as the source of a host's tower: torch is all they need, whatever the host has."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model.encoder import AIMv2Encoder, EncoderConfig
from ..model.hub import locate
from ..model.layouts import load_config
from ..model.preprocessing import Preprocessing
from ..model.weights import read_encoder, resized_config
from .processor import ImageProcessor


class AIMv2Source:
    """An AIMv2 encoder, in any layout that `load_encoder` reads."""

    def __init__(self, location: str, image_size: int | None = None) -> None:
        self.location, self.image_size = location, image_size
        self.folder = locate(location)
        self.config: EncoderConfig = load_config(self.folder)
        if image_size is not None and image_size != self.config.image_size:
            self.config = resized_config(self.config, image_size, self.folder)
        self.native = self.config.native

    def build(self) -> nn.Module:
        """The encoder with weights that are not set, on the CPU."""
        with torch.device("cpu"):
            return self.allocate()

    def allocate(self) -> nn.Module:
        """The encoder on the default device, its weights not set."""
        # A host may be building its whole model on the meta device.
        device = torch.empty(0).device
        with torch.device("meta"):  # draws no random weights
            encoder = AIMv2Encoder(self.config)
        return encoder if device.type == "meta" else encoder.to_empty(device=device)

    def read(self) -> nn.Module:
        """The encoder with its weights, on the CPU; see `read_encoder`."""
        with torch.device("cpu"):
            return read_encoder(self.folder, self.image_size)[0]

    def processor(self) -> ImageProcessor:
        """The folder's image processor, at the encoder's own size."""
        preprocessing = Preprocessing.load(self.folder, image_size=self.config.image_size)
        return ImageProcessor(preprocessing, self.config.patch_size if self.native else None)

    def features(self, network: nn.Module, pixels: Tensor, *, layer: int, save: bool) -> Tensor:
        """The tokens after the final norm for the last layer, and else the residual stream after
        block `layer`; blocks behind it are not run."""
        assert isinstance(network, AIMv2Encoder)
        depth = len(network.trunk.blocks)
        if layer == depth and not save:
            final: Tensor = network(pixels)
            return final
        network.check(pixels)
        tokens: Tensor = network.preprocessor(pixels)
        for block in network.trunk.blocks[:layer]:
            if save and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return network.trunk.post_trunk_norm(tokens) if layer == depth else tokens

    def packed(self, network: nn.Module, images: list[Tensor]) -> list[Tensor]:
        """See `AIMv2Encoder.encode_images`."""
        assert isinstance(network, AIMv2Encoder)
        return network.encode_images(images)
