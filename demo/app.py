"""The demonstration in a browser: talk to models, look inside them, compare them.

    python demo/app.py MODEL [MODEL ...]

Gradio alone: what is done stands in `aimv2_mllm.visitors`. Nothing
leaves this machine, and nothing of a visitor stays on it.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from talk import chat, leaver
from views import compare, inside

from aimv2_mllm import heap
from aimv2_mllm.errors import UsageError
from aimv2_mllm.visitors.showroom import Showroom

DELETE = (60, 3600)  # every minute, files that are an hour old
MOST_BYTES, MOST_WAITING = "10mb", 64
# Gradio keeps about half a MiB for each visitor that there was, gone or not, up to so many. Whom it
# forgets goes on as before, but for what stands under "Look inside".
MOST_VISITORS = 32
# Those that every device has, so that none is fetched.
FONTS, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
CSS = """
.gradio-container { max-width: 1100px !important; width: 100%; margin: auto }
#question { min-height: 3rem }
@media (max-width: 600px) { #conversation { height: 40vh !important } }
#tokens .wrap { gap: 4px } #tokens label { padding: 2px 8px; font-family: monospace }
.shown .image-container { padding-top: 1.9rem } /* its label covers nothing of it */
button[aria-label="Share"] { display: none } /* to a hub: nothing leaves this machine */
"""
# Whatever a model or a visitor writes, the page asks nobody else for anything.
HEAD = """<meta http-equiv="Content-Security-Policy" content="default-src 'self' 'unsafe-inline'
 'unsafe-eval' data: blob:">"""


def build(room: Showroom, folder: Path) -> gr.Blocks:
    """The page of `room`, which writes its pictures to `folder`."""
    with gr.Blocks(
        title="AIMv2 in a multimodal LLM", analytics_enabled=False, delete_cache=DELETE
    ) as page:
        gr.Markdown("# AIMv2 in a multimodal LLM\nEverything runs on the machine that serves this.")
        with gr.Tab("Chat"):
            shown = chat(room, folder)
        with gr.Tab("Look inside"):
            inside(room, folder, shown)
        with gr.Tab("Compare"):
            compare(room, folder)
        page.unload(leaver(room))
    return page


@contextmanager
def _uploads_to(folder: str) -> Iterator[None]:
    """What visitors give lies in `folder`, and goes with it."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        yield
    finally:
        del os.environ["GRADIO_TEMP_DIR"]
        if before is not None:
            os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def running(
    room: Showroom,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    login: list[tuple[str, str]] | None = None,
) -> Iterator[gr.Blocks]:
    """The page of `room` while it is served, on a free port unless one is given."""
    heap.share_pools()
    room.bot(room.names[0])  # what is wrong with it is said before there is a page
    with tempfile.TemporaryDirectory(prefix="aimv2-demo-") as folder, _uploads_to(folder):
        page = build(room, Path(folder)).queue(max_size=MOST_WAITING, default_concurrency_limit=4)
        try:
            page.launch(
                server_name=host, server_port=port, share=share, auth=login,
                max_file_size=MOST_BYTES, state_session_capacity=MOST_VISITORS, ssr_mode=False,
                theme=gr.themes.Default(font=FONTS, font_mono=MONO), css=CSS, head=HEAD,
                footer_links=[], quiet=True, prevent_thread_lock=True,
            )  # fmt: skip
        except OSError as error:
            page.close()
            where = f"{host}:{port}" if port else host
            said = f"{where}: no page can be served there: {str(error).partition('.')[0]}"
            raise UsageError(f"{said}; give another --port, or --host") from None
        try:
            if share and page.share_url is None:
                raise UsageError(
                    "--share: Gradio's servers, which would open this to the internet, were not "
                    "reached; without it the page is served on this machine"
                )
            page.share = False  # else its scripts are fetched from Gradio's, not from here
            yield page
        finally:
            page.close()


def serve(models: list[str], **words: Any) -> None:
    """Serve the page of `models` until Ctrl-C; `words` are those of `running`."""
    with running(Showroom(models), **words) as page:
        print(f"open {page.share_url or page.local_url} (Ctrl-C ends it)", flush=True)
        page.block_thread()


if __name__ == "__main__":
    from aimv2_mllm.__main__ import main

    sys.exit(main(["demo", *sys.argv[1:]]))
