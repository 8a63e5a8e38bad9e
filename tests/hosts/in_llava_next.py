"""Run by an interpreter of LLaVA-NeXT, in its checkout: what the plug-in does there.

Prints one JSON object. Argument: a work folder.
"""

import json
import shutil
import sys
import warnings
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

with suppress(ImportError):
    import torchvision_on_cpu  # noqa: F401  (where torchvision stands beside a CPU-only torch)

import numpy as np
import transformers
from llava_world import make_data, make_foreign, make_llm, make_tower
from PIL import Image
from reference import features_of, is_unused
from safetensors.torch import load_file, save_file

from aimv2_mllm.model.weights import load_encoder
from aimv2_mllm.towers import llava_next

work = Path(sys.argv[1])


def arguments(tower: str, projector: str, **more) -> SimpleNamespace:
    """What its trainer hands to `initialize_vision_modules`."""
    options = {
        "vision_tower": tower, "mm_projector_type": projector, "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch", "pretrain_mm_mlp_adapter": None,
        "mm_patch_merge_type": "flat", "add_faster_video": False,
    }  # fmt: skip
    return SimpleNamespace(**{**options, **more})


def build(tower: str, projector: str, **more):
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    config = LlavaConfig.from_pretrained(llm)
    config.rope_scaling = getattr(config, "rope_scaling", None)
    torch.manual_seed(2)
    model = LlavaLlamaForCausalLM.from_pretrained(llm, config=config)
    model.get_model().initialize_vision_modules(arguments(tower, projector, **more))
    for name in ("image_aspect_ratio", "image_grid_pinpoints"):
        if name in more:
            setattr(model.config, name, more[name])
    return model


def batch(side: int = 56):
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[1, 5, -200, 6, 7, 8], [1, 9, -200, 8, 7, 6]])
    return pixels, ids, torch.where(ids == -200, -100, ids)


def logits_of(model, pixels, ids):
    with torch.no_grad():
        return model(input_ids=ids, images=pixels, modalities=["image"] * len(ids)).logits


