"""Conversations as messages, and those about sheets: what is asked and what is answered.

Owns the one form that every source of conversations comes to. Refuses, row by row, what is no
conversation that can be learned from.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.marks import IMAGE_TOKEN

BACKWARDS = "Read it backwards."
DESCRIBE = ("Describe the sheet.", "What is on the sheet?", "Say what you see.")

# role: "system" | "user" | "assistant"
# content: list of {"type": "text", "text": …} | {"type": "image"}
Message = dict[str, Any]


def said(role: str, text: str, *, pictures: int = 0) -> Message:
    """What `role` says, behind so many pictures."""
    return {
        "role": role,
        "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}],
    }


def turn(question: str, answer: str, *, image: bool = False) -> list[Message]:
    """One question and its answer as two messages; the question is about a picture when `image`."""
    return [said("user", question, pictures=int(image)), said("assistant", answer)]


def messages_of(spoken: Sequence[tuple[str, str]], num_pictures: int) -> list[Message]:
    """The messages of a conversation given as (role, text), `<image>` marking each picture.

    Without such marks all pictures stand before the first question. `Unusable` unless, after an
    optional system message, user and assistant speak in turn, no answer is empty, and there are as
    many marks as pictures.
    """
    roles = [role for role, _ in spoken]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if talk[:1] == ["assistant"]:
        raise Unusable("assistant_first", "it begins with the assistant")
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        shown = ", ".join(roles[:6]) + (" ..." if len(roles) > 6 else "")
        raise Unusable("roles", f"user and assistant do not speak in turn: {shown or 'nobody'}")
    if not all(text.strip() for role, text in spoken if role == "assistant"):
        raise Unusable("empty_answer", "an answer is empty")
    if any(IMAGE_TOKEN in text for role, text in spoken if role != "user"):
        raise Unusable("marks", f"{IMAGE_TOKEN} stands where the user does not speak")
    marks = sum(text.count(IMAGE_TOKEN) for _, text in spoken)
    if marks not in (0, num_pictures):
        raise Unusable("marks", f"it has {marks} marks {IMAGE_TOKEN} and {num_pictures} pictures")
    first = roles.index("user")
    return [
        {"role": role, "content": _parts(text, 0 if marks or number != first else num_pictures)}
        for number, (role, text) in enumerate(spoken)
    ]


def _parts(text: str, pictures_before: int) -> list[dict[str, str]]:
    parts = [{"type": "image"}] * pictures_before
    for number, piece in enumerate(text.split(IMAGE_TOKEN)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def num_pictures(messages: Sequence[Message]) -> int:
    """How many pictures a conversation is about."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def conversation(
    scene: scenes.Scene,
    random: np.random.Generator,
    *,
    tasks: dict[str, float],
    turns: int,
    seen: bool,
) -> list[Message]:
    """A conversation of `turns` questions about `scene`, of kinds drawn by the weights in `tasks`.

    `seen`: the sheet comes as a picture; otherwise the first question opens with the sheet
    described in words, its digits in any order. Besides "question", the tasks are how a language
    model without eyes learns to look things up: "describe" wants the reading order, "backwards"
    each word before the next, "table" and "several" many look-ups at once.
    """
    phrases = [scenes.phrase(digit) for digit in scene.digits]
    order = range(len(phrases)) if seen else random.permutation(len(phrases))
    told = scenes.in_words([phrases[i] for i in order])
    kinds = random.choice(
        list(tasks), size=turns, p=np.array(list(tasks.values())) / sum(tasks.values())
    )
    messages: list[Message] = []
    for kind in kinds:
        if kind == "describe":
            asked, answer = str(random.choice(DESCRIBE)), scenes.in_words(phrases)
        elif kind == "backwards":
            asked, answer = BACKWARDS, " ".join(told.replace(",", " ,").split()[::-1])
        elif kind == "table":
            asked, answer = scenes.table(scene, random)
        elif kind == "several":
            asked, answer = scenes.several(scene, random)
        else:
            _, asked, answer = scenes.question(scene, random)
        if not messages and not seen:
            asked = f"On the sheet: {told}. {asked}"
        messages += turn(asked, answer, image=seen and not messages)
    return messages
