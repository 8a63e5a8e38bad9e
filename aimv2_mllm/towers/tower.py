"""The tower that every host gets: right weights, whoever loads them and when.

A host builds a tower inside its own `from_pretrained`, whose checkpoint may hold the tower's
weights (a tuned tower), or not (a projector, an adapter). So building only allocates, and
`load_model` decides afterwards: a witness among the weights is there only if the checkpoint held
this tower; without it the weights come from the source. Never neither, never half of each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .sources import TowerConfig, open_source

WITNESS = 0x41494D7632546F77  # "AIMv2Tow": memory that nobody has set will not hold it
CHECKPOINT = "checkpoint"


class VisionTower(nn.Module):
    """The tower `name` (see `sources`), frozen; its weights are those of no one until `load_model`.

    `layer` counts as transformers' `hidden_states`: -1 is the last, which AIMv2 gives after its
    final norm; other layers are as the blocks leave them. The network lies in `vision_tower`, the
    word hosts look for. Raises UsageError for a name or a layer that is not there.
    """

    def __init__(self, name: str, *, layer: int = -1) -> None:
        super().__init__()
        self.name = name
        self.source = open_source(name)
        self.layer = self.counted(layer)
        self.vision_tower = self.source.allocate().requires_grad_(False)
        self.witness: Tensor
        self.register_buffer("witness", torch.zeros(1, dtype=torch.int64))
        self.image_processor = self.source.processor()
        self.is_loaded = False
        self.origin: str | None = None  # where the weights came from, once they did
        self.gradient_checkpointing = False  # hosts set it on every module that has it

    def counted(self, layer: int) -> int:
        """`layer` counted from the first; UsageError where there is none."""
        depth = self.source.config.num_hidden_layers
        if not -depth - 1 <= layer <= depth:
            raise UsageError(
                f"layer {layer} is asked of {self.name}, which has {depth}: give -1 for its "
                f"features, or a number from {-depth - 1} to {depth}"
            )
        return layer if layer >= 0 else depth + 1 + layer

    def load_model(self, device_map: Any = None, **_: Any) -> None:
        """Make the weights what they must be, and freeze them. A second call changes nothing.

        A host may name a device, or a map of modules to devices.
        """
        if not self.is_loaded:
            whole = self._witnessed and not any(p.is_meta for p in self.vision_tower.parameters())
            if not whole:
                self._fill()
            elif any(True for _ in self.vision_tower.buffers()):
                self._restore_buffers(self.source.build())
            self.origin = CHECKPOINT if whole else self.name
            demand_finite(self.vision_tower, self.origin)
            # Loaders of transformers 5 make every parameter anew, and trainable.
            self.vision_tower.requires_grad_(False)
            self.is_loaded = True
        if isinstance(device_map, dict):
            device_map = device_map.get("")
        if device_map not in (None, "auto"):
            self.to(device_map)

    def _fill(self) -> None:
        """Set every weight to the source's, in the dtype and on the device they have here."""
        network, own = self.source.read(), self.vision_tower.state_dict()
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        if any(own[n].shape != tensor.shape for n, tensor in network.state_dict().items()):
            # A loader that quantises has replaced the layers: the tower stays as it is.
            self.vision_tower = network.to(device=device, dtype=self.dtype)
        else:
            if any(tensor.is_meta for tensor in own.values()):
                self.vision_tower.to_empty(device=device)
            # In place: an optimizer may hold these parameters already.
            self.vision_tower.load_state_dict(network.state_dict(), strict=True)
            self._restore_buffers(network)
        self.witness = torch.tensor([WITNESS], dtype=torch.int64, device=device)

    def _restore_buffers(self, network: nn.Module) -> None:
        """Set the buffers that no checkpoint holds to those of `network`: a loader that makes a
        model without memory leaves them as whatever was there."""
        saved = self.vision_tower.state_dict().keys()
        for name, buffer in network.named_buffers():
            if name not in saved:
                module, _, last = name.rpartition(".")
                place = self.vision_tower.get_submodule(module)
                setattr(place, last, buffer.to(self.device))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        # A part of the tower, as adapters bring of a tuned one, lies upon the source's weights. A
        # shard may be a part too: its witness came before, or the others come after.
        brought = any(name.startswith(f"{prefix}vision_tower.") for name in state_dict)
        witnessed = f"{prefix}witness" in state_dict or self._witnessed
        if brought and not witnessed and not self.is_loaded:
            self.load_model()
            self.origin = CHECKPOINT
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)

    def forward(self, images: Tensor | Sequence[Tensor]) -> Any:
        """Patch tokens (B, N, D) of images (B, 3, H, W), in their dtype; of a list of images
        (3, H, W) or (1, 3, H, W), a list of (1, N, D)."""
        self.load_model()
        trains = torch.is_grad_enabled() and self.trainable
        with torch.set_grad_enabled(trains):
            if isinstance(images, Tensor):
                return self._encode(images)
            one_by_one = [image if image.ndim == 4 else image[None] for image in images]
            if self.source.native and self.layer == self.config.num_hidden_layers:
                return self._encode_packed(one_by_one)
            return [self._encode(image) for image in one_by_one]

    def _encode(self, images: Tensor) -> Tensor:
        pixels = images.to(device=self.device, dtype=self.dtype)
        save = self.gradient_checkpointing and self.training
        return self.source.features(self.vision_tower, pixels, layer=self.layer, save=save).to(
            images.dtype
        )

    def _encode_packed(self, images: list[Tensor]) -> list[Tensor]:
        pixels = [image[0].to(device=self.device, dtype=self.dtype) for image in images]
        tokens = self.source.packed(self.vision_tower, pixels)
        return [t[None].to(image.dtype) for t, image in zip(tokens, images, strict=True)]

    def train(self, mode: bool = True) -> "VisionTower":
        """Only a tower that is trained leaves evaluation mode."""
        super().train(mode and self.trainable)
        return self

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of images (..., H, W)."""
        size = self.config.patch_size
        return images.shape[-2] // size, images.shape[-1] // size

    @property
    def _witnessed(self) -> bool:
        return not self.witness.is_meta and int(self.witness) == WITNESS

    @property
    def config(self) -> TowerConfig:
        """The numbers of the network, known before it is loaded."""
        return self.source.config

    @property
    def trainable(self) -> bool:
        """Whether any weight of the tower is trained."""
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that images are encoded in."""
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """Where images are encoded."""
        return self._first.device

    @property
    def _first(self) -> Tensor:
        # The patchifier's convolution, which no loader quantises.
        return next(self.vision_tower.parameters())


def demand_finite(network: nn.Module, origin: str) -> None:
    """UsageError naming a weight of `network` that is not a number or infinite."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UsageError(
                f"the vision tower from {origin} has weights that are not finite ({name}): "
                "its training diverged, or the file is damaged"
            )
