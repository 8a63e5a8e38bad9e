"""What an answer is worth: metrics by name in `METRICS`, each as its benchmark's own script has it.

Owns what a metric asks of the data, and every score; refuses questions that a metric cannot judge.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aimv2_mllm.data.questions.asked import Question
from aimv2_mllm.evaluation import captions
from aimv2_mllm.evaluation.vqa import ENOUGH, vqa_accuracy

THRESHOLD = 0.5  # ANLS: a similarity below it is nothing
TOLERANCE = 0.05  # relaxed accuracy: a number may be off by this share of the right one
AROUND = " \t.,;:!?\"'`()[]{}"  # what exact match overlooks at both ends of an answer
YES, NO = "yes", "no"
# Not the article A, which stands before other words than these, and not the pronoun I.
LETTER = (
    r"(?!A (?!(?:or|and|but|is|was|as|because|since|would|seems)\b)[a-z])"
    r"(?!I (?!(?:or|and|is|because|since)\b)[a-z])([A-Z])\b"
)
LEADING_LETTER = re.compile(r"\(?([A-Z])(?:[).:,]|$)")  # "(B)", "B." or "B: cat"
# "The answer is (B)" and "Option B", but not "the answer is B or C"
NAMED_LETTER = re.compile(
    rf"(?i:answer|option|choice)(?: is)?:? \(?{LETTER}(?!\)? (?:or|and) \(?[A-Z]\b)"
)
LONE_LETTER = re.compile(rf"\b{LETTER}")
Scores = list[float]


@dataclass(frozen=True)
class Metric:
    """How answers are judged.

    `title` names the mean of the scores; `score` gives those of all answers, from 0 on; `unfit`
    says why a question cannot be judged so, or nothing; `more` are further numbers of the whole, or
    of a type; `is_share` where each score is 0 or 1, `is_literal` where a sentence around the right
    words is wrong.
    """

    title: str
    score: Callable[[Sequence[Question], Sequence[str]], Scores]
    unfit: Callable[[Question], str | None] = lambda question: None
    more: Callable[[Sequence[Question], Sequence[str]], dict[str, float]] = lambda q, a: {}
    is_share: bool = False
    is_literal: bool = False
    is_of_captions: bool = False

    @property
    def unit(self) -> str:
        """In what the hundredfold of a score is."""
        return "of 1,000" if self.is_of_captions else "%"


def exact(question: Question, given: str) -> float:
    """1 where `given` is one of the answers, but for case, width, space, and marks around it."""
    return float(bare(given) in {bare(answer) for answer in question.answers})


def bare(text: str) -> str:
    """`text` as exact match compares it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(AROUND)


def vqa(question: Question, given: str) -> float:
    """The official accuracy of VQA v2, see `vqa`."""
    return vqa_accuracy(question.answers, given)


def _unfit_for_vqa(question: Question) -> str | None:
    if len(question.answers) > ENOUGH:
        return None
    return (
        f"has {len(question.answers)} answers, and VQA accuracy compares those of ten people, "
        f"{ENOUGH + 1} at least: take exact"
    )


def anls(question: Question, given: str) -> float:
    """The similarity to the nearest answer, 1 less edits per letter of the longer of both; 0 where
    that is below `THRESHOLD`.

    Case is nothing, and space no matter how wide (ST-VQA, Biten et al., 2019, equation 1, with the
    threshold's own value kept, as the Robust Reading Competition says it).
    """
    return max(_similarity(_spaced(answer), _spaced(given)) for answer in question.answers)


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    similarity = 1 - distance(one, other) / longest if longest else 1.0
    return similarity if similarity >= THRESHOLD else 0.0


def distance(one: str, other: str) -> int:
    """How many letters must be put in, taken out or changed (Levenshtein)."""
    row = list(range(len(other) + 1))  # from nothing of `one` to each beginning of `other`
    for number, letter in enumerate(one, start=1):
        last, row[0] = row[0], number
        for place, another in enumerate(other, start=1):
            change = last + (letter != another)
            last = row[place]
            row[place] = min(change, last + 1, row[place - 1] + 1)
    return row[-1]


def relaxed(question: Question, given: str) -> float:
    """1 where `given` is a number within `TOLERANCE` of an answer, or that answer in any case
    (ChartQA, Masry et al., 2022, section 5.1; numbers are read as pix2struct's metrics do)."""
    return float(any(_is_near(answer.strip(), given.strip()) for answer in question.answers))


