"""Run by an interpreter of prismatic-vlms, in its checkout: what the plug-in does there.

Prints one JSON object. Argument: a work folder.
"""

import json
import string
import sys
import types
import warnings
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

with suppress(ImportError):
    import torchvision_on_cpu  # noqa: F401  (where torchvision stands beside a CPU-only torch)

import numpy as np
import transformers
from llava_world import LLM, WORDS, _llm_weights, make_data, make_foreign, make_tower
from PIL import Image
from reference import features_of, is_unused
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from aimv2_mllm.model.weights import load_encoder
from aimv2_mllm.towers import prismatic

work = Path(sys.argv[1])
NAME = "vicuna-v15-7b"


def make_words_llm(folder: Path) -> Path:
    """A random Llama whose tokenizer has whole words, as prismatic demands of "True" and "A"."""
    folder.mkdir()
    words = ["<unk>", "<s>", "</s>", *WORDS.split(), "True", "False", "Yes", "No", "Test", "123"]
    words += [*string.ascii_uppercase, "USER", "ASSISTANT", ":", ".", ","]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = transformers.LlamaTokenizerFast(tokenizer_object=tokenizer, add_bos_token=True)
    fast.save_pretrained(folder)
    config = {**LLM, "vocab_size": len(vocabulary)}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        _llm_weights(len(vocabulary)), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def use_llm(folder: Path) -> None:
    from prismatic.models import materialize
    from prismatic.models.backbones.llm import llama2

    llama2.LLAMA2_MODELS[NAME]["hf_hub_path"] = str(folder)
    materialize.LLM_BACKBONES[NAME]["kwargs"] = {"use_flash_attention_2": False}


def build(tower: str, specifier: str, stage: str = "full-finetune", strategy: str = "resize-crop"):
    from prismatic.models import (
        get_llm_backbone_and_tokenizer,
        get_vision_backbone_and_transform,
        get_vlm,
    )

    backbone, _ = get_vision_backbone_and_transform(tower, strategy)
    llm, _ = get_llm_backbone_and_tokenizer(NAME, llm_max_length=256)
    vlm = get_vlm("tiny", specifier, backbone, llm, enable_mixed_precision_training=False)
    vlm.freeze_backbones(stage)
    return vlm


def checks(tower: str, specifier: str) -> dict:
    vlm = build(tower, specifier)
    pixels = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 8, 7, 6]])
    loss = vlm(ids, torch.ones_like(ids), pixels, ids).loss
    loss.backward()
    without = [n for n, p in vlm.named_parameters() if p.grad is None]
    if tower.startswith("hf:"):
        without = [name for name in without if not is_unused(name)]
    vlm.freeze_backbones("align")
    with torch.no_grad():
        features = vlm.vision_backbone(pixels)
        expected = features_of(tower, pixels)
        tokens = vlm.projector(features).shape[1]
    policy = vlm.get_fsdp_wrapping_policy()
    wrapped = [
        type(module).__name__
        for module in vlm.modules()
        if policy(module=module, recurse=False, nonwrapped_numel=0)
    ]
    return {
        "loss": loss.item(),
        "no_gradient": without,
        "align": sorted({n.split(".")[0] for n, p in vlm.named_parameters() if p.requires_grad}),
        "tower": (features - expected).abs().max().item(),
        "tokens": tokens,
        "wrapped": {name: wrapped.count(name) for name in sorted(set(wrapped))},
    }


def train_and_load(tower: str, specifier: str) -> dict:
    """Two steps of `full-finetune` by prismatic's own loop and checkpoint, read by its `load`."""
    import torch.distributed as dist
    from prismatic import load
    from prismatic.training.metrics import Metrics
    from prismatic.training.strategies.ddp import DDPStrategy

    class OnTheCpu(DDPStrategy):
        """Its DDP strategy but for the one device that it sets up, a GPU."""

        def run_setup(self, run_dir, n_train_examples):
            self.vlm = torch.nn.parallel.DistributedDataParallel(self.vlm)
            self.optimizer = torch.optim.AdamW(self.vlm.parameters(), lr=1e-2)
            self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)

    dist.init_process_group("gloo", init_method=f"file://{work}/rendezvous", rank=0, world_size=1)
    vlm = build(tower, specifier)
    run = work / "run"
    (run / "checkpoints").mkdir(parents=True)
    dataset, collator = data_of(vlm)
    strategy = OnTheCpu(
        vlm=vlm, device_id=0, epochs=1, max_steps=2, global_batch_size=2, per_device_batch_size=2,
        learning_rate=1e-2, weight_decay=0.0, max_grad_norm=1.0, warmup_ratio=0.0,
        lr_scheduler_type="linear-warmup+cosine-decay", enable_gradient_checkpointing=False,
        enable_mixed_precision_training=False,
    )  # fmt: skip
    strategy.run_setup(run, len(dataset))
    metrics = Metrics(("jsonl",), "tiny", run, {}, "align", grad_accumulation_steps=1)
    strategy.run_training(dataset, collator, metrics, stage="align")
    model = {
        "model_id": "tiny", "vision_backbone_id": tower, "llm_backbone_id": NAME,
        "arch_specifier": specifier, "image_resize_strategy": "resize-crop", "llm_max_length": 256,
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps({"model": model}))
    again, trained = load(run), strategy.vlm.module.eval()
    again.enable_mixed_precision_training = False
    before = load_encoder(tower.removeprefix("aimv2:")).state_dict()
    after = again.vision_backbone.featurizer.state_dict()
    pixels = torch.rand(2, 3, 56, 56)
    ids = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 8, 7, 6]])
    with torch.no_grad():
        logits = [m(ids, torch.ones_like(ids), pixels).logits for m in (trained, again)]
    found = {
        "moved": sum(not before[n].equal(after[n]) for n in before),
        "of": len(before),
        "reloaded": (logits[0] - logits[1]).abs().max().item(),
    }
    trained.vision_backbone_requires_grad = False  # or its `generate` asks for a gradient there
    picture = Image.fromarray(np.full((80, 60, 3), 120, dtype=np.uint8))
    with suppress(AttributeError):  # newer transformers ask more of a model that generates
        answers = [m.generate(picture, "what is it", max_new_tokens=4) for m in (trained, again)]
        found["answers_equal"] = answers[0] == answers[1]
    return found


