"""What is not a stage and not a checkpoint: images, tiles, LoRA's places, resuming, evaluation, the
doctor."""

import importlib
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava_matrix import arguments
from PIL import Image

from aimv2_mllm.errors import UsageError
from aimv2_mllm.towers import llava_command
from aimv2_mllm.towers.llava_doctor import examine
from aimv2_mllm.towers.llava_training import trained_parts

GRIDS = [[112, 56], [56, 112], [112, 112]]


def model_with(driver: Any, tower: str, connector: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = LlavaLlamaForCausalLM.from_pretrained(driver.world / "llm")
    given = {**vars(arguments(tower)), "mm_projector_type": connector, **more}
    model.get_model().initialize_vision_modules(SimpleNamespace(**given))
    return model.eval()


def embedded(model: Any, images: Any, sizes: Any = None, rows: int = 1) -> Any:
    """The embeddings (rows, T, D) and the mask of a prompt of one token around each image."""
    ids = torch.tensor([[1, -200, 5]] * rows)
    with torch.no_grad():
        out = model.prepare_inputs_labels_for_multimodal(
            ids, None, torch.ones_like(ids), None, ids.clone(), images, sizes
        )
    return out[4], out[2]


def native(driver: Any) -> dict[str, Any]:
    """Images of different sizes in a batch, and each by itself."""
    found = {}
    images = [torch.randn(3, 56, 84), torch.randn(3, 112, 56), torch.randn(3, 28, 28)]
    for connector in ("mlp2x_gelu", "pixel_shuffle", "resampler:num_queries=5,num_heads=4"):
        model = model_with(driver, f"aimv2:{driver.world / 'native'}", connector)
        together, mask = embedded(model, images, rows=3)
        alone = [embedded(model, image[None])[0][0] for image in images]
        off = max(
            float((batch[: len(one)] - one).abs().max())
            for batch, one in zip(together, alone, strict=True)
        )
        found[connector] = {"lengths": mask.sum(1).tolist(), "off": off}
    return found


def tiles(driver: Any) -> dict[str, int]:
    """How long a prompt with a picture in tiles becomes, by merge and connector."""
    from llava.mm_utils import process_images

    found = {}
    picture = Image.fromarray(np.zeros((50, 100, 3), np.uint8))  # two tiles, side by side
    for merge in ("flat", "spatial", "spatial_unpad"):
        for connector in ("mlp2x_gelu", "pixel_shuffle"):
            tower = f"aimv2:{driver.world / 'aimv2'}"
            model = model_with(driver, tower, connector, mm_patch_merge_type=merge)
            model.config.image_aspect_ratio = "anyres"
            model.config.image_grid_pinpoints = GRIDS
            processor = model.get_vision_tower().image_processor
            images = process_images([picture], processor, model.config)
            found[f"{merge}, {connector}"] = embedded(model, images, [picture.size])[0].shape[1]
    return found


def places_of_lora(driver: Any) -> dict[str, int]:
    """Parameters of LoRA inside a tower that is there before LoRA is, by tower and by who names
    the targets."""
    from peft import LoraConfig, get_peft_model

    ours = driver.train.find_all_linear_names
    found = {}
    for tower in ("clip", "aimv2"):
        name = str(driver.world / "clip") if tower == "clip" else f"aimv2:{driver.world / 'aimv2'}"
        for whose, finder in (("llava", ours.__wrapped__), ("ours", ours)):
            model = model_with(driver, name, "linear")
            config = LoraConfig(r=2, target_modules=finder(model), task_type="CAUSAL_LM")
            parts = trained_parts(get_peft_model(model, config))
            found[f"{tower}, {whose}"] = parts.get("lora in vision_tower", (0, 0))[0]
            found[f"llm beside {tower}, {whose}"] = parts["lora in llm"][0]
    return found


def pixels(driver: Any) -> float:
    """How far our image processor is from transformers' with Pillow."""
    transformers = importlib.import_module("transformers")
    theirs = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    side = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = theirs(**side)
    ours = model_with(driver, f"aimv2:{driver.world / 'aimv2'}", "linear").get_vision_tower()
    far = 0.0
    for path in sorted((driver.world / "data/images").glob("[0-9].png")):
        picture = Image.open(path).convert("RGB")
        a = ours.image_processor.preprocess(picture, return_tensors="pt")["pixel_values"]
        b = processor.preprocess(picture, return_tensors="pt")["pixel_values"]
        far = max(far, float((a - b).abs().max()))
    return far


def stock(driver: Any) -> dict[str, str]:
    """What LLaVA's own names still give, and what our builder says to names that mislead it."""
    builder = importlib.import_module("llava.model.multimodal_encoder.builder")
    found = {}
    for name in ("clip", "aimv2", "siglip"):
        try:
            config = arguments(str(driver.world / name))
            found[name] = type(builder.build_vision_tower(config)).__name__
        except UsageError as error:
            found[name] = str(error)
    return found


def evaluated(driver: Any) -> str:
    """An answer by llava.eval.model_vqa, which puts its tensors on a GPU: not here."""
    folder, questions = driver.out / "llava-tuned-full", driver.out / "questions.jsonl"
    asked = {"question_id": 1, "image": "0.png", "text": "what is it"}
    questions.write_text(json.dumps(asked) + "\n")
    answers = driver.out / "answers/a.jsonl"
    words = ["model_vqa", "--model-path", str(folder), "--question-file", str(questions)]
    words += ["--image-folder", str(driver.world / "data/images"), "--answers-file", str(answers)]
    there, load = torch.Tensor.cuda, driver.builder.load_pretrained_model
    torch.Tensor.cuda = lambda self, *_, **__: self
    driver.builder.load_pretrained_model = lambda *a, **k: load(*a, **k, device="cpu")
    try:
        with driver.program():
            code = llava_command.main(["eval", *words, "--temperature", "0"])
    finally:
        torch.Tensor.cuda, driver.builder.load_pretrained_model = there, load
    assert code == 0, code
    return json.loads(answers.read_text())["text"]


def doctor(driver: Any) -> dict[str, Any]:
    """What the doctor says of a sound run and of a sick one."""
    tower = f"aimv2:{driver.world / 'aimv2'}"
    start = str(driver.world / "pixel_shuffle.bin")
    lora = ("--lora_enable", "True", "--lora_r", "4", "--pretrain_mm_mlp_adapter", start)
    found = {}
    for name, data in (("sound", "data.json"), ("sick", "sick.json")):
        words = driver.words(f"llava-lora-{name}", tower, "pixel_shuffle", *lora)
        lines = list[str]()
        words += ["--data_path", str(driver.world / "data" / data)]
        faults = examine(words, num_samples=64, say=lines.append)
        found[name] = {"faults": faults, "lines": lines}
    return found


def resumed(driver: Any) -> dict[str, Any]:
    """LoRA beside a tuned tower, stopped after two of three epochs and gone on with."""
    tower, name = f"aimv2:{driver.world / 'aimv2'}", "llava-lora-resumed"
    words = ["--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0"]
    words += ["--unfreeze_mm_vision_tower", "True", "--save_strategy", "epoch"]
    words += ["--pretrain_mm_mlp_adapter", str(driver.world / "mlp2x_gelu.bin")]
    whole = driver.fit(name, tower, "mlp2x_gelu", *words)["losses"]
    end = driver.state()
    folder = driver.out / name
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in sorted(newest.iterdir()):
        path.unlink()
    newest.rmdir()
    again = driver.fit(name, tower, "mlp2x_gelu", *words)["losses"]
    after = driver.state()
    off = max(float((end[n] - after[n]).abs().max()) for n in end)
    return {"whole": whole, "again": again, "off": off}


def parts(driver: Any) -> dict[str, Any]:
    """Everything above, by name."""
    found = {}
    for part in (native, tiles, places_of_lora, pixels, stock, evaluated, doctor):
        found[part.__name__] = part(driver)
    if driver.transformers >= 5:  # older ones cannot read their own random state under torch 2.6+
        found["resumed"] = resumed(driver)
    return found
