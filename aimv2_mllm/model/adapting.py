"""What of a Llava is trained: adapters on its LLM, the LLM itself, the connector, the tower's last
blocks; and how what is frozen is held.

Owns adapters, which are peft's, and their names; refuses options that peft does not have, or that
would change what is not adapted.
"""

import dataclasses
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import UsageError, first_line, nearest
from .families import TOWERS, family_of
from .merging import merged_aside, share_unquantised
from .shapes import shapes_only

CONNECTOR, TOWER = "model.multi_modal_projector.", "model.vision_tower."
LLM = ("model.language_model.", "lm_head.")
ADDED = ".lora_"  # in the name of every parameter of an adapter
ADAPTER = "adapter"  # the folder beside the merged weights
# Options of peft that would train or change what is no adapter, or need more than a recipe has.
REFUSED = {
    "bias": "biases of the LLM are not trained: give trains: llm",
    "modules_to_save": "connector and tower are trained as trains and tower_blocks say",
    "trainable_token_indices": "embeddings are trained with trains: llm",
    "layer_replication": "it makes another LLM",
    "task_type": "the model is a Llava here",
    "inference_mode": "it is trained here",
}
# Other starts of the adapters (pissa, loftq, eva, ...) change the weights that they are added to.
STARTS = (True, False, "gaussian", "orthogonal")


def check_options(options: Mapping[str, Any]) -> None:
    """UsageError for an option that peft's LoraConfig does not have, or that cannot serve here."""
    from peft import LoraConfig

    known = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    for name, value in options.items():
        if name not in known:
            raise UsageError(
                f"lora.options: peft's LoraConfig has no {name}{nearest(name, known)}; it has "
                f"{', '.join(sorted(known))}"
            )
        if name in REFUSED:
            raise UsageError(f"lora.options.{name} cannot be given: {REFUSED[name]}")
        if name == "init_lora_weights" and value not in STARTS:
            raise UsageError(
                f"lora.options.{name} is {value!r}, and must be one of true, false, gaussian, "
                "orthogonal: others change the weights that are adapted"
            )


def adapt(model: nn.Module, targets: list[str], words: Mapping[str, Any]) -> Any:
    """peft's wrapper of the Llava `model`, whose LLM has new adapters at `targets` afterwards.

    `words` are further arguments of peft's LoraConfig. UsageError for those that it refuses.
    """
    from peft import LoraConfig, get_peft_model

    forms = {type(p).__name__ for p in model.parameters()}
    # By these peft chooses the layers that add to quantised ones.
    model.is_loaded_in_4bit = "Params4bit" in forms  # type: ignore[assignment]
    model.is_loaded_in_8bit = "Int8Params" in forms  # type: ignore[assignment]
    try:
        # Whole names: the tower may have the same leaf names.
        where = rf".*\.language_model\..*\.({'|'.join(targets)})"
        return get_peft_model(model, LoraConfig(target_modules=where, **words))
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise UsageError(f"lora: peft refuses these options ({first_line(error)})") from None


def used_by_the_connector(model: Any) -> list[str]:
    """The names of those parameters of a Llava's tower on which what the connector reads depends;
    neither blocks behind the layer that is read, nor a norm or head that is left aside."""
    config = model.config
    side = getattr(config.vision_config, "image_size", None) or 16 * config.vision_config.patch_size
    with torch.device("meta"):
        shapes: Any = type(model)(config).float()
        pictures = torch.empty(1, 3, side, side)
    with torch.device("cpu"), torch.enable_grad():
        embedded = shapes.model.get_image_features(pictures).pooler_output
        total = sum(one.sum() for one in embedded)
        named = [(n, p) for n, p in shapes.named_parameters() if n.startswith(TOWER)]
        found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return [name for (name, _), one in zip(named, found, strict=True) if one is not None]


def tower_names(model: Any, num_blocks: int | str) -> list[str]:
    """The names of the parameters of a Llava's tower in its last `num_blocks` blocks that are read,
    and of its last norm where that is; "all": of all that is read. UsageError for more blocks than
    there are."""
    if num_blocks == 0:
        return []
    used = used_by_the_connector(model)
    if num_blocks == "all":
        return used
    vision = model.config.vision_config
    depth = int(vision.num_hidden_layers)
    [stack] = [
        f"{TOWER}{name}."
        for name, module in model.model.vision_tower.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ][:1]
    places = {n: int(n.removeprefix(stack).split(".")[0]) for n in used if n.startswith(stack)}
    count = max(places.values(), default=-1) + 1
    check_depth(num_blocks, count)
    norm = TOWERS[family_of(vision.model_type, "the tower")].norm
    last = {n for n, place in places.items() if place >= count - int(num_blocks)}
    # Some families have their network one level deeper.
    behind = {n for n in used if n.startswith((f"{TOWER}{norm}.", f"{TOWER}vision_model.{norm}."))}
    return [n for n in used if n in last | behind]


def check_depth(num_blocks: int | str, depth: int) -> None:
    """UsageError for more blocks than the tower's `depth`."""
    if num_blocks != "all" and int(num_blocks) > depth:
        raise UsageError(
            f"tower_blocks is {num_blocks}, and of the tower {depth} blocks are read: give at most "
            f"{depth}, or all"
        )


def free(model: nn.Module, names: Set[str]) -> None:
    """Let parameters of these names, and adapters, be trained, and no others."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in names or ADDED in name)


def hold(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold what is frozen of `model` in `dtype` and what is trained in float32, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            wanted = torch.float32 if parameter.requires_grad else dtype
            parameter.data = parameter.data.to(wanted)


@dataclass
class Result:
    """What a stage leaves of the Llava `model`: all of it, adapters merged, saved in `dtype`; and
    where there are `adapters`, peft's wrapper of it, those alone too.

    Of a quantised model `unquantised` makes the same one, adapters and all, from its full weights.
    """

    model: Any
    dtype: torch.dtype
    adapters: Any = None
    base: str = ""  # what the adapters were added to, for whoever reads them
    unquantised: Callable[[], "Result"] | None = None

    def save(self, folder: Path) -> None:
        """Write it into `folder`; nothing can be trained afterwards."""
        if shapes_only():
            self.model.save_pretrained(folder)
            return
        if self.adapters is not None:
            save_adapter(self.adapters, folder / ADAPTER, self.base)
        if self.unquantised is None:
            whole = self.model if self.adapters is None else self.adapters.merge_and_unload()
        else:
            full = self.unquantised()
            share_unquantised(self.model, full.model)
            whole = full.model
            if full.adapters is not None:
                whole = merged_aside(full.adapters, folder, self.dtype)
        whole.to(self.dtype).save_pretrained(folder)


def save_adapter(adapters: Any, folder: Path, base: str) -> None:
    """Write what was trained of the Llava under `adapters` into `folder`: the adapters as peft
    does, naming `base`, and beside them the connector, and the tower's weights if they were."""
    for config in adapters.peft_config.values():
        config.base_model_name_or_path = base
    # "auto" would look for the base's config on the network.
    adapters.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's, which knows nothing of it
    named = adapters.get_base_model().named_parameters()
    trained = {name: p.detach().contiguous() for name, p in named if p.requires_grad}
    for file, part in (("connector", CONNECTOR), ("tower", TOWER)):
        tensors = {name: tensor for name, tensor in trained.items() if name.startswith(part)}
        if tensors:
            save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