def _is_near(answer: str, given: str) -> bool:
    right, told = _number(answer), _number(given)
    if right and told is not None:  # relative to zero nothing is near
        return abs(told - right) / abs(right) <= TOLERANCE
    return given.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def choice(question: Question, given: str) -> float:
    """1 where the choice that `given` makes is the right one, see `chosen`."""
    made = chosen(question, given)
    return float(made is not None and made == _right_choice(question))


def chosen(question: Question, given: str) -> int | None:
    """Which choice, from 0, an answer makes; None where it makes none, or several.

    Told by the first of these that holds: it begins with a letter that ends or has a mark behind
    it; it says "answer", "option" or "choice" and a letter; it is a choice's own words; it has the
    words of one choice in it, and of no other; it has one capital letter of a choice by itself.
    """
    given, count = given.strip(), len(question.choices) or 26
    for found in (LEADING_LETTER.match(given), NAMED_LETTER.search(given)):
        if found is not None and ord(found[1]) - ord("A") < count:
            return ord(found[1]) - ord("A")
    words = [bare(text) for text in question.choices]
    if bare(given) in words:
        return words.index(bare(given))
    inside = [n for n, text in enumerate(words) if f" {text} " in f" {_words(given)} "]
    if len(inside) == 1:
        return inside[0]
    letters = {ord(letter) - ord("A") for letter in LONE_LETTER.findall(given)}
    fitting = [letter for letter in letters if letter < count]
    return fitting[0] if len(fitting) == 1 and not inside else None


def _words(text: str) -> str:
    return " ".join(filter(None, (bare(word) for word in text.split())))


def _right_choice(question: Question) -> int | None:
    [answer] = question.answers
    if re.fullmatch("[A-Z]", answer) and answer not in question.choices:
        return ord(answer) - ord("A")
    return question.choices.index(answer) if answer in question.choices else None


def _unfit_for_choice(question: Question) -> str | None:
    if len(question.answers) != 1:
        return f"has {len(question.answers)} answers, and one choice is right: take exact"
    right = _right_choice(question)
    if right is None or (question.choices and right >= len(question.choices)):
        known = ", ".join(question.choices) or "A, B, C …"
        hint = "; where it is the number of one, from 0, say --column answer_index=NAME"
        said = f"has the answer {question.answers[0]}, which is none of its choices ({known})"
        return said + (hint if question.answers[0].isdecimal() else "")
    return None


def yes_or_no(given: str) -> str:
    """What an answer comes to, as POPE's script reads it: no where its first sentence has the word
    No, no or not, and else yes."""
    words = given.partition(".")[0].replace(",", "").split(" ")
    return NO if {"No", "no", "not"} & set(words) else YES


def yesno(question: Question, given: str) -> float:
    """1 where yes or no is right (POPE, Li et al., 2023)."""
    return float(yes_or_no(given) == bare(question.answers[0]))


def _unfit_for_yesno(question: Question) -> str | None:
    wrong = [answer for answer in question.answers if bare(answer) not in (YES, NO)]
    if len(question.answers) == 1 and not wrong:
        return None
    said = ", ".join(question.answers)
    return f"has the answer {said}, and yesno is for answers that are yes or no: take exact"


def yesno_more(questions: Sequence[Question], given: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F1 of saying yes, and the share of answers that say it; 0 where there
    is nothing to divide by."""
    said = [yes_or_no(text) == YES for text in given]
    right = [bare(question.answers[0]) == YES for question in questions]
    both = sum(a and b for a, b in zip(said, right, strict=True))
    precision, recall = both / max(sum(said), 1), both / max(sum(right), 1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes_share": sum(said) / len(said),
    }


def _each(score: Callable[[Question, str], float]) -> Callable[..., Scores]:
    def scores(questions: Sequence[Question], given: Sequence[str]) -> Scores:
        return [score(*pair) for pair in zip(questions, given, strict=True)]

    return scores


METRICS: dict[str, Metric] = {
    "exact": Metric("exact match", _each(exact), is_share=True, is_literal=True),
    "vqa": Metric("VQA accuracy", _each(vqa), _unfit_for_vqa, is_literal=True),
    "choice": Metric("right choices", _each(choice), _unfit_for_choice, is_share=True),
    "yesno": Metric(
        "right of yes and no", _each(yesno), _unfit_for_yesno, yesno_more, is_share=True
    ),
    "anls": Metric("ANLS", _each(anls), is_literal=True),
    "relaxed": Metric("relaxed accuracy", _each(relaxed), is_share=True, is_literal=True),
    "caption": Metric("CIDEr-D", captions.cider, more=captions.more, is_of_captions=True),
}
