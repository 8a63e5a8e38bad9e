"""What a model says to one question about one picture: the reference that an export carries.

It imports nothing of ours, for `verify-export` runs this file itself in a process of its own, where
importing `aimv2_mllm` is refused: what is loaded there, stock libraries load.

Letters in shapes: L tokens of the prompt, A of the answer, V of the vocabulary, C columns.
"""

import hashlib
import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

QUESTION = "What is in this picture?"
MOST_TOKENS, NUM_COLUMNS, NUM_PIXELS = 12, 64, 32
SIDECAR = "aimv2_mllm.json"


def picture(side: int) -> Image.Image:
    """The reference picture of so many pixels a side: two ramps and a checkered disc, the same on
    every machine, for it is drawn in whole numbers."""
    row, column = np.mgrid[0:side, 0:side].astype(np.int64)
    red, green = 255 * row // side, 255 * column // side
    inside = (2 * row - side) ** 2 + (2 * column - side) ** 2 < side**2 // 2
    checks = (8 * row // side + 8 * column // side) % 2 == 0
    blue = np.where(inside & checks, 255, 64)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def digest(image: Image.Image) -> str:
    """The sha256 of a picture's size and pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def asked(processor: Any) -> tuple[dict[str, torch.Tensor], Image.Image]:
    """The inputs that a Llava's own processor makes of the question, and the picture.

    The picture is half as large again as what the model sees, and square: it is resized, and
    nothing of it is cut off or added.
    """
    size = processor.image_processor.crop_size or processor.image_processor.size
    image = picture(3 * int(size["height"]) // 2)
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(inputs), image


def said(
    model: Any, inputs: dict[str, torch.Tensor], answer: list[int] | None, vocabulary: int
) -> dict[str, Any]:
    """What `model` makes of `inputs`: greedy `tokens` (A,), and `logits` of evenly spaced
    `columns` of the vocabulary, one row (C,) where each token of `answer` (its own where None) is
    foretold."""
    model = model.float().eval()
    tokens = greedy(model, inputs)
    answer = tokens if answer is None else answer
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    rest = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}
    rest.pop("mm_token_type_ids", None)
    with torch.inference_mode():
        logits = model(input_ids=ids, **rest).logits[0]  # (L + A, V)
    last = min(vocabulary, logits.shape[-1]) - 1
    columns = np.linspace(0, last, NUM_COLUMNS).astype(int).tolist()
    rows = logits[length - 1 : length - 1 + len(answer)][:, columns].double()
    return {"tokens": tokens, "columns": columns, "logits": rows.tolist()}


def greedy(model: Any, inputs: dict[str, torch.Tensor]) -> list[int]:
    """The tokens that `generate` adds to the prompt, at most MOST_TOKENS, without sampling."""
    from transformers import GenerationConfig

    own = model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else model.config.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else end
    config = GenerationConfig(
        max_new_tokens=MOST_TOKENS,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad[0] if isinstance(pad, list) else pad,
    )
    with torch.inference_mode():
        out = model.generate(**inputs, generation_config=config)
    new: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
    return new


def reference(
    model: Any,
    processor: Any,
    answer: list[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    ids: torch.Tensor | None = None,
) -> dict[str, Any]:
    """All of it: the picture's digest, the prompt's tokens, some pixel values, and what is said.

    `model` lies on the CPU, where float32 is computed as such, and what filled an accelerator has
    room; it is turned to float32, its weights rounded to `dtype` before. `ids` (1, L) are the
    prompt, by default the processor's own.
    """
    assert model.device.type == "cpu", model.device
    inputs, image = asked(processor)
    if ids is not None:
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if dtype is not None:
        for parameter in model.parameters():  # the weights alone: buffers are not written
            parameter.data = parameter.data.to(dtype).float()
    return {
        "question": QUESTION,
        "picture": {"side": image.width, "sha256": digest(image)},
        "input_ids": inputs["input_ids"][0].tolist(),
        "pixels": some(inputs["pixel_values"]),
        **said(model, inputs, answer, len(processor.tokenizer)),
    }


def some(values: torch.Tensor) -> list[float]:
    """A few of `values`, evenly spaced."""
    flat = values.detach().double().flatten().cpu()
    return flat[np.linspace(0, len(flat) - 1, NUM_PIXELS).astype(int).tolist()].tolist()


def features(encoder: Any, pixel_values: torch.Tensor) -> dict[str, Any]:
    """What an `encoder` makes of pixel values: the shape of its features, and some of them."""
    with torch.inference_mode():
        out = encoder(pixel_values)
    tokens = out if isinstance(out, torch.Tensor) else out.last_hidden_state  # (1, N, D)
    return {"shape": list(tokens.shape), "features": some(tokens)}


class _Refusal(importlib.abc.MetaPathFinder):
    """Imports nothing of ours: what needs it is no stock folder."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "aimv2_mllm":
            raise ImportError(f"{name} is refused here: the folder must load without it")


def _whole(report: dict[str, Any]) -> list[str]:
    """What of the weights and the model do not fit each other."""
    faults = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    faults += [f"{name} is left over" for name in sorted(report["unexpected_keys"])]
    return faults + [f"{name} has another shape" for name, *_ in report["mismatched_keys"]]


def _load(folder: str) -> tuple[Any, list[str]]:
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report
        dtype=torch.float32,
    )
    return model, _whole(report)


def from_llava(folder: Path, told: dict[str, Any], _: str) -> dict[str, Any]:
    """What the Llava in `folder` says when transformers alone loads it."""
    from transformers import AutoProcessor

    model, faults = _load(str(folder))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    loaded = {"class": type(model).__name__, "faults": faults}
    return loaded | reference(model, processor, told["reference"]["tokens"])


def from_adapter(folder: Path, told: dict[str, Any], base: str) -> dict[str, Any]:
    """What the Llava in `base` says with the adapter in `folder`, when peft loads it."""
    from peft import PeftModel
    from transformers import AutoProcessor, GenerationConfig

    model, faults = _load(base)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    loaded = {"class": type(model).__name__, "faults": faults}
    return loaded | reference(model, processor, told["reference"]["tokens"])


def from_encoder(folder: Path, told: dict[str, Any], _: str) -> dict[str, Any]:
    """The features of the encoder in `folder`, loaded by transformers."""
    from transformers import AutoImageProcessor, AutoModel

    model, report = AutoModel.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
    )
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    image = picture(told["reference"]["picture"]["side"])
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    loaded = {"class": type(model).__name__, "faults": _whole(report), "pixels": some(pixels)}
    return loaded | {"picture": {"sha256": digest(image)}} | features(model.eval(), pixels)


KINDS = {"llava": from_llava, "adapter": from_adapter, "encoder": from_encoder}


def found(kind: str, folder: Path, base: str = "") -> dict[str, Any]:
    """What the export of that kind in `folder`, on its `base` where it has one, says; `error`
    where it cannot be loaded."""
    from transformers import __version__

    told = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    said: dict[str, Any] = {"transformers": __version__}
    try:
        return said | KINDS[kind](folder, told, base)
    except Exception as error:  # whatever stops a stock library is what was asked for
        text = " ".join(str(error).split())
        return said | {"error": f"{type(error).__name__}: {text[:400]}"}


def main(kind: str, folder: str, out: str, base: str) -> None:
    """Write what is found to the file `out`, as JSON, after refusing all imports of ours."""
    sys.meta_path.insert(0, _Refusal())
    Path(out).write_text(json.dumps(found(kind, Path(folder), base)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
