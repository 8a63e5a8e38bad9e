"""The assembled model: any tower, any connector, any causal LLM, as a matrix on tiny models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_towers import MAKE, picture, saved

from aimv2_mllm.chat.chat import load_model
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model import llms, mllm
from aimv2_mllm.model.connectors import CONNECTORS
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.grids import fitting_grid
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.projectors import rename_projector
from aimv2_mllm.model.stock import is_stock
from aimv2_mllm.model.towers import Tower, load_tower

TOKENIZER = llms.load_tokenizer("tiny_llm")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": len(TOKENIZER), "max_position_embeddings": 512,
    "bos_token_id": TOKENIZER.bos_token_id, "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}  # fmt: skip
HEADS = {"head_dim": 8}
# model_type of the LLM -> what else its configuration needs
LLMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": HEADS,
    "mistral": HEADS,
    "gemma3_text": {**HEADS, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "smollm3": {"tie_word_embeddings": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"depth": 3},
    "pixel_shuffle": {"factor": 2},
    "average_pool": {"target": [2, 3]},
    "resampler": {"num_queries": 5},
    "c_abstractor": {"target": 2, "depth": 1},
}
IMAGE = {"type": "image"}


def llm(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **LLMS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # as drawn, whatever it sees would change little
        parameter.data *= 3
    return model


def tower(native: bool = False, **words: Any) -> Tower:
    torch.manual_seed(1)
    encoder = AIMv2Encoder(EncoderConfig(16, 24, 2, 2, image_size=56, native=native))
    encoder.trunk.post_trunk_norm.weight.data += torch.randn(16)
    return Tower("aimv2", encoder, Preprocessing(56), **words)


def assembled(tower: Tower, llm: Any, **connector: Any) -> tuple[Any, Any]:
    model = mllm.assemble(tower, llm, TOKENIZER, **connector)
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval(), mllm.build_processor(model, TOKENIZER, tower.preprocessing)


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def inputs(processor: Any) -> Any:
    """Conversations with one picture, with two of other shapes around a word, and with none."""
    talks = [
        [{"role": "user", "content": [IMAGE, words("What is it?")]}],
        [
            {"role": "user", "content": [words("First"), IMAGE, words("and"), IMAGE]},
            {"role": "assistant", "content": [words("two")]},
            {"role": "user", "content": [words("What else?")]},
        ],
        [{"role": "user", "content": [words("Say a word.")]}],
    ]
    text = [
        processor.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in talks
    ]
    pictures = [[picture(60, 40)], [picture(30, 90), picture(28, 28)], []]
    processor.tokenizer.padding_side = "left"
    return processor(images=pictures, text=text, return_tensors="pt", padding=True)


def check(model: Any, processor: Any, folder: Path) -> None:
    """The model learns, talks with and without a cache alike, and is the same when loaded again."""
    given = inputs(processor)
    assert (given["input_ids"] == model.config.image_token_id).any(1).tolist() == [
        True,
        True,
        False,
    ]
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    said = model(**given, labels=labels)
    said.loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(p.grad is not None for p in model.model.language_model.parameters())
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    greedy["suppress_tokens"] = [model.config.image_token_id]  # no picture comes with one it says
    tokens = model.generate(**given, **greedy)
    assert torch.equal(tokens, model.generate(**given, **greedy, use_cache=False))
    beams = model.generate(**given, **greedy, num_beams=2)
    assert beams.shape == tokens.shape
    other = given["pixel_values"].flip(-1) * 2
    assert not torch.allclose(model(**{**given, "pixel_values": other}).logits, said.logits)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    bot = load_model(folder)
    again = inputs(bot.processor)
    assert again.keys() == given.keys()
    assert all(torch.equal(again[key], given[key]) for key in given)
    torch.testing.assert_close(bot.model(**again).logits, said.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LLMS)
def test_every_llm_sees_with_aimv2_as_a_stock_llava(kind: str, tmp_path: Path) -> None:
    model, processor = assembled(tower(), llm(kind))
    assert type(model) is transformers.LlavaForConditionalGeneration
    check(model, processor, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava"


@pytest.mark.parametrize("kind", MAKE)
def test_every_tower_serves_an_llm(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path / "tower")
    eyes = load_tower(tmp_path / "tower")
    model, processor = assembled(eyes, llm())
    stock = eyes.kind in ("clip", "siglip")
    assert (model.config.model_type == "llava") == stock
    check(model, processor, tmp_path / "model")
    config = (tmp_path / "model" / "config.json").read_text()
    assert str(tmp_path) not in config


@pytest.mark.parametrize("name", CONNECTORS)
def test_every_connector_serves_a_tower_and_an_llm(name: str, tmp_path: Path) -> None:
    model, processor = assembled(tower(), llm(), connector=name, options=OPTIONS[name])
    assert model.config.model_type == "aimv2_mllm_llava"
    check(model, processor, tmp_path)


@pytest.mark.parametrize("name", ["mlp", "pixel_shuffle", "resampler"])
def test_native_pictures_of_many_shapes_go_through_together(name: str, tmp_path: Path) -> None:
    model, processor = assembled(tower(native=True), llm(), connector=name, options=OPTIONS[name])
    check(model, processor, tmp_path)
    sizes = inputs(processor)["image_sizes"].tolist()
    assert len({tuple(size) for size in sizes}) > 1
    assert all(height % 14 == 0 and width % 14 == 0 for height, width in sizes)
    assert all(height * width // 196 <= 16 for height, width in sizes)


def test_a_native_picture_is_seen_alike_alone_and_among_others() -> None:
    model, processor = assembled(
        tower(native=True), llm(), connector="pixel_shuffle", options={"factor": 2}
    )
    pictures = [picture(60, 40), picture(20, 90), picture(90, 20), picture(60, 40)]
    together = processor.image_processor(pictures, return_tensors="pt")
    seen = model.get_image_features(**together).pooler_output
    for one, features in zip(pictures, seen, strict=True):
        alone = processor.image_processor([one], return_tensors="pt")
        [expected] = model.get_image_features(**alone).pooler_output
        torch.testing.assert_close(features, expected)
        height, width = alone["image_sizes"][0].tolist()
        assert processor.num_image_tokens((height // 14, width // 14)) == len(features)


# What of a tower is read, and whether transformers' own Llava can say it.
READINGS = [
    ("clip", {}, True),
    ("clip_vision_model", {"layers": [-2, -1]}, True),
    ("clip", {"layers": -2}, True),
    ("clip", {"norm": "post"}, False),
    ("clip", {"image_size": 42}, False),
    ("siglip", {}, True),
    ("siglip", {"norm": "pre"}, True),
    ("siglip_vision_model", {"layers": [0, 1]}, True),
    ("siglip_vision_model", {"layers": [-2], "norm": "post"}, False),
    ("siglip2", {}, False),
    ("dinov2", {}, False),
    ("dinov2", {"norm": "pre"}, True),
    ("dinov2_with_registers", {"norm": "pre"}, False),
    ("dinov3_vit", {}, False),
]


@pytest.mark.parametrize(("kind", "reading", "stock"), READINGS)
@torch.no_grad()
def test_the_llm_sees_what_the_tower_gives_through_the_connector(
    kind: str, reading: dict[str, Any], stock: bool, tmp_path: Path
) -> None:
    saved(kind, tmp_path)
    eyes = load_tower(tmp_path, **reading)
    model, processor = assembled(eyes, llm())
    assert (model.config.model_type == "llava") == stock
    assert is_stock(eyes, "mlp", {}) == stock
    pictures = [picture(), picture(28, 28)]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, eyes.prepare(pictures))
    projector = model.model.multi_modal_projector
    prefix = "multi_modal_projector." if stock else ""
    state = {prefix + name: tensor for name, tensor in projector.state_dict().items()}
    plain = rename_projector(state, "plain")
    tokens = eyes(pixels)
    hidden = torch.nn.functional.gelu(tokens @ plain["0.weight"].T + plain["0.bias"])
    expected = hidden @ plain["2.weight"].T + plain["2.bias"]
    seen = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(torch.stack(tuple(seen)), expected, rtol=1e-4, atol=1e-4)
    preprocessing, count = mllm.pictures_of(processor)
    assert preprocessing == eyes.preprocessing
    assert count == expected.shape[1] == model.config.image_seq_length


@torch.no_grad()
def test_layers_and_norms_of_aimv2_reach_the_llm() -> None:
    for reading, stock in (
        ({"layers": [-2, -1]}, True),
        ({"layers": [0, -1], "norm": "post"}, False),
    ):
        eyes = tower(**reading)
        model, _ = assembled(eyes, llm())
        assert (model.config.model_type == "llava") == stock
        pixels = torch.randn(2, 3, 56, 56)
        seen = torch.stack(tuple(model.get_image_features(pixel_values=pixels).pooler_output))
        expected = model.model.multi_modal_projector(eyes(pixels))
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_a_connector_that_cannot_serve_the_tower_is_refused_before_anything_is_built() -> None:
    with pytest.raises(UsageError, match="multiples of 3, not 4 x 4"):
        mllm.assemble(tower(), llm(), TOKENIZER, connector="pixel_shuffle", options={"factor": 3})
    with pytest.raises(UsageError, match="no option 'factor'"):
        mllm.assemble(tower(), llm(), TOKENIZER, connector="mlp", options={"factor": 3})


@pytest.mark.parametrize("kind", ["aimv2", *MAKE])
def test_nothing_of_an_assembled_model_is_held_twice_or_missing(kind: str, tmp_path: Path) -> None:
    mind = llm("qwen2")
    if kind == "aimv2":
        eyes = tower()
    else:
        saved(kind, tmp_path)
        eyes = load_tower(tmp_path)
    pixels, before = eyes.prepare([picture()]), [id(p) for p in mind.model.parameters()]
    model = mllm.assemble(eyes, mind, TOKENIZER).eval()
    assert before == [id(p) for p in model.model.language_model.parameters()]
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    shared = {p.data_ptr() for p in eyes.parameters()} & {
        p.data_ptr() for p in model.model.vision_tower.parameters()
    }
    assert shared
    assert not [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    # Of one tensor that was three, each has a storage of its own, as what is saved needs it.
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert model.get_image_features(pixel_values=pixels).pooler_output[0].isfinite().all()


def test_a_connector_is_drawn_alike_for_llms_of_every_depth_and_vocabulary() -> None:
    def drawn(seed: int, **sizes: int) -> dict[str, torch.Tensor]:
        config = transformers.LlamaConfig(**{**SIZES, **sizes})
        mind, eyes = transformers.LlamaForCausalLM(config), tower()
        torch.manual_seed(seed)
        return mllm.assemble(eyes, mind, TOKENIZER).model.multi_modal_projector.state_dict()

    first, *others = drawn(3), drawn(3, num_hidden_layers=3), drawn(3, vocab_size=9), drawn(4)
    alike = [all(torch.equal(first[name], other[name]) for name in first) for other in others]
    assert alike == [True, True, False]
    # As transformers draws a projector.
    assert not first["linear_1.bias"].any()
    assert float(first["linear_2.weight"].std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("size", "most", "unit", "grid"),
    [
        ((40, 60), 16, 1, (3, 4)),
        ((60, 40), 16, 1, (4, 3)),
        ((28, 28), 16, 1, (4, 4)),
        ((70, 60), 16, 2, (4, 4)),
        ((10, 5000), 16, 1, (1, 16)),
        ((10, 5000), 16, 2, (2, 8)),
        ((1, 1), 1, 1, (1, 1)),
    ],
)
def test_a_fitting_grid_keeps_the_shape_and_the_most(
    size: tuple[int, int], most: int, unit: int, grid: tuple[int, int]
) -> None:
    assert fitting_grid(*size, most, unit=unit) == grid


def test_every_fitting_grid_is_within_the_most_and_whole() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        height, width = (int(n) for n in random.integers(1, 3000, 2))
        most, unit = int(random.integers(4, 400)), int(random.integers(1, 3))
        rows, columns = fitting_grid(height, width, most, unit=unit)
        assert rows * columns <= most
        assert rows % unit == columns % unit == 0 < rows * columns
        assert (rows <= columns) == (height <= width) or rows == columns


def test_a_native_processor_scales_the_whole_picture() -> None:
    _, processor = assembled(tower(native=True), llm())
    wide = Image.new("RGB", (80, 20))
    wide.paste((255, 255, 255), (0, 0, 40, 20))
    made = processor.image_processor([wide], return_tensors="pt")
    height, width = made["image_sizes"][0].tolist()
    assert (height, width) == (28, 112)
    middle = made["pixel_values"][0, 0, height // 2, :width] > 0
    assert (middle[: width // 2 - 3].all(), middle[width // 2 + 3 :].any()) == (True, False)
