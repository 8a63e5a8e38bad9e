"""A world for timing: rows as LLaVA's instruction data has them, and random models of real shapes.

Nothing can be downloaded, so pictures are noise in JPEG, words are those of the shipped tokenizer,
and weights are drawn; none of that changes what a step costs.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import build_encoder
from PIL import Image

from aimv2_mllm.model import llms, mllm
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.towers import Tower, load_tower
from aimv2_mllm.model.weights import save_encoder

# Each is one token of the shipped tokenizer when a blank stands before it.
WORDS = ["digit", "colour", "green", "left", "sheet", "purple", "blue", "corner", "top", "red"]
# What share of the rows are of which shape, with the least and the most of turns, of the tokens of
# a question, and of the tokens of all answers of a row together. The shares are those of LLaVA
# 1.5's 665 k rows (its paper, table 7): VQAv2, GQA, OKVQA, A-OKVQA, OCR-VQA, Visual Genome and
# RefCOCO 444 k; LLaVA-Instruct and TextCaps 180 k; ShareGPT 41 k, without pictures. Nobody
# published lengths; these are ours: many short questions, one long answer or a few, or a long talk.
SHAPES: tuple[tuple[float, tuple[int, int], tuple[int, int], tuple[int, int], bool], ...] = (
    (0.67, (3, 8), (8, 15), (20, 100), True),
    (0.27, (1, 3), (10, 30), (60, 350), True),
    (0.06, (2, 4), (30, 100), (400, 700), False),
)
# name -> (width, inner width, blocks, heads, key and value heads, words); 0.5b is Qwen2.5-0.5B and
# 135m SmolLM-135M, as their config.json has them, the others are smaller ones of the same kind.
LLMS = {
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "135m": (576, 1536, 30, 9, 3, 49_152),
    "0.1b": (512, 1408, 12, 8, 2, 151_936),
    "nano": (64, 128, 2, 4, 2, 512),
}


def write_rows(folder: Path, count: int, seed: int = 0) -> Path:
    """LLaVA's JSON with `count` rows and their pictures (640 x 480, as COCO's often are)."""
    random = np.random.default_rng(seed)
    shares = np.array([share for share, *_ in SHAPES])
    kinds = np.repeat(
        range(len(SHAPES)), np.diff(np.round(count * np.cumsum([0, *shares]))).astype(int)
    )
    rows = []
    for number, kind in enumerate(random.permutation(kinds)):
        _, turns, question, answers, seen = SHAPES[kind]
        talk = _talk(random, turns, question, answers)
        row = {"id": number, "conversations": talk}
        if seen:
            row["image"] = f"{number}.jpg"
            talk[0]["value"] = f"<image>\n{talk[0]['value']}"
            write_picture(folder / row["image"], random)
        rows.append(row)
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    return file


def write_picture(file: Path, random: np.random.Generator) -> None:
    """A JPEG of noise, 640 x 480."""
    noise = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480)).save(file, "JPEG", quality=90)


def _talk(
    random: np.random.Generator,
    turns: tuple[int, int],
    question: tuple[int, int],
    answers: tuple[int, int],
) -> list[dict[str, str]]:
    def words(count: int) -> str:
        return " ".join(random.choice(WORDS, count))

    count = int(random.integers(*turns, endpoint=True))
    total = int(random.integers(*answers, endpoint=True)) - count  # each has an end token
    cuts = np.sort(random.choice(np.arange(1, total), count - 1, replace=False))
    talk = []
    for length in np.diff([0, *cuts, total]):
        asked = words(int(random.integers(*question, endpoint=True)))
        talk += [{"from": "human", "value": asked}, {"from": "gpt", "value": words(int(length))}]
    return talk


def random_models(tower: str, image_size: int, sizes: tuple[int, ...]) -> tuple[Tower, Any, Any]:
    """A tower, an LLM of `sizes` as in LLMS, both with random weights, and the shipped
    tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    made = Tower("aimv2", build_encoder(tower, image_size), Preprocessing(image_size))
    width, inner, blocks, heads, kv_heads, words = sizes
    tokenizer = llms.load_tokenizer("tiny_llm")
    shape = Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return made, Qwen2ForCausalLM(shape), tokenizer


def write_models(folder: Path, tower: str, image_size: int, sizes: tuple[int, ...]) -> None:
    """The same as folders `tower` and `llm`."""
    made, llm, tokenizer = random_models(tower, image_size, sizes)
    save_encoder(made.module, folder / "tower")
    made.preprocessing.save(folder / "tower")
    for one in (llm, tokenizer):
        one.save_pretrained(folder / "llm")


def assembled(folder: Path) -> tuple[Any, Any]:
    """The Llava of folders `tower` and `llm`, its connector always the same, and its processor."""
    torch.manual_seed(0)
    tower = load_tower(str(folder / "tower"))
    llm = str(folder / "llm")
    tokenizer = llms.load_tokenizer(llm)
    model = mllm.assemble(tower, llms.load_llm(llm), tokenizer)
    return model, mllm.build_processor(model, tokenizer, tower.preprocessing)
