"""Every way that LLaVA saves and loads a model, with the tower that must come out of it."""

import itertools
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

MEMORY = {"plain": {}, "low": {"low_cpu_mem_usage": True}}
DEVICES: dict[str, dict[str, Any]] = {
    "none": {},
    "cpu": {"device_map": {"": "cpu"}},
    "auto": {"device_map": "auto"},
}
IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(9))


def arguments(tower: str) -> Namespace:
    return Namespace(
        vision_tower=tower, mm_vision_select_layer=-1, mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=None, mm_patch_merge_type="flat", mm_projector_type="linear",
    )  # fmt: skip


def build(world: Path, *, tune: bool) -> Any:
    """A model whose tower, if tuned, is no longer its source's."""
    model = LlavaLlamaForCausalLM.from_pretrained(world / "llm")
    model.get_model().initialize_vision_modules(arguments(f"aimv2:{world / 'aimv2'}"))
    if tune:
        draw = torch.Generator().manual_seed(11)
        for parameter in model.get_vision_tower().vision_tower.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def features(model: Any) -> torch.Tensor:
    tower = model.get_vision_tower()
    tower.load_model(device_map=None)
    with torch.no_grad():
        return tower(IMAGES)


def written(driver: Any) -> dict[str, tuple[Path, Path | None, str]]:
    """Each kind of checkpoint: its folder, its base or None, and whose tower it must give."""
    world, out = driver.world, driver.out / "matrix"
    shutil.rmtree(out, ignore_errors=True)
    kinds: dict[str, tuple[Path, Path | None, str]] = {}
    llm = world / "llm"
    for name, tune, options in (
        ("frozen", False, {}),
        ("tuned", True, {}),
        ("sharded", True, {"max_shard_size": "40KB"}),
    ):
        build(world, tune=tune).save_pretrained(out / name, **options)
        kinds[name] = out / name, None, "tuned" if tune else "source"
    model = build(world, tune=False)
    state = {n: t for n, t in model.state_dict().items() if "vision_tower" not in n}
    model.save_pretrained(out / "absent", state_dict=state)
    kinds["absent"] = out / "absent", None, "source"
    for name, tune, part in (
        ("adapter", False, "mm_projector"),
        ("tuned adapter", True, ""),
        ("partly tuned adapter", True, "blocks.1."),
    ):
        model = build(world, tune=tune)
        model.config.save_pretrained(out / name)
        chosen = {
            n: t for n, t in model.named_parameters()
            if "mm_projector" in n or ("vision_tower" in n and tune and part in n)
        }  # fmt: skip
        torch.save(chosen, out / name / "non_lora_trainables.bin")
        kinds[name] = out / name, llm, "source" if not tune else "part" if part else "tuned"
    return kinds


def matrix(driver: Any) -> dict[str, dict[str, Any]]:
    """For every kind of checkpoint and way of loading: whether the right tower came, and frozen."""
    world = driver.world
    expected = {
        "source": features(build(world, tune=False)),
        "tuned": features(build(world, tune=True)),
        "part": _partly(world),
    }
    found = {}
    for name, (folder, base, whose) in written(driver).items():
        for (memory, low), (device, where) in itertools.product(MEMORY.items(), DEVICES.items()):
            config = LlavaConfig.from_pretrained(folder)
            model = LlavaLlamaForCausalLM.from_pretrained(base or folder, config=config, **low, **where)
            if base is not None:
                rest = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
                model.load_state_dict(rest, strict=False)
            got = features(model)
            tower = model.get_vision_tower()
            found[f"{name}, {memory} memory, device map {device}"] = {
                "right": torch.equal(got, expected[whose]),
                "frozen": not tower.trainable,
                "origin": tower.origin,
                "off": float((got - expected[whose]).abs().max()),
            }
    return found


def _partly(world: Path) -> torch.Tensor:
    """What a tower of the source gives whose second block alone is tuned."""
    model, other = build(world, tune=False), build(world, tune=True)
    own = model.get_vision_tower().vision_tower
    block = other.get_vision_tower().vision_tower.trunk.blocks[1].state_dict()
    own.trunk.blocks[1].load_state_dict(block)
    return features(model)
