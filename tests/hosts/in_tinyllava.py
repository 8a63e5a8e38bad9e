"""Run by an interpreter of TinyLLaVA_Factory, in its checkout: what the plug-in does there.

Prints one JSON object. Argument: a work folder. `tinyllama` must lie in the LLM's name.
"""

import json
import sys
import types
import warnings
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

with suppress(ImportError):
    import torchvision_on_cpu  # noqa: F401  (where torchvision stands beside a CPU-only torch)

import transformers
from llava_world import make_data, make_foreign, make_llm, make_tower
from reference import features_of, is_unused

from aimv2_mllm.model.weights import load_encoder
from aimv2_mllm.towers import tinyllava

work = Path(sys.argv[1])


def stub_deepspeed() -> None:
    """TinyLLaVA imports two names of deepspeed, which it uses under ZeRO-3 alone."""
    with suppress(ImportError):
        import deepspeed  # noqa: F401

        return
    for name in ("", ".runtime", ".runtime.zero", ".runtime.zero.partition_parameters"):
        module = types.ModuleType(f"deepspeed{name}")
        # transformers looks for the package in this way, and then misses its metadata.
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    sys.modules["deepspeed"].zero = None
    sys.modules["deepspeed.runtime.zero.partition_parameters"].ZeroParamStatus = None


def build(tower: str, connector: str, layer: int = -1):
    from tinyllava.model import TinyLlavaConfig, TinyLlavaForConditionalGeneration
    from tinyllava.utils.arguments import ModelArguments

    config = TinyLlavaConfig()
    config.load_from_config(
        ModelArguments(
            model_name_or_path=str(llm), vision_tower=tower, connector_type=connector,
            mm_vision_select_layer=layer, num_queries=3, num_resampler_layers=1,
        )
    )  # fmt: skip
    torch.manual_seed(2)
    model = TinyLlavaForConditionalGeneration(config)
    model.load_llm(model_name_or_path=str(llm))
    model.load_vision_tower(model_name_or_path=tower.split(":")[-1])
    model.load_connector()
    return model


def batch():
    pixels = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[1, 5, -200, 6, 7, 8], [1, 9, -200, 8, 7, 6]])
    return pixels, ids, torch.where(ids == -200, -100, ids)


def checks(tower: str, connector: str, layer: int = -1) -> dict:
    from tinyllava.model import TinyLlavaForConditionalGeneration

    model = build(tower, connector, layer)
    frozen = not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    pixels, ids, labels = batch()
    loss = model(
        input_ids=ids, labels=labels, images=pixels, attention_mask=torch.ones_like(ids)
    ).loss
    loss.backward()
    with torch.no_grad():
        for p in model.vision_tower.parameters():
            p += 0.01  # a tower that is tuned must not be lost
    model.eval()
    folder = work / "saved"
    model.save_pretrained(folder)
    again = TinyLlavaForConditionalGeneration.from_pretrained(folder, low_cpu_mem_usage=True).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(1, 6)}
    answers = [m.generate(ids[:1], images=pixels[:1], **options).tolist() for m in (model, again)]
    with torch.no_grad():
        logits = [m(input_ids=ids, images=pixels).logits for m in (model, again)]
        # The untouched tower, against our own loader.
        features = build(tower, connector, layer).vision_tower(pixels, vision_feature_layer=layer)
        expected = reference(tower, pixels, layer)
        tokens = model.encode_images(pixels).shape[1]
    return {
        "frozen": frozen,
        "loss": loss.item(),
        "no_gradient": [
            n
            for n, p in model.named_parameters()
            if p.grad is None and not (tower.startswith("hf:") and is_unused(n))
        ],
        "tokens": tokens,
        "answers_equal": answers[0] == answers[1],
        "reloaded": (logits[0] - logits[1]).abs().max().item(),
        "tower": (features - expected).abs().max().item(),
    }