def answer(model, pixels, ids):
    ids = ids[:1]
    out = model.generate(
        ids, images=pixels[:1], image_sizes=[(56, 56)], modalities=["image"], do_sample=False,
        max_new_tokens=4, attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    return [token for token in out[0].tolist() if token != 1]


def checks(tower: str, projector: str) -> dict:
    model = build(tower, projector)
    frozen = not any(p.requires_grad for p in model.get_vision_tower().parameters())
    for name, parameter in model.named_parameters():  # as mm_tunable_parts does it
        if "vision_tower" in name:
            parameter.requires_grad_(True)
    pixels, ids, labels = batch()
    mask = torch.ones_like(ids)
    # LLaVA-NeXT cuts the batch to as many samples as there are modalities: by default one.
    loss = model(
        input_ids=ids, labels=labels, images=pixels, attention_mask=mask, modalities=["image"] * 2
    ).loss
    loss.backward()
    with torch.no_grad():
        features = model.get_vision_tower()(pixels)
        expected = features_of(tower, pixels)
        tokens = model.encode_images(pixels).shape[1]
    return {
        "frozen": frozen,
        "loss": loss.item(),
        "no_gradient": [
            n
            for n, p in model.named_parameters()
            if p.grad is None and not (tower.startswith("hf:") and is_unused(n))
        ],
        "tower": (features - expected).abs().max().item(),
        "tokens": tokens,
    }


def reloads(tower: str) -> dict:
    """A tower that is in the checkpoint, tuned, or not; loaded with little memory, or not."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = build(tower, "pixel_shuffle:factor=2")
    model.eval()
    pixels, ids, _ = batch()
    plain = logits_of(model, pixels, ids)
    model.save_pretrained(work / "whole")
    without = work / "without"
    shutil.copytree(work / "whole", without)
    state = load_file(without / "model.safetensors")
    state = {n: t for n, t in state.items() if "vision_tower" not in n}
    save_file(state, without / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        for parameter in model.get_vision_tower().parameters():
            parameter += 0.05
    tuned = logits_of(model, pixels, ids)
    model.save_pretrained(work / "tuned")
    found = {}
    for name, expected in (("whole", plain), ("without", plain), ("tuned", tuned)):
        for low in (False, True):
            again = LlavaLlamaForCausalLM.from_pretrained(work / name, low_cpu_mem_usage=low).eval()
            again.get_vision_tower().load_model()
            found[f"{name}, low memory {low}"] = {
                "difference": (logits_of(again, pixels, ids) - expected).abs().max().item(),
                "origin": again.get_vision_tower().origin.partition(":")[0],
                "trainable": sum(p.requires_grad for p in again.get_vision_tower().parameters()),
            }
    found["answers_equal"] = answer(model, pixels, ids) == answer(again, pixels, ids)
    return found


def by_its_loader() -> dict:
    from llava.model.builder import load_pretrained_model

    pixels, ids, _ = batch()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(llm / name, work / "tuned")
    _, model, processor, _ = load_pretrained_model(
        str(work / "tuned"), None, "llava_llama", device_map="auto", torch_dtype="bfloat16",
        attn_implementation="sdpa",
    )  # fmt: skip
    from llava.mm_utils import process_images

    picture = Image.fromarray(np.full((80, 60, 3), 120, dtype=np.uint8))
    model.config.image_aspect_ratio = "pad"  # its trainer writes it, and this was not trained
    values = process_images([picture], processor, model.config)
    return {
        "origin": model.get_vision_tower().origin,
        "pixels": list(values[0].shape),
        "answer": len(answer(model, pixels.bfloat16(), ids)),
    }


def stub(**modules: dict) -> None:
    """Libraries that its trainer imports for what is not used here."""
    for name, attributes in modules.items():
        name = name.replace("_", ".")
        with suppress(ImportError):
            __import__(name)
            continue
        module = ModuleType(name)
        # transformers looks for packages in this way, and then misses their metadata.
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(attributes)
        sys.modules[name] = module


def program(tower: str) -> dict:
    """Two steps of LLaVA-NeXT's own train(), of projector, tower and LLM, and their checkpoint."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    stub(
        deepspeed={}, trl={}, trl_trainer={"DPOTrainer": object},
        trl_trainer_utils={"DPODataCollatorWithPadding": object},
    )  # fmt: skip
    data, out = make_data(work / "data"), work / "trained"
    sys.argv = [
        "train", "--model_name_or_path", str(llm), "--version", "plain", "--data_path",
        str(data.parent / "pictures.json"), "--image_folder", str(data.parent / "images"),
        "--vision_tower", tower, "--mm_projector_type", "pixel_shuffle:factor=2",
        "--mm_vision_select_layer", "-1", "--mm_use_im_start_end", "False",
        "--mm_use_im_patch_token", "False", "--image_aspect_ratio", "pad", "--output_dir", str(out),
        "--mm_tunable_parts", "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "--mm_vision_tower_lr", "1e-2", "--learning_rate", "1e-2", "--max_steps", "2",
        "--per_device_train_batch_size", "2", "--bf16", "True", "--use_cpu", "True",
        "--report_to", "none", "--save_strategy", "no", "--model_max_length", "256",
        "--lazy_preprocess", "True", "--attn_implementation", "sdpa", "--logging_steps", "1",
        "--dataloader_num_workers", "0", "--gradient_checkpointing", "True",
    ]  # fmt: skip
    torch.cuda.synchronize = lambda *_: None  # its program calls it, also without a GPU
    llava_next.train()
    again = LlavaLlamaForCausalLM.from_pretrained(out, torch_dtype=torch.float32)
    again.get_vision_tower().load_model()
    before = load_encoder(tower.removeprefix("aimv2:")).bfloat16().state_dict()
    after = again.get_vision_tower().vision_tower.bfloat16().state_dict()
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {
        "losses": [row["loss"] for row in log if "loss" in row],
        "moved": sum(not before[n].equal(after[n]) for n in before),
        "of": len(before),
        "origin": again.get_vision_tower().origin,
    }


