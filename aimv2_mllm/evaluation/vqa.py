"""The official accuracy of VQA v2: its way of writing answers, and its leave-one-out mean.

Facts, odd ones too, are those of `vqaEval.py` in GT-Vision-Lab/VQA, whose numbers papers report,
but for one: all answers are normalised, as lmms-eval (0.7.3, its vqav2) does it. The script
leaves those of people as they are where all of them said the same, and since commit a013f00 (2021)
the model's too, so that "Yes" is wrong where ten people said "yes"; before, it was right.
"""

import re
from collections.abc import Sequence

ARTICLES = ("a", "an", "the")
COUNTED = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(COUNTED.split())}
MARKS = ';/[]"{}()=+\\_-><@`,?!'  # the apostrophe and the colon stay
# Words that are mended where one apostrophe of theirs is missing.
CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't "
    "mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't "
    "she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd "
    "there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've "
    "who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll "
    "y'all'd've you'd you'd've you'll you're you've"
)
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the other way round, there
NUMBER_WITH_COMMA = re.compile(r"\d,\d", re.ASCII)
FULL_STOP = re.compile(r"\.(?!\d)", re.ASCII)
MOST_STOPS = 32  # full stops that go, at most: a flag stands there where a count is read
ENOUGH = 3  # people who say the same, for a whole point


def normalised(text: str) -> str:
    """`text` as answers are compared: no marks, no articles, numbers up to ten as digits."""
    found = _without_marks(text).lower().split()
    words = [NUMBERS.get(word, word) for word in found]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_marks(text: str) -> str:
    """A mark that touches a space, or any in a text with a number like 1,000, goes; another becomes
    a space."""
    has_comma, bare = NUMBER_WITH_COMMA.search(text) is not None, text
    for mark in MARKS:
        goes = has_comma or f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if goes else " ")
    return FULL_STOP.sub("", bare, count=MOST_STOPS)


def vqa_accuracy(answers: Sequence[str], given: str) -> float:
    """The score of `given`, 0 to 1, where people gave `answers`, ten of them in the data set.

    For each of them left out: min(n / 3, 1), where n of the others are the one given; the mean of
    it (VQA v2, Goyal et al., 2017).
    """
    said, given = [normalised(_one_line(text)) for text in answers], normalised(_one_line(given))
    same = said.count(given)
    left_out = [min(max(same - int(text == given), 0) / ENOUGH, 1.0) for text in said]
    return sum(left_out) / len(left_out)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
