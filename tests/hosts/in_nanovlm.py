"""Run by the interpreter of a nanoVLM environment, in its checkout: what the plug-in does there.

Prints one JSON object. Arguments: a work folder, the folder of a tokenizer.
"""

import copy
import json
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import torch

from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.weights import save_encoder
from aimv2_mllm.towers import nanovlm

with suppress(ImportError):
    import torchvision_on_cpu  # noqa: F401  (where torchvision stands beside a CPU-only torch)

work, tokenizer = Path(sys.argv[1]), sys.argv[2]
LLM = {
    "lm_hidden_dim": 32, "lm_inter_dim": 64, "lm_n_heads": 4, "lm_n_kv_heads": 2,
    "lm_n_blocks": 2, "lm_base_vocab_size": 512, "lm_vocab_size": 600, "lm_max_length": 256,
    "lm_tokenizer": tokenizer, "max_img_size": 112, "hf_repo_name": None,
}  # fmt: skip


def encoder(name: str, *, native: bool = False, size: int = 56) -> str:
    torch.manual_seed(0)
    config = EncoderConfig(16, 40, 2, 2, image_size=size, native=native)
    save_encoder(AIMv2Encoder(config), work / name)
    Preprocessing(size).save(work / name)
    return f"aimv2:{work / name}"


def model_of(cfg):
    from models import vision_language_model as vlm

    # nanoVLM reads LLMs from the hub alone; a random one does.
    vlm.LanguageModel.from_pretrained = classmethod(lambda cls, cfg: cls(cfg))
    torch.manual_seed(1)
    return vlm.VisionLanguageModel(cfg)


def inputs(model, images):
    token = model.tokenizer.image_token_id
    count = model.cfg.mp_image_token_length * len(images)
    ids = torch.tensor([[5] + [token] * count + [6, 7, 8, 9]])
    return ids, torch.where(ids == token, -100, ids)


def checks(tower: str, **values) -> dict:
    """Everything that a user does with one tower and connector."""
    import models.config

    nanovlm.install(tower, **LLM, **values)
    cfg = models.config.VLMConfig()
    model = model_of(cfg)
    images = torch.rand(2, 3, cfg.vit_img_size, cfg.vit_img_size)
    ids, labels = inputs(model, images)
    _, loss = model(ids, images, torch.ones_like(ids), labels)
    loss.backward()
    grads = {
        part: sum(int(p.grad.abs().sum() > 0) for p in getattr(model, part).parameters())
        for part in ("vision_encoder", "MP", "decoder")
    }
    model.eval()
    answer = model.generate(ids, images, max_new_tokens=4, greedy=True)
    model.save_pretrained(str(work / "saved"))
    again = type(model).from_pretrained(str(work / "saved")).eval()
    with torch.no_grad():
        features, back = model.vision_encoder(images), again.vision_encoder(images)
        logits, logits_back = (m(ids, images, torch.ones_like(ids))[0] for m in (model, again))
    source = nanovlm.split(cfg.vit_model_type)[0]
    return {
        "tokens": cfg.mp_image_token_length,
        "word": again.cfg.vit_model_type,
        "loss": loss.item(),
        "grads": grads,
        "parameters": {part: len([*getattr(model, part).parameters()]) for part in grads},
        "answer": answer.tolist()[0],
        "answer_again": again.generate(ids, images, max_new_tokens=4, greedy=True).tolist()[0],
        "reloaded_features": (features - back).abs().max().item(),
        "reloaded_logits": (logits - logits_back).abs().max().item(),
        "tower": (features - reference(source, images)).abs().max().item(),
    }