def data_of(vlm):
    from prismatic.preprocessing.datasets import AlignDataset
    from prismatic.util.data_utils import PaddedCollatorForLanguageModeling

    data = make_data(work / "data")
    backbone, tokenizer = vlm.vision_backbone, vlm.llm_backbone.tokenizer
    dataset = AlignDataset(
        data.parent / "pictures.json", data.parent / "images", backbone.image_transform, tokenizer
    )
    collator = PaddedCollatorForLanguageModeling(
        tokenizer.model_max_length, tokenizer.pad_token_id, backbone.default_image_resolution
    )
    return dataset, collator


def transforms(tower: str) -> dict:
    """Against prismatic's own transforms, of torchvision, on a picture that is not square."""
    from prismatic.models import get_vision_backbone_and_transform
    from prismatic.models.backbones.vision.base_vision import LetterboxPad
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        InterpolationMode,
        Normalize,
        Resize,
        ToTensor,
    )

    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (70, 101, 3), dtype=np.uint8))
    found = {}
    for strategy in prismatic.STRATEGIES:
        backbone, transform = get_vision_backbone_and_transform(tower, strategy)
        processor = transform.preprocessing
        size = (56, 56) if strategy == "resize-naive" else 56
        fill = tuple(int(x * 255) for x in processor.mean)
        steps = [Resize(size, interpolation=InterpolationMode.BICUBIC), CenterCrop(56), ToTensor()]
        steps += [Normalize(processor.mean, processor.std)]
        if strategy == "letterbox":
            steps.insert(0, LetterboxPad(fill))
        values = transform(picture)
        assert tuple(values.shape) == backbone.default_image_resolution
        found[strategy] = (values - Compose(steps)(picture)).abs().max().item()
    return found


def message(action) -> str:
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals(tower: str) -> dict:
    bare = tower.removeprefix("aimv2:")
    return {
        "bare": message(lambda: build(bare, "linear")),
        "misspelt": message(lambda: build(f"aimv:{bare}", "linear")),
        "nowhere": message(lambda: build("aimv2:/no/such/folder", "linear")),
        "grid": message(lambda: build(tower, "no-align+pixel_shuffle:factor=3")),
        "connector": message(lambda: build(tower, "avrage_pool")),
        "strategy": message(lambda: build(tower, "linear", strategy="corner-pad")),
        "host": message(lambda: build("no-such-backbone", "linear")),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    module = types.ModuleType("wandb")  # imported there, and not used here
    module.__spec__ = ModuleSpec("wandb", None)
    sys.modules.setdefault("wandb", module)
    tower = f"aimv2:{make_tower(work / 'plain')}"
    native = f"aimv2:{make_tower(work / 'native', native=True)}"
    prismatic.install()
    use_llm(make_words_llm(work / "llm"))
    found = {"transforms": transforms(tower), "native": checks(native, "gelu-mlp")}
    for kind in ("clip", "siglip"):
        found[f"hf:{kind}"] = checks(f"hf:{make_foreign(work / kind, kind)}", "mlp")
    for specifier in (
        "linear", "no-align+gelu-mlp", "fused-gelu-mlp", "aimv2:linear", "mlp:depth=3",
        "pixel_shuffle:factor=2", "no-align+average_pool:factor=2",
        "resampler:num_queries=3,num_heads=4", "c_abstractor:target=2,depth=1",
    ):  # fmt: skip
        found[specifier] = checks(tower, specifier)
    found["refusals"] = refusals(tower)
    found["trained"] = train_and_load(tower, "pixel_shuffle:factor=2")
    print(json.dumps(found))
