"""What the tabs have in common: pictures that come in, how mistakes are said, the queue."""

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from aimv2_mllm.errors import UsageError
from aimv2_mllm.visitors.showroom import sheet

ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}  # others wait
UNLISTED: dict[str, Any] = {"queue": False, "api_visibility": "private"}
# Outside the queue a mistake would not be said.
MAY_FAIL: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
SHOWN: dict[str, Any] = {
    "interactive": False, "format": "png", "buttons": ["download"], "height": 330,
    "elem_classes": "shown",
}  # fmt: skip


def given(**words: Any) -> gr.Image:
    """Where a picture comes in, as the file it is: it is decoded by us, within our limits."""
    picture = gr.Image(**words)
    picture.preprocess = lambda payload: None if payload is None else payload.path
    return picture


@contextmanager
def told() -> Iterator[None]:
    """What a visitor can cause is said to him, and nothing else is."""
    try:
        yield
    except UsageError as error:
        raise gr.Error(str(error), print_exception=False) from None


def a_sheet(folder: Path) -> tuple[str, str]:
    """A new held-out sheet as a file, and a question about it."""
    picture, question = sheet(secrets.randbelow(2**31))
    file = Path(tempfile.mkdtemp(dir=folder)) / "sheet.png"
    picture.save(file)
    return str(file), question