def reference(tower: str, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    if layer == -1:
        return features_of(tower, pixels)
    encoder = load_encoder(tower.removeprefix("aimv2:"))
    tokens = encoder.preprocessor(pixels)
    for block in encoder.trunk.blocks[: len(encoder.trunk.blocks) + 1 + layer]:
        tokens = block(tokens)
    return tokens


def run_program(output: str, *words: str) -> Path:
    """TinyLLaVA's train() on the CPU; its output folder."""
    folder = work / output
    sys.argv = [
        "train", "--model_name_or_path", str(llm), "--data_path", str(data), "--image_folder",
        str(data.parent / "images"), "--is_multimodal", "True", "--conv_version", "pretrain",
        "--mm_vision_select_layer", "-1", "--image_aspect_ratio", "square",
        "--output_dir", str(folder), "--model_max_length", "256",
        "--per_device_train_batch_size", "2", "--max_steps", "2", "--learning_rate", "1e-2",
        "--logging_steps", "1", "--report_to", "none", "--use_cpu", "True",
        "--save_strategy", "no", "--dataloader_num_workers", "0", "--lazy_preprocess", "True",
        "--bf16", "False", *words,
    ]  # fmt: skip
    tinyllava.train()
    return folder


def stages() -> dict:
    """Its two stages by its own program: the connector, then all with the tower's last block."""
    from tinyllava.model.load_model import load_pretrained_model

    first = run_program(
        "pretrain", "--vision_tower", tower, "--connector_type", "pixel_shuffle:factor=2",
        "--tune_type_connector", "full",
    )  # fmt: skip
    second = run_program(
        "finetune", "--vision_tower", tower, "--connector_type", "pixel_shuffle:factor=2",
        "--conv_version", "llama", "--tune_type_llm", "full", "--tune_type_connector", "full",
        "--tune_type_vision_tower", "partially-tune", "--tune_vision_tower_from_layer", "2",
        "--pretrained_model_path", str(first),
    )  # fmt: skip
    losses = [
        row["loss"]
        for row in json.loads((second / "trainer_state.json").read_text())["log_history"]
        if "loss" in row
    ]
    model, _, processor, _ = load_pretrained_model(str(second), device="cpu")
    before = load_encoder(tower.removeprefix("aimv2:")).state_dict()
    after = model.vision_tower._vision_tower.vision_tower.state_dict()
    before_stage = torch.load(first / "vision_tower" / "pytorch_model.bin", weights_only=True)
    pixels, ids, _ = batch()
    with torch.no_grad():
        model(input_ids=ids, images=pixels)
    kept = [before_stage[f"vision_tower.{n}"].equal(before[n]) for n in before]
    same = [n for n in after if torch.allclose(after[n].float(), before[n], atol=1e-6)]
    return {
        "losses": losses,
        "moved": sorted(after.keys() - same),
        "first_stage_keeps": all(kept),
        "origin": model.vision_tower._vision_tower.origin,
        "processor": type(processor).__name__,
    }  # fmt: skip


def message(action) -> str:
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals() -> dict:
    bare = tower.removeprefix("aimv2:")
    return {
        "bare": message(lambda: build(bare, "linear")),
        "misspelt": message(lambda: build(f"aimv1:{bare}", "linear")),
        "nowhere": message(lambda: build("aimv2:/no/such/folder", "linear")),
        "grid": message(lambda: build(tower, "pixel_shuffle:factor=3")),
        "connector": message(lambda: build(tower, "aimv2:resamplr")),
        "option": message(lambda: build(tower, "average_pool:factr=2")),
        "layer": message(lambda: checks(tower, "linear", -9)),
    }


def stock() -> dict:
    """TinyLLaVA's own connectors and its own tower's config are as before."""
    from tinyllava.model.connector import ConnectorFactory
    from tinyllava.model.vision_tower import VisionTowerFactory

    return {
        **{
            n: ConnectorFactory(n).__name__
            for n in ("mlp2x_gelu", "linear", "resampler", "identity")
        },
        "collision": VisionTowerFactory("me/hf-clip").__name__,
        "clip": VisionTowerFactory("openai/clip-vit-large-patch14").__name__,
    }


if __name__ == "__main__":
    stub_deepspeed()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    llm = make_llm(work / "tinyllama")
    tower = f"aimv2:{make_tower(work / 'plain')}"
    native = f"aimv2:{make_tower(work / 'native', native=True)}"
    data = make_data(work / "data")
    tinyllava.install()
    found = {
        "stock": stock(),
        "plain": checks(tower, "mlp2x_gelu"),
        "native": checks(native, "linear"),
        "layer -2": checks(tower, "linear", -2),
    }
    for connector in (
        "aimv2:linear", "aimv2:mlp:depth=3", "pixel_shuffle:factor=2", "average_pool:factor=2",
        "aimv2:resampler:num_queries=3,num_heads=4", "c_abstractor:target=2,depth=1",
    ):  # fmt: skip
        found[connector] = checks(tower, connector)
    for kind in ("clip", "siglip"):
        name = f"hf:{make_foreign(work / kind, kind)}"
        found[f"hf:{kind}"] = checks(name, "pixel_shuffle:factor=2")
    found["refusals"] = refusals()
    # Its programs are meant for a launcher, and log by rank.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work}/rendezvous", rank=0, world_size=1
    )
    found["stages"] = stages()
    print(json.dumps(found))
