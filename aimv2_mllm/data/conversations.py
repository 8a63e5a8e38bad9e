"""Conversations about sheets as token batches: what is asked, what is answered, and which tokens
are supervised.

Templates are the tokenizer's own; supervised is what the assistant says, with its end token, and
nothing else.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from aimv2_mllm.data import scenes
from aimv2_mllm.objective import ConversationBatch

IGNORED = -100  # a label that is not scored
IMAGE_TOKEN = "<image>"
BACKWARDS = "Read it backwards."
DESCRIBE = ("Describe the sheet.", "What is on the sheet?", "Say what you see.")

Message = dict[
    str, Any
]  # role: "user" | "assistant"; content: list of {"type": "text" | "image", ...}


def turn(question: str, answer: str, *, image: bool = False) -> list[Message]:
    """One question and its answer as two messages; the question is about a picture when `image`."""
    picture = [{"type": "image"}] if image else []
    return [
        {"role": "user", "content": [*picture, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


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


class Encoded(NamedTuple):
    """One conversation in tokens: `labels` are `ids` where supervised, IGNORED elsewhere; (L,)."""

    ids: np.ndarray
    labels: np.ndarray


def encode(
    tokenizer: Any, conversations: list[list[Message]], *, num_image_tokens: int = 0
) -> list[Encoded]:
    """Each conversation in tokens; supervised are the assistant's.

    Each image mark becomes `num_image_tokens` tokens.
    """
    encoded = tokenizer.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    rows = []
    for row, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        ids = np.array(row)
        repeats = np.where(ids == image_id, num_image_tokens, 1)
        rows.append(
            Encoded(np.repeat(ids, repeats), np.repeat(np.where(mask, ids, IGNORED), repeats))
        )
    return rows


def pad(rows: Sequence[Encoded], pad_token_id: int) -> ConversationBatch:
    """`rows` as one right-padded batch: input_ids, attention_mask and labels, each (B, L) int64."""
    length = max(len(row.ids) for row in rows)
    input_ids = np.full((len(rows), length), pad_token_id)
    labels = np.full((len(rows), length), IGNORED)
    attention_mask = np.zeros((len(rows), length), dtype=np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.ids)] = row.ids
        attention_mask[number, : len(row.ids)] = 1
        labels[number, : len(row.ids)] = row.labels
    return ConversationBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        labels=torch.from_numpy(labels),
    )
