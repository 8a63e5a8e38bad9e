"""The demonstration in a browser: talk to models, look inside them, compare them.

    python demo/app.py MODEL [MODEL ...]

Gradio alone: what is done stands in `aimv2_mllm.showroom`, `visit` and `insight`. Nothing leaves
this machine, and nothing of a visitor stays on it.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from parts import MAY_FAIL, ONE_AT_A_TIME, UNLISTED, a_sheet, given, told
from views import compare, inside

from aimv2_mllm import visit
from aimv2_mllm.errors import UsageError
from aimv2_mllm.sampling import Sampling
from aimv2_mllm.showroom import Showroom

KINDS = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"]
DELETE = (60, 3600)  # every minute, files that are an hour old
MOST_BYTES, MOST_WAITING, MOST_VISITORS = "10mb", 64, 100
# Those that every device has, so that none is fetched.
FONTS, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
CSS = """
.gradio-container { max-width: 1100px !important; width: 100%; margin: auto }
#question { min-height: 3rem }
#tokens .wrap { gap: 4px } #tokens label { padding: 2px 8px; font-family: monospace }
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
            shown = _chat(room, folder)
        with gr.Tab("Look inside"):
            inside(room, folder, shown)
        with gr.Tab("Compare"):
            compare(room, folder)
        page.unload(_leave(room))
    return page


def _chat(room: Showroom, folder: Path) -> gr.Chatbot:
    model = gr.Dropdown(room.names, value=room.names[0], label="Model")
    shown = gr.Chatbot(
        label="Conversation", height="52vh", editable="user", render_markdown=False,
        buttons=["copy", "copy_all"], group_consecutive_messages=False, elem_id="conversation",
        placeholder="Add a picture, then ask about it.",
    )  # fmt: skip
    box = gr.MultimodalTextbox(
        label="Your question", placeholder="Ask; pictures by the clip, paste or drop",
        file_types=KINDS, file_count="multiple", max_lines=6, elem_id="question",
        sources=["upload"],
    )  # fmt: skip
    with gr.Row():
        stop = gr.Button("Stop", variant="stop", size="sm", min_width=90)
        draw = gr.Button("A held-out sheet", size="sm", visible=room.knows_sheets(room.names[0]))
        save = gr.Button("Save", size="sm", min_width=90)
        load = gr.UploadButton("Open a saved one", file_types=[".json"], size="sm")
    saved = gr.DownloadButton("Download conversation.json", visible=False, size="sm")
    counts = gr.Textbox(label="What it took", lines=1, interactive=False, elem_id="took")
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox(
            label="System prompt", value="", info="Where the model's template has a place"
        )
        with gr.Row():
            warmth = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
        with gr.Row():
            most = gr.Slider(1, 1024, 96, step=1, label="Longest answer, tokens")
            seed = gr.Number(label="Seed", precision=0, minimum=0, info="Empty: another each time")
    with gr.Accordion("Camera", open=False):
        camera = given(sources=["webcam", "clipboard"], label="Camera or clipboard")

    def put(asked: Any, history: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        with told():
            asked = asked or {"text": "", "files": []}
            return visit.with_question(history, asked["text"], asked["files"]), {"text": ""}

    def answer(
        history: list[Any], model: str, system: str, warmth: float, top_p: float, most: float,
        seed: float | None, request: gr.Request,
    ) -> Iterator[tuple[list[Any], str]]:  # fmt: skip
        with told():
            sampling = Sampling(warmth, top_p, seed=None if seed is None else int(seed))
            words = {"system": system, "max_new_tokens": int(most), "sampling": sampling}
            reply = room.ask(str(request.session_hash), model, history, **words)
            text = ""
            try:
                for piece in reply:
                    text += piece
                    yield [*history, visit.answer(text)], ""
                yield [*history, visit.answer(text or "(nothing)")], str(reply.counts)
            finally:  # whoever stops or leaves stops the model
                reply.close()

    def undo(history: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        kept, text, files = visit.without_question(history)
        return kept, {"text": text, "files": files}

    def put_back(history: list[Any]) -> tuple[Any, Any]:
        # What was stopped counts as failed too, and keeps the answer that there is.
        is_open = bool(history) and history[-1]["role"] == "user"
        return undo(history) if is_open else (gr.skip(), gr.skip())

    def edit(history: list[Any], change: gr.EditData) -> list[Any]:
        index = change.index if isinstance(change.index, int) else change.index[0]
        with told():
            return visit.edited(history, index, str(change.value))

    def again(history: list[Any]) -> list[Any]:
        with told():
            return visit.without_answer(history)

    def keep(history: list[Any], system: str) -> Any:
        with told():
            file = Path(tempfile.mkdtemp(dir=folder)) / "conversation.json"
            file.write_text(visit.written(history, system), encoding="utf-8")
            return gr.DownloadButton(value=str(file), visible=True)

    def reopen(file: str) -> tuple[list[Any], str]:
        with told():
            return visit.read(Path(file).read_text(encoding="utf-8", errors="replace"), folder)

    def drawn(asked: Any) -> dict[str, Any]:
        file, question = a_sheet(folder)
        return {"text": question, "files": [*(asked or {}).get("files", []), file]}

    def add(asked: Any, file: str | None) -> Any:
        return {**asked, "files": [*asked["files"], file]} if file else gr.skip()

    asks: dict[str, Any] = {
        "fn": answer, "inputs": [shown, model, system, warmth, top_p, most, seed],
        "outputs": [shown, counts], "show_progress": "minimal", **ONE_AT_A_TIME,
    }  # fmt: skip
    running = [
        box.submit(put, [box, shown], [shown, box], api_visibility="private", **MAY_FAIL).success(
            **asks, api_name="answer"
        ),
        shown.retry(again, shown, shown, api_visibility="private", **MAY_FAIL).success(
            **asks, api_visibility="private"
        ),
        shown.edit(edit, shown, shown, api_visibility="private", **MAY_FAIL).success(
            **asks, api_visibility="private"
        ),
    ]
    for event in running:
        event.failure(put_back, shown, [shown, box], **UNLISTED)
    stop.click(None, cancels=running, api_visibility="private")
    shown.undo(undo, shown, [shown, box], **UNLISTED)
    shown.clear(_leave(room), **UNLISTED)
    model.change(lambda name: gr.Button(visible=room.knows_sheets(name)), model, draw, **UNLISTED)
    draw.click(drawn, box, box, **UNLISTED)
    camera.change(add, [box, camera], box, **UNLISTED)
    save.click(keep, [shown, system], saved, api_name="save", **MAY_FAIL)
    load.upload(reopen, load, [shown, system], api_name="open", **MAY_FAIL)
    return shown


def _leave(room: Showroom) -> Any:
    def leave(request: gr.Request) -> None:
        room.leave(str(request.session_hash))

    return leave


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
    room.bot(room.names[0])  # what is wrong with it is said before there is a page
    with tempfile.TemporaryDirectory(prefix="aimv2-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # what visitors give lies there, and goes with it
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
            yield page
        finally:
            page.close()


def serve(models: list[str], **words: Any) -> None:
    """Serve the page of `models` until Ctrl-C; `words` are those of `running`."""
    with running(Showroom(models), **words) as page:
        print(f"open {page.local_url} (Ctrl-C ends it)", flush=True)
        page.block_thread()


if __name__ == "__main__":
    from aimv2_mllm.__main__ import main

    sys.exit(main(["demo", *sys.argv[1:]]))
