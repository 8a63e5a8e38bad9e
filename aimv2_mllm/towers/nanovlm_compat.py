"""What nanoVLM needs to run on transformers 5; on older ones it changes nothing.

Its tokenizer's chat template gave a list of ids, and gives a dict now: training would score no word
(a loss that is not a number, and no error), and `generate.py` would stop.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any


def install_tokenizer(vlm: Any) -> None:
    """Make nanoVLM's tokenizers give ids where no dict is asked for."""
    processors = import_module("data.processors")
    builder = _ids_by_default(processors.get_tokenizer)
    processors.get_tokenizer = vlm.get_tokenizer = builder  # type: ignore[attr-defined]


def _ids_by_default(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_tokenizer(*words: Any, **options: Any) -> Any:
        tokenizer = original(*words, **options)  # the same one every time
        template = tokenizer.apply_chat_template
        if not isinstance(template, functools.partial):
            tokenizer.apply_chat_template = functools.partial(template, return_dict=False)
        return tokenizer

    return get_tokenizer