def tiles(tower: str, projector: str, merge: str) -> dict:
    """anyres: tiles of a picture that is not square, laid together by LLaVA-NeXT."""
    from llava.mm_utils import process_images

    pinpoints = [[56, 112], [112, 56], [112, 112]]
    model = build(
        tower, projector, mm_patch_merge_type=merge, image_aspect_ratio="anyres",
        image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    model.eval()
    picture = Image.fromarray(np.full((90, 60, 3), 120, dtype=np.uint8))
    images = process_images([picture], model.get_vision_tower().image_processor, model.config)
    _, ids, _ = batch()
    with torch.no_grad():
        out = model(
            input_ids=ids[:1], images=images, image_sizes=[picture.size], modalities=["image"]
        )
    return {"tiles": len(images[0]), "length": out.logits.shape[1]}


def sizes(tower: str) -> dict:
    """Images of different sizes in one batch, each whole, against one at a time."""
    model = build(tower, "pixel_shuffle:factor=2").eval()
    draw = torch.Generator().manual_seed(6)
    images = [torch.rand(3, 56, 84, generator=draw), torch.rand(3, 112, 56, generator=draw)]
    _, ids, _ = batch()
    mask = torch.ones_like(ids)
    with torch.no_grad():
        together = model(
            input_ids=ids, images=images, attention_mask=mask, modalities=["image"] * 2
        ).logits
        alone = [
            model(input_ids=ids[i : i + 1], images=[images[i]], attention_mask=mask[:1]).logits[0]
            for i in range(2)
        ]
    return {
        "lengths": [len(one) for one in alone],
        "difference": max(
            (both[: len(one)] - one).abs().max().item()
            for both, one in zip(together, alone, strict=True)
        ),
    }


def message(action) -> str:
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals(tower: str) -> dict:
    bare = tower.removeprefix("aimv2:")
    merge = {"mm_patch_merge_type": "spatial_unpad"}
    return {
        "bare": message(lambda: build(bare, "linear")),
        "misspelt": message(lambda: build(f"aimv3:{bare}", "linear")),
        "nowhere": message(lambda: build("aimv2:/no/such/folder", "linear")),
        "grid": message(lambda: build(tower, "pixel_shuffle:factor=3")),
        "connector": message(lambda: build(tower, "resampeler")),
        "merge": message(lambda: build(tower, "resampler:num_heads=4", **merge)),
        "s2": message(lambda: build(tower, "linear", s2=True)),
        "feature": message(lambda: build(tower, "linear", mm_vision_select_feature="cls")),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    llm = make_llm(work / "vicuna")  # its trainer tells an LLM by its path
    tower = f"aimv2:{make_tower(work / 'plain')}"
    native = f"aimv2:{make_tower(work / 'native', native=True)}"
    llava_next.install()
    found = {"native": checks(native, "mlp2x_gelu")}
    for projector in (
        "linear", "mlp2x_gelu", "mlp2x_res1x_gelu", "aimv2:linear", "mlp:depth=3",
        "pixel_shuffle:factor=2", "average_pool:factor=2", "resampler:num_queries=3,num_heads=4",
        "c_abstractor:target=2,depth=1",
    ):  # fmt: skip
        found[projector] = checks(tower, projector)
    for kind in ("clip", "siglip"):
        name = f"hf:{make_foreign(work / kind, kind)}"
        found[f"hf:{kind}"] = checks(name, "pixel_shuffle:factor=2")
    found["reloads"] = reloads(tower)
    found["tiles"] = {
        "mlp2x_gelu": tiles(tower, "mlp2x_gelu", "spatial_unpad"),
        "pixel_shuffle": tiles(tower, "pixel_shuffle:factor=2", "spatial_unpad"),
        "flat": tiles(tower, "resampler:num_queries=3,num_heads=4", "flat"),
    }
    found["sizes"] = sizes(native)
    found["refusals"] = refusals(tower)
    found["loader"] = by_its_loader()
    if transformers.__version__.startswith("4.4"):
        found["program"] = program(tower)
    print(json.dumps(found))
