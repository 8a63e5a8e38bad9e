"""A LLaVA in miniature for both environments: tokenizer, LLM, towers, pictures and conversations.

Everything is drawn from seeds and written in forms that libraries of 2024 and of now read alike.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from aimv2_mllm import save_encoder
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig

WORDS = "a picture of the red green blue small large square on what is colour where answer it"
LLM = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}

PROCESSOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def make_llm(folder: Path) -> Path:
    """A Llama of random weights with a SentencePiece tokenizer, as `tokenizer.model` alone."""
    import sentencepiece

    folder.mkdir(parents=True)
    text = folder / "text.txt"
    generator = np.random.default_rng(0)
    words = WORDS.split()
    lines = [" ".join(generator.choice(words, 9)) for _ in range(400)]
    prompt = (
        "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:"
    )
    text.write_text("\n".join([*lines, *[prompt] * 50]) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, num_threads=1,
        minloglevel=2, hard_vocab_limit=False, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False,  # as Llama's
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).get_piece_size()
    tokenizer = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": True,
        "model_max_length": 512,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({**LLM, "vocab_size": size}))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file(_llm_weights(size), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _llm_weights(vocab: int) -> dict[str, torch.Tensor]:
    width, hidden = 32, 64
    draw = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width)}
    for layer in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}"] = (width, width)
        shapes[f"model.layers.{layer}.mlp.gate_proj"] = (hidden, width)
        shapes[f"model.layers.{layer}.mlp.up_proj"] = (hidden, width)
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (width, hidden)
    state = {f"{n}.weight": torch.randn(s, generator=draw) * 0.2 for n, s in shapes.items()}
    for layer in range(2):
        state[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(width)
        state[f"model.layers.{layer}.post_attention_layernorm.weight"] = torch.ones(width)
    state["model.norm.weight"] = torch.ones(width)
    return state


def make_tower(folder: Path, *, native: bool = False, seed: int = 1) -> Path:
    """An AIMv2 encoder of random weights for 56 pixels (4 x 4 patches), with its processor."""
    torch.manual_seed(seed)
    config = EncoderConfig(24, 48, 3, 3, image_size=56, native=native)
    save_encoder(AIMv2Encoder(config), folder)
    processor = {**PROCESSOR, "crop_size": {"height": 56, "width": 56}}
    if native:
        processor = {**PROCESSOR, "do_resize": False, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def make_foreign(folder: Path, kind: str) -> Path:
    """A CLIP or SigLIP tower of random weights for 56 pixels, in the names that transformers has
    always written."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    types = {"clip": (CLIPVisionConfig, CLIPVisionModel)}
    types["siglip"] = SiglipVisionConfig, SiglipVisionModel
    config, model = types[kind]
    torch.manual_seed(2)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "image_size": 56}
    network = model(config(**sizes, num_attention_heads=3, patch_size=14))
    folder.mkdir(parents=True)
    network.config.save_pretrained(folder)
    state = {
        name if name.startswith("vision_model.") else f"vision_model.{name}": tensor.contiguous()
        for name, tensor in network.state_dict().items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    square = {"height": 56, "width": 56}
    sized = {"size": square}  # SigLIP squashes, CLIP crops
    if kind == "clip":
        sized = {"size": {"shortest_edge": 56}, "crop_size": square, "do_center_crop": True}
    processor = {"image_processor_type": "CLIPImageProcessor", **PROCESSOR, **sized}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def make_world(folder: Path) -> Path:
    """All of it."""
    make_llm(folder / "llm")
    make_tower(folder / "aimv2")
    make_tower(folder / "native", native=True)
    for kind in ("clip", "siglip"):
        make_foreign(folder / kind, kind)
    for kind in ("mlp2x_gelu", "pixel_shuffle"):
        make_projector(folder / f"{kind}.bin", kind)
    make_data(folder / "data")
    return folder


def make_projector(path: Path, kind: str, width: int = 24) -> Path:
    """A `mm_projector.bin` of fixed random weights: `mlp2x_gelu` or `pixel_shuffle`."""
    first = width if kind == "mlp2x_gelu" else 4 * width
    names = ("0", "2") if kind == "mlp2x_gelu" else ("mlp.0", "mlp.2")
    draw = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in zip(names, ((32, first), (32, 32)), strict=True):
        state[f"model.mm_projector.{name}.weight"] = torch.randn(shape, generator=draw) * 0.2
        state[f"model.mm_projector.{name}.bias"] = torch.zeros(32)
    torch.save(state, path)
    return path


def said(question: str, answer: str) -> list[dict[str, str]]:
    """A conversation about a picture, in LLaVA's words."""
    asked = {"from": "human", "value": f"<image>\n{question}"}
    return [asked, {"from": "gpt", "value": answer}]


def make_data(folder: Path, count: int = 8) -> Path:
    """`count` conversations in LLaVA's JSON, with pictures of different shapes under `images`.

    Of `data.json`, which is returned, the last is without one; `pictures.json` has one for each."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(3)
    rows = []
    for number in range(count):
        height, width = (int(n) for n in generator.integers(60, 120, 2))
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        answer = " ".join(generator.choice(WORDS.split(), 5))
        row = {"image": f"{number}.png", "conversations": said("what is it", answer)}
        rows.append(row)
    (folder / "pictures.json").write_text(json.dumps(rows))
    del rows[-1]["image"]
    rows[-1]["conversations"][0]["value"] = "what is it"
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "images" / "cut.png").write_bytes((folder / "images" / "0.png").read_bytes()[:900])
    long = " ".join(["red"] * 400)
    sick = [
        # LLaVA takes the quoted word for the answer's, and then learns nothing of the sample.
        {"image": "0.png", "conversations": said("who says ASSISTANT: here", "red")},
        {"image": "gone.png", "conversations": said("what is it", "red")},
        {"image": "cut.png", "conversations": said("what is it", "red")},
        {"image": "1.png", "conversations": said(f"what is it {long}", "red")},
        {"image": "2.png", "conversations": said("what is it", f"blue {long}")},
    ]
    (folder / "sick.json").write_text(json.dumps([*rows, *sick]))
    return folder / "data.json"
