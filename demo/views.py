"""The tabs that look inside a model and compare two."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
from parts import MAY_FAIL, ONE_AT_A_TIME, SHOWN, UNLISTED, a_sheet, given, told

from aimv2_mllm.visitors import insight, visit
from aimv2_mllm.visitors.showroom import Showroom

NO_DECODER = (
    "This model was not given with the run that pre-trained its tower, so there is no decoder here."
)


def _about(room: Showroom, folder: Path, name: str) -> tuple[Any, Any]:
    """Where a picture is given and a question about it, for what is not a conversation."""
    picture = given(
        label="Picture",
        height=260,
        sources=["upload", "webcam", "clipboard"],
        elem_id=f"{name}-picture",
    )
    question = gr.Textbox(
        label="Question", value="", placeholder="What is on it?", elem_id=f"{name}-question"
    )
    draw = gr.Button("A held-out sheet", size="sm", visible=room.knows_sheets(room.names[0]))
    draw.click(lambda: a_sheet(folder), None, [picture, question], **UNLISTED)
    return picture, question


def inside(room: Showroom, folder: Path, shown: gr.Chatbot) -> None:
    with gr.Row():
        with gr.Column():
            model = gr.Dropdown(room.names, value=room.names[0], label="Model")
            picture, question = _about(room, folder, "inside")
            take = gr.Button("The last picture of the chat", size="sm")
            go = gr.Button("Look inside", variant="primary")
        with gr.Column():
            answered = gr.Textbox(label="Answer", interactive=False)
            tokens = gr.Radio(
                [], label="Its tokens: choose one", interactive=True, elem_id="tokens"
            )
            heat = gr.Image(label="Where the model looked for this token", elem_id="heat", **SHOWN)
    with gr.Row():
        tower = gr.Image(label="As the tower sees it, with its patches", **SHOWN)
        colours = gr.Image(label="Patch features: 3 principal components as colours", **SHOWN)
    kept = gr.State(None, time_to_live=3600)

    def look(model: str, file: str | None, question: str, request: gr.Request) -> tuple[Any, ...]:
        with told():
            seen = insight.view(room.bot(model), visit.picture_of(file))
            asked = visit.with_question([], question or "What is on it?", [str(file)])
            reply = room.ask(str(request.session_hash), model, asked)
            text = "".join(reply)
            return insight.gridded(seen), insight.coloured(seen), text, (seen, asked, reply.tokens)

    def where(model: str, found: Any) -> tuple[Any, ...]:
        with told():
            seen, asked, ids = found
            looked = insight.where(room.bot(model), *visit.asked(asked), ids)
            choices = [(text or "·", number) for number, text in enumerate(looked.texts)]
            first = insight.heated(seen, looked.shares[0])
            return gr.Radio(choices, value=0), first, (seen, looked.shares)

    def choose(token: int | None, found: Any) -> Any:
        if token is None or found is None:
            return gr.skip()
        return insight.heated(found[0], found[1][token])

    words: dict[str, Any] = {"api_visibility": "private", **ONE_AT_A_TIME}
    go.click(look, [model, picture, question], [tower, colours, answered, kept], **words).success(
        where, [model, kept], [tokens, heat, kept], **words
    )
    tokens.input(choose, [tokens, kept], heat, api_visibility="private", **MAY_FAIL)
    take.click(lambda history: (visit.pictures(history) or [None])[-1], shown, picture, **UNLISTED)
    _paint(room, model, picture)


def _paint(room: Showroom, model: gr.Dropdown, picture: gr.Image) -> None:
    first = room.longest_prefix(room.names[0])
    most = max(2, first)
    gr.Markdown("### What AIMv2 would paint\nIts pre-training decoder goes on after a prefix.")
    missing = gr.Markdown(NO_DECODER, visible=not first, elem_id="no-decoder")
    with gr.Column(visible=bool(first), elem_id="painting") as painting:
        with gr.Row():
            prefix = gr.Slider(
                1, most, min(8, most), step=1, label="Patches that it is shown", elem_id="prefix"
            )
            statistics = gr.Radio(
                [("the true patch's", "true"), ("of the last patch shown", "previous"),
                 ("mean of the prefix", "prefix")],
                value="true", label="Brightness and contrast of a painted patch",
            )  # fmt: skip
        with gr.Row():
            begun = gr.Image(label="What it is shown", **SHOWN)
            painted = gr.Image(label="What it paints", elem_id="painted", **SHOWN)
        caption = gr.Textbox(label="What it writes of the whole picture", interactive=False)

    def paint(model: str, file: str | None, prefix: float, statistics: str) -> tuple[Any, ...]:
        with told():
            painter = room.painter(model)
            return insight.painted(painter, visit.picture_of(file), int(prefix), statistics)

    def fitted(name: str) -> tuple[Any, ...]:
        most = room.longest_prefix(name)  # a smaller grid has fewer, a model alone none
        slider = gr.Slider(maximum=max(2, most))
        return slider, gr.Column(visible=bool(most)), gr.Markdown(visible=not most)

    inputs, outputs = [model, picture, prefix, statistics], [begun, painted, caption]
    words: dict[str, Any] = {"trigger_mode": "always_last", **ONE_AT_A_TIME}
    prefix.change(paint, inputs, outputs, api_name="paint", show_progress="hidden", **words)
    statistics.input(paint, inputs, outputs, api_visibility="private", **words)
    model.change(fitted, model, [prefix, painting, missing], **UNLISTED)


def compare(room: Showroom, folder: Path) -> None:
    names: list[gr.Dropdown] = []
    outputs: list[Any] = []
    sides = (("Left", room.names[0]), ("Right", room.names[-1]))
    with gr.Row():
        with gr.Column():
            picture, question = _about(room, folder, "compare")
        with gr.Column():
            for side, name in sides:
                names.append(gr.Dropdown(room.names, value=name, label=f"{side} model"))
            go = gr.Button("Ask both", variant="primary")
            if len(room.names) == 1:
                gr.Markdown("One model was given: start the demo with more of them to compare.")
    with gr.Row():
        for side, _ in sides:
            with gr.Column():
                label = f"{side} answer"
                outputs.append(gr.Textbox(label=label, interactive=False, lines=2, elem_id=side))
                took = f"{label}: what it took"
                outputs.append(
                    gr.Textbox(label=took, interactive=False, lines=2, elem_id=f"{side}-took")
                )
                outputs.append(gr.Image(label=f"{side} tower: patch features", **SHOWN))

    def both(
        file: str | None, question: str, left: str, right: str, request: gr.Request
    ) -> Iterator[list[Any]]:
        with told():
            image = visit.picture_of(file)
            asked = visit.with_question([], question, [str(file)])
            found: list[Any] = ["", "", None, "", "", None]
            yield found
            for start, model in ((0, left), (3, right)):
                found[start + 2] = insight.coloured(insight.view(room.bot(model), image))
                yield found
                # Sent once: a picture's file would be written anew while the page reads it.
                found[2] = found[5] = gr.skip()
                visitor = f"{request.session_hash} {start}"
                try:
                    with closing(room.ask(visitor, model, asked)) as reply:
                        for piece in reply:
                            found[start] += piece
                            yield found
                finally:  # also where it is stopped, or its page closed
                    room.leave(visitor)
                found[start + 1] = str(reply.counts)
                yield found

    words: dict[str, Any] = {"api_name": "compare", **ONE_AT_A_TIME}
    go.click(both, [picture, question, *names], outputs, **words)
