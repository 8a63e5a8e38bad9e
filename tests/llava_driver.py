"""What the real LLaVA does with our towers in the environment that runs this; a JSON for the tests.

    python tests/llava_driver.py WORLD OUT

WORLD is a folder of `llava_world`; models are written to OUT, and all that was found to
OUT/found.json. Both environments run this same file, so it needs nothing of the tests' own.
"""

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "1"
import torch

from aimv2_mllm.towers import llava, llava_command
from aimv2_mllm.towers.llava_training import trained_parts
from aimv2_mllm.towers.tower import VisionTower

QUESTION = "what is it"
LAYERS = torch.nn.Linear, torch.nn.LayerNorm


@contextlib.contextmanager
def program() -> Iterator[io.StringIO]:
    """What a program of LLaVA prints; it leaves torch without initial weights, for ever."""
    resets = [layer.reset_parameters for layer in LAYERS]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield printed
    finally:
        for layer, reset in zip(LAYERS, resets, strict=True):
            layer.reset_parameters = reset


class Driver:
    """A world, a folder for results, and the host."""

    program = staticmethod(program)

    def __init__(self, world: Path, out: Path) -> None:
        self.world, self.out = world, out
        llava.install()
        llava.install()  # changes nothing
        from aimv2_mllm.towers.llava_training import install

        self.train = install()
        self.builder = importlib.import_module("llava.model.builder")
        version = importlib.import_module("transformers").__version__
        self.transformers = int(version.split(".")[0])
        self.losses: list[float] = []
        self._watch()

    def _watch(self) -> None:
        """Keep every loss, and draw LoRA's first halves alike in all versions of peft."""
        driver, trainer = self, self.train.LLaVATrainer
        log, run = trainer.log, trainer.train

        def logged(self: Any, logs: dict[str, Any], *rest: Any) -> None:
            if "loss" in logs:
                driver.losses.append(float(logs["loss"]))
            log(self, logs, *rest)

        def seeded(self: Any, *rest: Any, **more: Any) -> Any:
            draw = torch.Generator().manual_seed(7)
            for name, parameter in sorted(self.model.named_parameters()):
                if "lora_A" in name:
                    parameter.data = torch.randn(parameter.shape, generator=draw).to(parameter) / 6
            driver.trained = trained_parts(self.model)
            driver.model = self.model
            return run(self, *rest, **more)

        trainer.log, trainer.train = logged, seeded

    def words(self, stage: str, tower: str, connector: str, *more: str) -> list[str]:
        """The flags of training for one stage, into OUT/`stage`."""
        flags = {
            "model_name_or_path": self.world / "llm", "image_folder": self.world / "data/images",
            "data_path": self.world / "data/data.json", "version": "v1", "vision_tower": tower,
            "mm_projector_type": connector, "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False, "use_cpu": True, "num_train_epochs": 3,
            "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no",
            "report_to": "none", "model_max_length": 256, "learning_rate": 1e-2,
            "output_dir": self.out / stage,
        }  # fmt: skip
        return [*(x for key, value in flags.items() for x in (f"--{key}", str(value))), *more]

    def fit(self, stage: str, tower: str, connector: str, *more: str) -> dict[str, Any]:
        """Train one stage by the command."""
        self.losses.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            code = llava_command.main(["train", *self.words(stage, tower, connector, *more)])
        assert code == 0, code
        return {"losses": list(self.losses), "parts": self.trained}

    def state(self) -> dict[str, torch.Tensor]:
        """What the last stage trained."""
        named = self.model.named_parameters()
        return {name: p.detach().clone() for name, p in named if p.requires_grad}

    def load(self, folder: Path, base: Path | None) -> tuple[Any, Any, Any]:
        """Tokenizer, model and image processor by LLaVA's own loader."""
        with contextlib.redirect_stdout(io.StringIO()):
            tokenizer, model, processor, _ = self.builder.load_pretrained_model(
                str(folder), None if base is None else str(base), folder.name, device="cpu"
            )
        return tokenizer, model, processor

    def tokens(self, folder: Path, base: Path | None) -> list[int]:
        """Greedy tokens of a reloaded model for the first picture."""
        from llava.mm_utils import process_images, tokenizer_image_token
        from PIL import Image

        tokenizer, model, processor = self.load(folder, base)
        picture = Image.open(self.world / "data/images/0.png")
        pixels = process_images([picture], processor, model.config)
        pixels = pixels if isinstance(pixels, list) else pixels.half()
        ids = tokenizer_image_token(f"USER: <image>\n{QUESTION} ASSISTANT:", tokenizer)
        with torch.inference_mode():
            out = model.float().generate(
                torch.tensor([ids]), images=pixels.float(), do_sample=False, max_new_tokens=8
            )
        # Old releases put a first token before; by value, not by place.
        return [token for token in out[0].tolist() if token != tokenizer.bos_token_id]

    def chat(self, folder: Path, base: Path | None) -> str:
        """What LLaVA's CLI answers."""
        words = ["--model-path", str(folder), "--image-file", str(self.world / "data/images/0.png")]
        words += ["--device", "cpu", "--conv-mode", "llava_v1", "--max-new-tokens", "4"]
        words += [] if base is None else ["--model-base", str(base)]
        stdin = sys.stdin
        sys.stdin = io.StringIO(QUESTION + "\n")
        try:
            with program() as printed:
                code = llava_command.main(["chat", *words, "--temperature", "0"])
        finally:
            sys.stdin = stdin
        assert code == 0, code
        return printed.getvalue()


