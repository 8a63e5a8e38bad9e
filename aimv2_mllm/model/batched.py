"""Answers to many prompts at once, those that each would get alone.

Refuses nothing. Letters in shapes: B prompts, L tokens of the longest, M tokens of a picture, E the
LLM's width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aimv2_mllm.model.decoding import Chooser, Decoding, embedded, ends_of, fresh_cache
from aimv2_mllm.model.sampling import GREEDY, Sampling
from aimv2_mllm.model.speech import Speech


class Row(NamedTuple):
    """A prompt: its tokens, its pictures (M, E) as the LLM takes them, and how many tokens the
    answer may have."""

    ids: Sequence[int] | np.ndarray
    pictures: Sequence[Tensor]
    room: int


def answer_rows(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, sampling: Sampling = GREEDY
) -> list[str]:
    """The answers to `rows`, run together, without blanks around them.

    Rows whose answers have ended leave the batch as soon as they are half of it.
    """
    # What stands in the padding is looked at nowhere, but must not ask for a picture.
    filler = 1 if getattr(model.config, "image_token_id", None) == 0 else 0
    ids, mask = (part.to(model.device) for part in _padded(rows, filler))  # (B, L) each
    pictures = [picture for row in rows for picture in row.pictures]
    ask = Decoding(model, fresh_cache(model), mask if len(rows) > 1 else None)
    choose = [] if sampling.is_plain else [Chooser(sampling, model.device) for _ in rows]
    said = [Speech(tokenizer, sampling.stop) for _ in rows]
    texts, ends = [""] * len(rows), ends_of(model)
    batch, open_rows = list(range(len(rows))), set(range(len(rows)))
    scores = ask(embedded(model, ids, pictures))  # (B, V)
    while True:
        chosen = scores.argmax(-1).tolist()
        for place, number in enumerate(batch):
            row, speech = rows[number], said[number]
            if number not in open_rows:
                continue
            if choose:
                before = [*row.ids, *speech.tokens]
                chosen[place] = choose[number](before, scores[place])
            if chosen[place] not in ends:
                texts[number] += speech.push(chosen[place])
            if chosen[place] in ends or speech.ended or len(speech.tokens) == row.room:
                texts[number] += speech.rest()
                open_rows.discard(number)
        if not open_rows:
            return [text.strip() for text in texts]
        if 2 * len(open_rows) <= len(batch):
            places = [place for place, number in enumerate(batch) if number in open_rows]
            batch, chosen = [batch[place] for place in places], [chosen[place] for place in places]
            ask.keep(places)
        scores = ask(embedded(model, torch.tensor(chosen, device=model.device)[:, None], []))


def _padded(rows: Sequence[Row], filler: int) -> tuple[Tensor, Tensor]:
    """The tokens of all rows and where they are, (B, L) each, so that all answers begin at one
    column."""
    length = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), length), filler)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, length - len(row.ids) :] = row.ids
        mask[number, length - len(row.ids) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
