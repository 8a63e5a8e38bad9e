"""The tab where a model is talked to."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from parts import MAY_FAIL, ONE_AT_A_TIME, UNLISTED, a_sheet, given, told

from aimv2_mllm.model.sampling import Sampling
from aimv2_mllm.visitors import visit
from aimv2_mllm.visitors.showroom import Showroom

KINDS = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"]


class Settings(NamedTuple):
    """What an answer depends on beside the conversation, in the order that `answer` takes it."""

    model: gr.Dropdown
    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    most: gr.Slider
    seed: gr.Number


class Talk(NamedTuple):
    """What a visitor sees of a conversation."""

    shown: gr.Chatbot
    box: gr.MultimodalTextbox
    stop: gr.Button
    counts: gr.Textbox


def chat(room: Showroom, folder: Path) -> gr.Chatbot:
    """The tab's page; what is shown of the conversation is returned."""
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
    settings = Settings(model, *_settings())
    with gr.Accordion("Camera", open=False):
        camera = given(sources=["webcam", "clipboard"], label="Camera or clipboard")

    _answers(room, Talk(shown, box, stop, counts), settings)
    _fills(room, folder, settings.model, box, draw, camera)
    _keeps(folder, shown, settings.system, save, saved, load)
    for event in (shown.clear, shown.undo, load.upload):  # it is of another answer now
        event(lambda: "", None, counts, **UNLISTED)
    return shown


def leaver(room: Showroom) -> Callable[[gr.Request], None]:
    """What gives back the memory of the visitor who clears the conversation or goes."""

    def leave(request: gr.Request) -> None:
        room.leave(str(request.session_hash))

    return leave


def _settings() -> list[Any]:
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox(
            label="System prompt", value="", info="Where the model's template has a place"
        )
        with gr.Row():
            warmth = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
        with gr.Row():
            most = gr.Slider(1, 1024, 96, step=1, label="Longest answer, tokens")
            seed = gr.Number(label="Seed", precision=0, info="Empty: another each time")
    return [system, warmth, top_p, most, seed]


def _answers(room: Showroom, talk: Talk, settings: Settings) -> None:
    """What is asked, asked again or edited is answered, until somebody stops it."""
    shown, box, counts = talk.shown, talk.box, talk.counts
    asks: dict[str, Any] = {
        "fn": _answerer(room), "inputs": [shown, *settings], "outputs": [shown, counts],
        "show_progress": "minimal", **ONE_AT_A_TIME,
    }  # fmt: skip
    words: dict[str, Any] = {"api_visibility": "private", **MAY_FAIL}
    running = [
        box.submit(_put, [box, shown], [shown, counts, box], **words).success(
            **asks, api_name="answer"
        ),
        shown.retry(_again, shown, [shown, counts], **words).success(
            **asks, api_visibility="private"
        ),
        shown.edit(_edit, shown, [shown, counts], **words).success(
            **asks, api_visibility="private"
        ),
    ]
    for event in running:
        event.failure(_put_back, shown, [shown, box], **UNLISTED)
    talk.stop.click(None, cancels=running, api_visibility="private")
    shown.undo(_undo, shown, [shown, box], **UNLISTED)
    shown.clear(leaver(room), **UNLISTED)


def _answerer(room: Showroom) -> Callable[..., Iterator[tuple[list[Any], str]]]:
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

    return answer


def _put(asked: Any, history: list[Any]) -> tuple[list[Any], str, dict[str, Any]]:
    with told():
        asked = asked or {"text": "", "files": []}
        return visit.with_question(history, asked["text"], asked["files"]), "", {"text": ""}


def _again(history: list[Any]) -> tuple[list[Any], str]:
    with told():
        return visit.without_answer(history), ""


def _edit(history: list[Any], change: gr.EditData) -> tuple[list[Any], str]:
    index = change.index if isinstance(change.index, int) else change.index[0]
    with told():
        return visit.edited(history, index, str(change.value)), ""


def _undo(history: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    kept, text, files = visit.without_question(history)
    return kept, {"text": text, "files": files}


def _put_back(history: list[Any]) -> tuple[Any, Any]:
    # What was stopped counts as failed too, and keeps the answer that there is.
    is_open = bool(history) and history[-1]["role"] == "user"
    return _undo(history) if is_open else (gr.skip(), gr.skip())


def _fills(
    room: Showroom, folder: Path, model: gr.Dropdown, box: gr.MultimodalTextbox, draw: gr.Button,
    camera: gr.Image,
) -> None:  # fmt: skip
    """What else brings pictures into the box: an example, the camera."""

    def drawn(asked: Any) -> dict[str, Any]:
        file, question = a_sheet(folder)
        return {"text": question, "files": [*(asked or {}).get("files", []), file]}

    def add(asked: Any, file: str | None) -> Any:
        return {**asked, "files": [*asked["files"], file]} if file else gr.skip()

    model.change(lambda name: gr.Button(visible=room.knows_sheets(name)), model, draw, **UNLISTED)
    draw.click(drawn, box, box, **UNLISTED)
    camera.change(add, [box, camera], box, **UNLISTED)


def _keeps(
    folder: Path, shown: gr.Chatbot, system: gr.Textbox, save: gr.Button,
    saved: gr.DownloadButton, load: gr.UploadButton,
) -> None:  # fmt: skip
    """A conversation goes out as a file, and comes in again."""

    def keep(history: list[Any], system: str) -> Any:
        with told():
            file = Path(tempfile.mkdtemp(dir=folder)) / "conversation.json"
            file.write_text(visit.written(history, system), encoding="utf-8")
            return gr.DownloadButton(value=str(file), visible=True)

    def reopen(file: str) -> tuple[list[Any], str]:
        with told():
            return visit.read(Path(file).read_text(encoding="utf-8", errors="replace"), folder)

    save.click(keep, [shown, system], saved, api_name="save", **MAY_FAIL)
    load.upload(reopen, load, [shown, system], api_name="open", **MAY_FAIL)
