"""How near captions come to those of people: CIDEr-D, BLEU-4 and ROUGE-L, by pycocoevalcap.

It is the code whose numbers papers report, of which only the parts in plain Python are used. Owns
how a caption is cut into words: its own way needs Java.
"""

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from aimv2_mllm.data.questions.asked import Question
from aimv2_mllm.errors import UsageError

INSTALL = "pip install 'aimv2-mllm[evaluate]'"
# Numbers and abbreviations with their points, 's and n't apart, words with what joins them.
WORD = re.compile(
    r"\d+(?:[.,:]\d+)*|(?:[^\W\d_]\.){2,}|can(?=not\b)|\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b"
    r"|\w+(?:[-/@]\w+)*|[&$%#()]"
)
BRACKETS = {"(": "-lrb-", ")": "-rrb-"}  # the Treebank's names, which that tokenizer leaves in


def words(text: str) -> str:
    """The words of a caption in small letters, with spaces between them and without marks.

    They are those of the Penn Treebank as the COCO captions' own tokenizer writes them, but for
    rare ones.
    """
    found = WORD.findall(text.lower().replace("’", "'"))
    return " ".join(BRACKETS.get(word, word) for word in found)


def cider(questions: Sequence[Question], given: Sequence[str]) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al., 2015), where 1 is what papers call 100.

    It weighs words by how few pictures' captions have them, so that the captions of one picture
    alone are worth nothing.
    """
    _, scores = _judged(lambda: _scorer("cider", "Cider")(), questions, given)
    return [float(score) for score in scores]


def more(questions: Sequence[Question], given: Sequence[str]) -> dict[str, float]:
    """BLEU-4 of the whole and the mean ROUGE-L."""
    bleu, _ = _judged(lambda: _scorer("bleu", "Bleu")(4), questions, given)
    rouge, _ = _judged(lambda: _scorer("rouge", "Rouge")(), questions, given)
    return {"bleu_4": float(bleu[3]), "rouge_l": float(rouge)}


def _scorer(module: str, name: str) -> Any:
    from importlib import import_module

    try:
        return getattr(import_module(f"pycocoevalcap.{module}.{module}"), name)
    except ImportError as error:
        raise UsageError(f"captions are judged by pycocoevalcap ({error}): {INSTALL}") from None


def _judged(
    build: Callable[[], Any], questions: Sequence[Question], given: Sequence[str]
) -> tuple[Any, Any]:
    people = {n: [words(text) for text in one.answers] for n, one in enumerate(questions)}
    model = {n: [words(text)] for n, text in enumerate(given)}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its counts
        whole, each = build().compute_score(people, model)
    return whole, each
