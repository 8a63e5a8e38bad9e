"""Every question put to a model, with its picture and without: answers that survive a kill.

Owns the file of answers, in which a batch is there whole or not at all, what the controls get to
see, and what happens to a question that the model cannot be asked: it counts as answered wrongly,
and more than `MOST_LEFT_OUT` of them end the evaluation. Refuses a folder that holds the answers of
another evaluation.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.questions.asked import MOST_LEFT_OUT, Asked
from aimv2_mllm.disk import replace_file
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.evaluation.controls import SHOWN, other_picture

ANSWERS, IDENTITY, LOCK = "answers.jsonl", "asked.json", ".lock"
SEEN = "seen"
Ask = Callable[[Sequence[tuple[str, Image.Image | None]]], list[str]]


def demand_same(folder: Path, identity: Mapping[str, Any]) -> None:
    """Note in `folder`, made where it is not there, what is asked of whom; UsageError where it
    holds answers to something else."""
    path = folder / IDENTITY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key, value in identity.items() if before.get(key) != value]
            if other:
                raise UsageError(
                    f"{folder}: holds the answers of another evaluation, which differs in "
                    f"{', '.join(other)}; give another --out, or remove it"
                )
            return
        left = f"{IDENTITY}."  # of a process that was killed while it wrote that file
        if any(path.name != LOCK and not path.name.startswith(left) for path in folder.iterdir()):
            raise UsageError(f"{folder}: is not empty, and holds no evaluation; give another --out")
        replace_file(path, f"{json.dumps(identity, indent=2)}\n".encode())
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{folder}: cannot be used ({error})") from None


class Answers:
    """The answers in a folder: pass -> id of the question -> its answer, "" where the model could
    not be asked, or None where the picture cannot be decoded."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ANSWERS
        self.given: dict[str, dict[str, str | None]] = {name: {} for name in (SEEN, *SHOWN)}
        self.unusable: dict[str, str] = {}  # id -> why
        self.refused: dict[str, dict[str, str]] = {name: {} for name in self.given}
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed while it wrote
            os.truncate(self._path, len(whole))
        for line in whole.splitlines():
            self._take(json.loads(line))

    def _take(self, line: Mapping[str, Any]) -> None:
        self.given[line["pass"]][line["id"]] = line["answer"]
        if line["answer"] is None:
            self.unusable[line["id"]] = line["why"]
        elif "why" in line:
            self.refused[line["pass"]][line["id"]] = line["why"]

    def left_out(self) -> list[str]:
        """Which questions are not judged, and why."""
        return [f"question {name}: {why}" for name, why in self.unusable.items()]

    def not_asked(self) -> list[str]:
        """Which questions the model could not be asked, in which pass, and why."""
        return [
            f"question {one}, {name}: {why}"
            for name, found in self.refused.items()
            for one, why in found.items()
        ]

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write a batch down; it is on the disk when this returns."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            with self._path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFailed(
                f"{self._path}: cannot be written ({error.strerror}); the answers so far are kept: "
                "make room and run the same command again"
            ) from None
        for line in lines:
            self._take(line)


def ask_all(
    asked: Asked, prompts: Sequence[str], ask: Ask, answers: Answers, *, controls: bool, batch: int
) -> None:
    """Put every one of `prompts`, one a question, to the model, `batch` at a time, and write the
    answers down; those that are there already are not asked again.

    UsageError where too many pictures cannot be decoded, too many questions cannot be asked, or
    only one picture is left for the controls.
    """
    for name in (SEEN, *(SHOWN if controls else ())):
        _ask_pass(name, asked, prompts, ask, answers, batch)


def _demand_sound(answers: Answers, name: str, count: int) -> None:
    for what, found in (
        ("pictures cannot be decoded", answers.unusable),
        ("questions cannot be asked", answers.refused[name]),
    ):
        if len(found) > MOST_LEFT_OUT * count:
            first, why = next(iter(found.items()))
            raise UsageError(
                f"{len(found):,} of {count:,} {what}, and {MOST_LEFT_OUT:.0%} are the most; the "
                f"first: question {first}: {why}"
            )


def _ask_pass(
    name: str, asked: Asked, prompts: Sequence[str], ask: Ask, answers: Answers, batch: int
) -> None:
    shown = _shown(name, asked, answers)
    ids, done = [question.id for question in asked.questions], answers.given[name]
    for first in tqdm(range(0, len(ids), batch), desc=name, unit="batch", disable=None):
        here = range(first, min(first + batch, len(ids)))
        if all(ids[number] in done for number in here):
            continue
        # The whole batch again, so that it is computed as in one go.
        lines, numbers, pictures = list[dict[str, Any]](), list[int](), list[Image.Image | None]()
        for number in here:
            about = shown[number]
            try:
                if ids[number] in answers.unusable:
                    raise Unusable("undecodable", answers.unusable[ids[number]])
                pictures.append(None if about is None else asked.open(about))
                numbers.append(number)
            except Unusable as error:
                lines.append({"pass": name, "id": ids[number], "answer": None, "why": str(error)})
        batch_of = [(prompts[n], p) for n, p in zip(numbers, pictures, strict=True)]
        lines += [
            {"pass": name, "id": ids[number], **answered}
            for number, answered in zip(numbers, _answered(ask, batch_of), strict=True)
        ]
        answers.add(lines)
        _demand_sound(answers, name, len(ids))


def _answered(ask: Ask, batch: Sequence[tuple[str, Image.Image | None]]) -> list[dict[str, str]]:
    """What a line says of each answer; those of a batch that is refused are asked one by one."""
    try:
        return [{"answer": text} for text in ask(batch)]
    except UsageError as error:
        if len(batch) == 1:
            return [{"answer": "", "why": str(error)}]
    return [answered for one in batch for answered in _answered(ask, [one])]


def _shown(name: str, asked: Asked, answers: Answers) -> list[int | None]:
    """Whose picture each question is asked with: the number of a question, or none."""
    numbers = range(len(asked.questions))
    own = [number if asked.questions[number].picture else None for number in numbers]
    if name == SEEN:
        return own
    if name == "text_only":
        return [None] * len(own)
    questions = asked.questions
    sees = [own[n] is not None and questions[n].id not in answers.unusable for n in numbers]
    firsts: dict[str, int] = {}  # picture -> the first question about it
    for number in numbers:
        if sees[number]:
            firsts.setdefault(questions[number].picture, number)
    if len(firsts) < 2:
        raise UsageError(
            "all questions are about one picture, and the blind control shows another: give "
            "--no-controls"
        )
    places, shown = {picture: place for place, picture in enumerate(firsts)}, list(firsts.values())
    return [
        shown[other_picture(places[questions[n].picture], len(shown))] if sees[n] else None
        for n in numbers
    ]
