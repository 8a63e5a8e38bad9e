"""How each format is used, in the words of its model card."""

from collections.abc import Mapping
from typing import Any

TITLES = {
    "llava": "A multimodal LLM that transformers loads as `LlavaForConditionalGeneration`.",
    "adapter": "Adapters and connector of a multimodal LLM, in peft's format.",
    "original-llava": "A multimodal LLM in the layout of haotian-liu/LLaVA.",
    "encoder": "An AIMv2 vision encoder.",
}
LLAVA = """\
transformers {minimum} or newer. Older ones load it without a word and compute something else: they
feed the connector features from before the encoder's last norm.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")
processor = AutoProcessor.from_pretrained("{name}")
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is it?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Or `pipeline("image-text-to-text", model="{name}")`.

Not run here: vLLM (`vllm serve {name} --model-impl transformers`) and SGLang
(`python -m sglang.launch_server --model-path {name} --model-impl transformers`). Their own
implementations of Llava know no AIMv2 tower, so the flag is needed.

`transformers serve {name}` (`pip install 'transformers[serving]'`) answers OpenAI's
`/v1/chat/completions`, with pictures as `image_url` (a data URL), streamed or not.

`aimv2-mllm verify-export {name}` loads the folder by transformers alone, and compares logits and
greedy tokens with those of the run, which are in `aimv2_mllm.json`."""

ADAPTER = """\
On its base, {base}; transformers {minimum} or newer:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

base = AutoModelForImageTextToText.from_pretrained("BASE")
base.generation_config = GenerationConfig.from_pretrained("{name}")  # what ends an answer
model = PeftModel.from_pretrained(base, "{name}")  # the connector{tower} too
processor = AutoProcessor.from_pretrained("{name}")
```"""
ASSEMBLED = """
There is no such base as a folder. This package puts it together (its connector is replaced by
that of the adapter):

```python
from pathlib import Path
from aimv2_mllm.export.adapter import assemble_base

assemble_base("{tower}", "{llm}", Path("BASE"))
```"""
ORIGINAL = """\
LLaVA with this package beside it (`pip install --no-deps llava-torch==1.2.2.post1`, see README):

```sh
aimv2-llava chat --model-path {name} --image-file picture.png --conv-mode {mode}
```

The tower lies in `vision_tower`, which config.json names `aimv2:./vision_tower`: relative to
itself, so the folder may be moved and copied as a whole. Its last part must keep its words, by
which LLaVA tells what it is. LLaVA without this package knows no such tower."""
ENCODERS = {
    "original": """\
```python
from aimv2_mllm import load_encoder

features = load_encoder("{name}")(pixel_values)  # (B, N, D), after the final norm
```""",
    "transformers": """\
transformers {minimum} or newer:

```python
from transformers import AutoImageProcessor, AutoModel

encoder = AutoModel.from_pretrained("{name}")
pixels = AutoImageProcessor.from_pretrained("{name}")(picture, return_tensors="pt")
features = encoder(**pixels).last_hidden_state  # (B, N, D), after the final norm
```""",
    "timm": """\
Not run here, for timm needs torchvision:

```python
import timm

encoder = timm.create_model("local-dir:{name}", num_classes=0)
```""",
}


def usage(name: str, told: Mapping[str, Any]) -> str:
    """How the export called `name`, of which the sidecar says `told`, is used."""
    texts = {"llava": LLAVA, "original-llava": ORIGINAL, "adapter": ADAPTER}
    texts["encoder"] = ENCODERS.get(told.get("layout", ""), "")
    mode = {"v1": "llava_v1", "plain": "plain"}.get(told.get("template", ""))
    words = {"name": name, "minimum": told["min_transformers"], "mode": mode}
    base = told.get("base") or {}
    words["base"] = " and ".join(str(value) for value in base.values())
    if "stage" in base:
        words["base"] = f"`aimv2-mllm export RUN/{base['stage']}/model BASE`"
    words["tower"] = " and the tower" if told.get("tower_tuned") else ""
    text = texts[told["format"]].format(**words)
    if "llm" in base:
        text += "\n" + ASSEMBLED.format(**base)
    if told.get("not_on_4_37"):
        text += f"\n\nLLaVA's own transformers 4.37 cannot: {', '.join(told['not_on_4_37'])}."
    if told.get("prompt_as_trained") is False:
        text += (
            "\n\nIts processor cuts a prompt into other tokens than its training did, which "
            "`aimv2-mllm chat` does as the training: answers may differ."
        )
    if told.get("pictures_as_trained") is False:
        text += (
            "\n\nIts processor makes squares of pictures otherwise than its training did, which "
            "`aimv2-mllm chat` of the run does: answers about pictures that are not square may "
            "differ."
        )
    return text
