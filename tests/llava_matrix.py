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


def build(driver: Any, tower: str, *, tune: bool) -> Any:
    """A model with `tower`, "aimv2:aimv2" or "hf:siglip" for instance; if tuned, it is no longer
    its source's."""
    kind, _, name = tower.partition(":")
    model = LlavaLlamaForCausalLM.from_pretrained(driver.world / "llm")
    model.get_model().initialize_vision_modules(arguments(f"{kind}:{driver.world / name}"))
    if tune:
        draw = torch.Generator().manual_seed(11)
        for _, parameter in sorted(model.get_vision_tower().vision_tower.named_parameters()):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def features(model: Any) -> torch.Tensor:
    tower = model.get_vision_tower()
    tower.load_model(device_map=None)
    with torch.no_grad():
        return tower(IMAGES)


def written(driver: Any, tower: str) -> dict[str, tuple[Path, Path | None, str]]:
    """Each kind of checkpoint: its folder, its base or None, and whose tower it must give."""
    out = driver.out / "matrix" / tower
    shutil.rmtree(out, ignore_errors=True)
    kinds: dict[str, tuple[Path, Path | None, str]] = {}
    for name, tune, options in (
        ("frozen", False, {}),
        ("tuned", True, {}),
        ("sharded", True, {"max_shard_size": "40KB"}),
    ):
        build(driver, tower, tune=tune).save_pretrained(out / name, **options)
        kinds[name] = out / name, None, "tuned" if tune else "source"
    model = build(driver, tower, tune=False)
    state = {n: t for n, t in model.state_dict().items() if "vision_tower" not in n}
    model.save_pretrained(out / "absent", state_dict=state)
    kinds["absent"] = out / "absent", None, "source"
    for name, whose in (
        ("adapter", "source"),
        ("tuned adapter", "tuned"),
        ("partly tuned adapter", "part"),
    ):
        model = build(driver, tower, tune=whose != "source")
        model.config.save_pretrained(out / name)
        tuned = {"source": lambda _: False, "tuned": lambda _: True, "part": in_block}[whose]
        chosen = {
            n: t for n, t in model.named_parameters()
            if "mm_projector" in n or ("vision_tower" in n and tuned(n))
        }  # fmt: skip
        torch.save(chosen, out / name / "non_lora_trainables.bin")
        kinds[name] = out / name, driver.world / "llm", whose
    return kinds


def in_block(name: str) -> bool:
    """Whether a tensor lies in a tower's second block."""
    return ".blocks.1." in name or ".layers.1." in name


def matrix(driver: Any) -> dict[str, dict[str, Any]]:
    """For every kind of checkpoint and way of loading: whether the right tower came, and frozen."""
    found = {}
    for tower in ("aimv2:aimv2", "hf:siglip"):
        source, tuned = (build(driver, tower, tune=tune) for tune in (False, True))
        expected = {"source": features(source), "tuned": features(tuned)}
        rest = tuned.get_vision_tower().vision_tower.state_dict()
        block = {name: tensor for name, tensor in rest.items() if in_block(f".{name}")}
        assert block
        source.get_vision_tower().vision_tower.load_state_dict(block, strict=False)
        expected["part"] = features(source)
        for name, (folder, base, whose) in written(driver, tower).items():
            for memory, device in itertools.product(MEMORY, DEVICES):
                model = read(folder, base, {**MEMORY[memory], **DEVICES[device]})
                got = features(model)
                found[f"{tower}, {name}, {memory} memory, device map {device}"] = {
                    "right": torch.equal(got, expected[whose]),
                    "frozen": not model.get_vision_tower().trainable,
                    "origin": model.get_vision_tower().origin,
                    "off": float((got - expected[whose]).abs().max()),
                }
    return found


def read(folder: Path, base: Path | None, options: dict[str, Any]) -> Any:
    """A model as LLaVA's loader reads it, in float32."""
    config = LlavaConfig.from_pretrained(folder)
    model = LlavaLlamaForCausalLM.from_pretrained(base or folder, config=config, **options)
    if base is not None:
        rest = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        model.load_state_dict(rest, strict=False)
    return model


def across(driver: Any) -> dict[str, float]:
    """How far towers are from what they must be that the old environment, if it is there, saved
    tuned: zero."""
    old, found = driver.out.parent / "4.37.2" / "across", {}
    for tower in ("aimv2:aimv2", "hf:siglip", "hf:clip"):
        tuned = build(driver, tower, tune=True)
        if driver.transformers < 5:
            tuned.save_pretrained(old / tower)
        elif old.is_dir():
            model = read(old / tower, None, {})
            assert model.get_vision_tower().origin is None
            found[tower] = float((features(model) - features(tuned)).abs().max())
    return found
