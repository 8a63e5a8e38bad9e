"""What an export says inside LLaVA, by LLaVA's own loader with our towers in it.

`verify-export` runs it as a process of its own: python -m aimv2_mllm.export.llava_answers DST OUT
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from aimv2_mllm.errors import UsageError
from aimv2_mllm.export.answers import MOST_TOKENS, QUESTION, SIDECAR, digest, picture, some
from aimv2_mllm.towers import llava
from aimv2_mllm.towers.llava_samples import IMAGE


def collapsed(ids: list[int], image_token: int) -> list[int]:
    """Tokens in which a picture is one IMAGE and not many `image_token`."""
    kept = [n for i, n in enumerate(ids) if n != image_token or ids[i - 1 : i] != [image_token]]
    return [IMAGE if n == image_token else n for n in kept]


def answers(folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """The same as `answers.reference` tells, of LLaVA's model, and LLaVA's own tokens of the
    prompt."""
    llava.install()
    load = importlib.import_module("llava.model.builder").load_pretrained_model
    with contextlib.redirect_stdout(sys.stderr):
        tokenizer, model, processor, _ = load(str(folder), None, folder.name, device="cpu")
    tools: Any = importlib.import_module("llava.mm_utils")
    wanted = told["reference"]
    image = picture(wanted["picture"]["side"])
    pixels = tools.process_images([image], processor, model.config).float()
    prompt = collapsed(wanted["input_ids"], told["image_token"])
    ids = torch.tensor([prompt])
    model, answer = model.float().eval(), wanted["tokens"]
    with torch.inference_mode():
        # It is asked by embeddings, so the prompt is not in what comes back.
        out = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=MOST_TOKENS)
        forced = torch.cat([ids, torch.tensor([answer])], dim=1)
        logits = model(input_ids=forced, images=pixels).logits[0]  # (L + A, V)
    rows = logits[-len(answer) - 1 : -1][:, wanted["columns"]]
    tower = model.get_vision_tower()
    return {
        "class": type(model).__name__,
        "origin": str(tower.origin),
        "picture": {"side": image.width, "sha256": digest(image)},
        "pixels": some(pixels),
        "input_ids": prompt,
        "asked": asked(tokenizer, tools),
        "columns": wanted["columns"],
        "logits": rows.double().tolist(),
        "tokens": out[0].tolist(),
    }


def asked(tokenizer: Any, tools: Any) -> list[int]:
    """The question in LLaVA's own tokens, by its conversation `vicuna_v1`."""
    talks = importlib.import_module("llava.conversation").conv_templates
    talk = talks["vicuna_v1"].copy()
    talk.append_message(talk.roles[0], f"<image>\n{QUESTION}")
    talk.append_message(talk.roles[1], None)
    ids: list[int] = tools.tokenizer_image_token(talk.get_prompt(), tokenizer, IMAGE)
    return ids


def main(folder: str, out: str) -> None:
    """Write what is found to the file `out`, as JSON."""
    told = json.loads((Path(folder) / SIDECAR).read_text(encoding="utf-8"))
    found: dict[str, Any] = {"transformers": importlib.import_module("transformers").__version__}
    try:
        found |= answers(Path(folder), told)
    except UsageError as error:
        found["error"] = str(error)
    except Exception as error:  # whatever stops LLaVA is what was asked for
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