def reference(source: str, images: torch.Tensor) -> torch.Tensor:
    """The features of the same pixels by our own loader, normalised by hand."""
    from aimv2_mllm.model.weights import load_encoder

    size = images.shape[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, _, resized = source.removeprefix("aimv2:").partition("?")
        ours = load_encoder(folder, image_size=size if resized else None)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        return ours((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))


def message(action) -> str:
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refusals(tower: str) -> dict:
    import models.config
    from models.vision_language_model import ViT

    cfg = models.config.VLMConfig()
    wrong = {
        "bare": {"vit_model_type": tower.removeprefix("aimv2:")},
        "misspelt": {"vit_model_type": tower.replace("aimv2:", "aim2:")},
        "size": {"vit_model_type": tower, "vit_img_size": 512},
    }
    found = {}
    for name, values in wrong.items():
        bad = copy.copy(cfg)
        for key, value in values.items():
            setattr(bad, key, value)
        found[name] = message(lambda bad=bad: ViT.from_pretrained(bad))
    found["nowhere"] = message(lambda: nanovlm.install("aimv2:/no/such/folder"))
    found["grid"] = message(lambda: nanovlm.install(tower, mp_pixel_shuffle_factor=3))
    found["connector"] = message(lambda: nanovlm.install(f"{tower}#pixel_shufle"))
    found["tokens"] = message(
        lambda: (
            nanovlm.install(tower, **LLM, mp_image_token_length=7),
            model_of(models.config.VLMConfig()),
        )
    )
    found["field"] = message(lambda: nanovlm.install(tower, vit_depth=3))
    return found


def train(tower: str) -> dict | None:
    """Three steps by nanoVLM's own train.py, whose checkpoint is then read without the source."""
    try:
        import datasets
    except ImportError:
        return None
    sys.modules.setdefault("wandb", ModuleType("wandb"))  # imported there, and not used here
    from PIL import Image

    pictures = [Image.new("RGB", (56, 56), (40 * n, 90, 200 - 40 * n)) for n in range(5)]
    talk = [[{"user": "Which colour?", "assistant": f"Number {n}."}] for n in range(5)]
    rows = {
        "images": [[pictures[n % 5]] for n in range(60)],
        "texts": [talk[n % 5] for n in range(60)],
    }
    (work / "data").mkdir()
    features = datasets.Features(
        images=datasets.Sequence(datasets.Image()),
        texts=[{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(work / "data" / "train.parquet")
    nanovlm.install(f"{tower}#pixel_shuffle", **LLM, vlm_checkpoint_path=str(work / "checkpoints"))
    import models.config
    import train as program

    cfg = models.config.VLMConfig()
    before = model_of(cfg).vision_encoder.state_dict()
    program.train(
        models.config.TrainConfig(
            batch_size=2, gradient_accumulation_steps=1, max_training_steps=3, eval_interval=1,
            val_size=12, train_dataset_path=str(work / "data"), log_wandb=False,
            use_lmms_eval=False, max_sample_length=256, stats_log_interval=1,
        ),
        models.config.VLMConfig(),
    )  # fmt: skip
    [last] = (work / "checkpoints").glob("*/step_2")
    folder = Path(tower.removeprefix("aimv2:"))
    folder.rename(folder.with_name("gone"))
    from models.vision_language_model import VisionLanguageModel

    after = VisionLanguageModel.from_pretrained(str(last)).vision_encoder.state_dict()
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    return {
        "moved": sorted(moved),
        "kept": sorted(after.keys() - moved),
        "finite": all(bool(value.isfinite().all()) for value in after.values()),
    }


def stock() -> dict:
    """nanoVLM's own tower is built as before."""
    import models.config
    from models.vision_transformer import ViT as Original

    nanovlm.install()
    cfg = models.config.VLMConfig(vit_model_type="testing", vit_hidden_dim=16, vit_n_heads=2,
                                  vit_inter_dim=32, vit_n_blocks=1, vit_img_size=64)  # fmt: skip
    from models import vision_language_model as vlm

    return {
        "tower": type(vlm.ViT(cfg)) is Original,
        "projector": type(vlm.ModalityProjector(cfg)).__name__,
    }


if __name__ == "__main__":
    plain, native = encoder("plain"), encoder("native", native=True)
    found = {
        "stock": stock(),
        "plain": checks(plain, mp_pixel_shuffle_factor=2),
        "native": checks(native, mp_pixel_shuffle_factor=2),
        "resized": checks(f"{plain}?image_size=84", mp_pixel_shuffle_factor=2),
    }
    for connector in (
        "linear",
        "mlp",
        "pixel_shuffle",
        "average_pool:factor=2",
        "resampler:num_queries=3",
        "c_abstractor:target=2,depth=1",
    ):
        found[connector] = checks(f"{plain}#{connector}")
    found["refusals"] = refusals(plain)
    found["train"] = train(plain)
    print(json.dumps(found))