def stages(driver: Driver) -> dict[str, Any]:
    """Projector stage, then LoRA, then an answer, for each tower and connector."""
    found = {}
    towers = [
        ("aimv2:aimv2", "mlp2x_gelu"),
        ("aimv2:aimv2", "pixel_shuffle"),
        ("aimv2:native", "mlp2x_gelu"),
        ("hf:siglip", "mlp2x_gelu"),
    ]
    for name, connector in towers:
        kind, _, folder_name = name.partition(":")
        tower, key = f"{kind}:{driver.world / folder_name}", f"{folder_name}-{connector}"
        start = ["--pretrain_mm_mlp_adapter", str(driver.world / f"{connector}.bin")]
        pictures = ["--data_path", str(driver.world / "data/pictures.json")]
        first = driver.fit(
            f"llava-pre-{key}", tower, connector, *start, *pictures,
            "--version", "plain", "--tune_mm_mlp_adapter", "True",
        )  # fmt: skip
        adapter = str(driver.out / f"llava-pre-{key}" / "mm_projector.bin")
        second = driver.fit(
            f"llava-lora-{key}", tower, connector, "--pretrain_mm_mlp_adapter", adapter,
            "--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0",
        )  # fmt: skip
        folder, base = driver.out / f"llava-lora-{key}", driver.world / "llm"
        found[key] = {"projector": first, "lora": second, "tokens": driver.tokens(folder, base)}
    key = "aimv2-pixel_shuffle"
    found[key]["chat"] = driver.chat(driver.out / f"llava-lora-{key}", driver.world / "llm")
    found[key]["pre_chat"] = driver.chat(driver.out / f"llava-pre-{key}", driver.world / "llm")
    return found


def tuned(driver: Driver) -> dict[str, Any]:
    """A tower that is trained, in full tuning and beside LoRA, saved and loaded again."""
    found, tower = {}, f"aimv2:{driver.world / 'aimv2'}"
    source = VisionTower(tower)
    source.load_model()
    for stage, words in (("full", []), ("lora", ["--lora_enable", "True", "--lora_r", "4"])):
        name = f"llava-tuned-{stage}"
        trained = driver.fit(
            name, tower, "mlp2x_gelu", *words, "--unfreeze_mm_vision_tower", "True",
            "--mm_vision_tower_lr", "1e-3", "--gradient_checkpointing", "True", "--bf16", "True",
            "--pretrain_mm_mlp_adapter", str(driver.world / "mlp2x_gelu.bin"),
        )  # fmt: skip
        end = {
            n: p.detach()
            for n, p in driver.model.get_vision_tower().vision_tower.named_parameters()
        }
        model = driver.load(driver.out / name, driver.world / "llm" if words else None)[1]
        tower_again = model.get_vision_tower()
        again = dict(tower_again.vision_tower.named_parameters())
        start = dict(source.vision_tower.named_parameters())
        found[stage] = {
            **trained,
            "moved": sum(not torch.equal(end[n], start[n]) for n in end),
            "count": len(end),
            # Loaded in float16, out of float32.
            "kept": all(torch.equal(end[n].half(), again[n]) for n in end),
            "frozen_again": not tower_again.trainable,
            "origin": tower_again.origin,
        }
    return found


def main(world: str, out: str) -> None:
    """Run every part, and write what was found."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    driver = Driver(Path(world), folder)
    matrix, parts = (importlib.import_module(name) for name in ("llava_matrix", "llava_parts"))
    found = {
        "versions": {n: importlib.import_module(n).__version__ for n in ("torch", "transformers")},
        "stages": stages(driver),
        "tuned": tuned(driver),
        "matrix": matrix.matrix(driver),
        "across": matrix.across(driver),
        **parts.parts(driver),
    }
    (folder / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
