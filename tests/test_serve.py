"""An export behind `transformers serve`, asked as OpenAI's clients ask: equal to our own answer."""

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.import_utils import is_serve_available

from aimv2_mllm import __main__ as command
from aimv2_mllm.chat.chat import answer, load_model
from aimv2_mllm.export.answers import picture

pytestmark = pytest.mark.skipif(
    not is_serve_available(), reason="needs pip install 'transformers[serving]'"
)
QUESTION, NUM_TOKENS = "What is on the sheet?", 12


@pytest.fixture
def served(tiny_run: Path, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The folder of an export, and where it is served."""
    folder = tmp_path / "mine"
    assert command.main(["export", str(tiny_run), str(folder)]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(sys.executable).with_name("transformers")
    words = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen([script, *words], stderr=subprocess.DEVNULL) as on:
        try:
            yield str(folder), f"http://127.0.0.1:{port}"
        finally:
            on.kill()


def asked(url: str, body: dict[str, Any], seconds: float = 60) -> str:
    """What the server says to a POST of `body`, once it is there."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as told:
                return str(told.read().decode())
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        except urllib.error.URLError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


@pytest.mark.slow
def test_a_served_export_answers_as_we_do_streamed_or_not(served: tuple[str, str]) -> None:
    folder, place = served
    image, file = picture(70), io.BytesIO()
    image.save(file, "PNG")
    data = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    shown, text = {"type": "image_url", "image_url": {"url": data}}, {"type": "text"}
    body = {
        "model": folder,
        "messages": [{"role": "user", "content": [shown, {**text, "text": QUESTION}]}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0.0,
    }
    url = f"{place}/v1/chat/completions"
    said = json.loads(asked(url, body))["choices"][0]["message"]["content"]
    lines = asked(url, {**body, "stream": True}).splitlines()
    parts = [json.loads(x.removeprefix("data: ")) for x in lines if x.startswith("data: {")]
    streamed = [part["choices"][0]["delta"].get("content") or "" for part in parts]
    message = {"role": "user", "content": [{"type": "image"}, {**text, "text": QUESTION}]}
    ours = answer(load_model(folder), [message], [image], max_new_tokens=NUM_TOKENS)
    assert len(ours) > 10
    assert said.strip() == ours
    assert len([part for part in streamed if part]) > 3
    assert "".join(streamed).strip() == ours
