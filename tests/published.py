"""Chat templates as their LLMs are published with them, and small tokenizers with their tokens.

Those of FILES are the hub's, as trl carries them to tell models apart (its README names where each
is from). Those of WRITTEN are from memory: Mistral's of Mistral-7B-Instruct-v0.1, and SmolLM3's
without its words for thinking and tools.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llava_facts
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

FILES = {
    "Qwen2.5": "qwen2_5",
    "Qwen3": "qwen3",
    "Llama-3.1": "llama3_1",
    "Llama-3.2": "llama3_2",
    "Phi-3": "phi3",
    "Phi-3.5": "phi3_5",
    "Gemma 2": "gemma",
}
WRITTEN = {
    "Mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
        "{% endfor %}"
    ),
    "SmolLM3": (
        "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}\n"
        "{%- set mode = '/think' if enable_thinking else '/no_think' -%}\n"
        "{{- '<|im_start|>system\\n## Metadata\\n\\nKnowledge Cutoff Date: June 2025\\n' -}}\n"
        "{%- set today = strftime_now('%d %B %Y') -%}\n"
        "{{- 'Today Date: ' ~ today ~ '\\nReasoning Mode: ' + mode + '\\n\\n' -}}\n"
        "{%- if messages[0].role == 'system' -%}{{- messages[0].content -}}{%- endif -%}\n"
        "{{- '<|im_end|>\\n' -}}\n"
        "{%- for message in messages -%}\n"
        "{%- set content = message.content if message.content is string else '' -%}\n"
        "{%- if message.role == 'user' -%}\n"
        "{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}\n"
        "{%- elif message.role == 'assistant' -%}\n"
        "{% generation %}\n"
        "{%- if mode == '/think' -%}\n"
        "{{ '<|im_start|>assistant\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}\n"
        "{%- else -%}\n"
        "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' + content.lstrip('\\n')"
        " + '<|im_end|>\\n' }}\n"
        "{%- endif -%}\n"
        "{% endgeneration %}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        "{{- '<|im_start|>assistant\\n' -}}\n"
        "{{- '' if mode == '/think' else '<think>\\n\\n</think>\\n' -}}\n"
        "{%- endif -%}\n"
    ),
}
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
# name -> special tokens, the end of an answer, that of a text, the start of a text
TOKENS: dict[str, tuple[list[str], str, str, str | None]] = {
    "Qwen2.5": (CHATML, "<|im_end|>", "<|endoftext|>", None),
    "Qwen3": (CHATML, "<|im_end|>", "<|im_end|>", None),
    "SmolLM3": (CHATML, "<|im_end|>", "<|im_end|>", None),
    "Llama-3.1": (HEADERS, "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    "Llama-3.2": (HEADERS, "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>"),
    "Phi-3": (PHI, "<|end|>", "<|endoftext|>", None),
    "Phi-3.5": (PHI, "<|end|>", "<|endoftext|>", "<s>"),  # here with a start token of its own
    "Gemma 2": (["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", "</s>", "<s>"),
    "Mistral": ([], "</s>", "</s>", "<s>"),
}
NAMES = list(TOKENS)


def template(name: str) -> str:
    """The chat template called `name`, to the letter."""
    if name in WRITTEN:
        return WRITTEN[name]
    found = find_spec("trl")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "chat_templates"
    return (folder / f"{FILES[name]}.jinja").read_text(encoding="utf-8")


def tokenizer(name: str, *, legacy: bool = False) -> Any:
    """A small tokenizer with the tokens, the template, and the start and end of that name; an image
    is no token of it yet."""
    special, _, end, start = TOKENS[name]
    made = llava_facts.llama_tokenizer(legacy=legacy)
    made.add_special_tokens({"additional_special_tokens": special})
    if name in ("Qwen3", "SmolLM3"):
        made.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    made.bos_token, made.eos_token, made.pad_token = start, end, end
    begin = [] if start is None else [(start, made.convert_tokens_to_ids(start))]
    single = "$A" if start is None else f"{start} $A"
    made.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=begin)
    made.chat_template = template(name)
    return made
