"""How fast each kind of run answers, one question at a time, when nothing else runs."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from aimv2_mllm.chat.chat import load_model, stream
from aimv2_mllm.comparison.grid import Cell
from aimv2_mllm.comparison.tasks import DONE
from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.questions.asked import Asked
from aimv2_mllm.data.talks.conversations import said
from aimv2_mllm.disk import replace_file

SPEED = "speed.json"
QUESTIONS, WARM_UP, ANSWER_TOKENS = 16, 2, 16


def measure(cells: Sequence[Cell], asked: Asked) -> dict[tuple[str, ...], dict[str, Any]]:
    """By the values of a run its `image_tokens` and the median `first_token_ms`, of the first of
    `cells` with them; what was measured before is read."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for cell in tqdm(cells, desc="speed", unit="model", disable=None):
        if cell.values in found or not (cell.folder / DONE).is_file():
            continue
        path, made_from = cell.folder / SPEED, (cell.folder / DONE).read_text(encoding="utf-8")
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if known.get("made_from") != made_from:
            known = {"made_from": made_from, **_measured(cell.recipe.output, asked)}
            replace_file(path, json.dumps(known, indent=2).encode() + b"\n")
        found[cell.values] = known
    return found


def _measured(folder: Path, asked: Asked) -> dict[str, Any]:
    bot, seconds, tokens = load_model(folder), list[float](), set[int]()
    for number, question in enumerate(asked.questions):
        if not question.picture or len(seconds) == WARM_UP + QUESTIONS:
            continue
        try:
            pictures = [asked.open(number)]
        except Unusable:
            continue
        reply = stream(
            bot, [said("user", question.text, pictures=1)], pictures, max_new_tokens=ANSWER_TOKENS
        )
        "".join(reply)
        seconds.append(reply.counts.first_token_seconds)
        tokens.add(reply.counts.image_tokens)
    counted = seconds[WARM_UP:] or seconds
    return {
        "image_tokens": max(tokens),
        "first_token_ms": round(1000 * statistics.median(counted), 2),
        "num_measured": len(counted),
    }
