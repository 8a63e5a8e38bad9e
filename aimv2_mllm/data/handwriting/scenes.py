"""The embedded world: sheets of real handwritten digits in coloured ink, with captions and
questions.

The scans are the UCI "optical recognition of handwritten digits" set as scikit-learn carries it
(1,797 scans of 8 x 8 pixels in 17 grey levels; E. Alpaydin, C. Kaynak, 1998, CC BY 4.0). A scene is
a pure function of (seed, split, index), so nothing is stored and every run sees the same sheets.
Each scan belongs to one split for ever: no held-out sheet shows ink of a training scan.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

Split = Literal["train", "heldout"]

INKS: dict[str, tuple[int, int, int]] = {
    "black": (30, 30, 34),
    "red": (206, 32, 41),
    "green": (20, 140, 60),
    "blue": (36, 80, 200),
    "orange": (240, 130, 20),
    "purple": (130, 50, 170),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")  # in reading order
HELDOUT_SHARE = 0.2
SMALLEST, LARGEST = 0.36, 0.49  # side of a digit's box as a share of the sheet's side
_PAPER_LOW, _PAPER_HIGH = 236, 256  # grey levels between which a sheet's paper colour lies


class Digit(NamedTuple):
    """One digit on a sheet; `left`, `top` and `side` are shares of the sheet's side."""

    value: int
    ink: str
    place: str
    scan: int
    left: float
    top: float
    side: float


@dataclass(frozen=True)
class Scene:
    """A sheet: its paper colour and one to four digits in reading order, no value and no ink
    twice."""

    paper: tuple[int, int, int]
    digits: tuple[Digit, ...]


class SceneQuestion(NamedTuple):
    """A question about a scene, its kind (a key of `QUESTIONS`) and its one right answer."""

    kind: str
    text: str
    answer: str


@lru_cache(maxsize=1)
def scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans, (1797, 8, 8) float32 ink between 0 and 1, and their values, (1797,) int64.

    Source: `sklearn.datasets.load_digits`. Raises ImportError with the install line when
    scikit-learn is absent.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the handwriting world needs scikit-learn: pip install 'aimv2-mllm[train]'"
        ) from error
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


@lru_cache(maxsize=2)
def split_scans(split: Split) -> np.ndarray:
    """Indices of the scans that belong to `split`: a fixed fifth of each value is held out,
    whatever the recipe's seed."""
    _, values = scans()
    order = np.random.default_rng(20_241_121).permutation(len(values))
    heldout = [
        part[: round(len(part) * HELDOUT_SHARE)]
        for part in (order[values[order] == value] for value in range(10))
    ]
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.concatenate(heldout)] = True
    return np.flatnonzero(chosen if split == "heldout" else ~chosen)


@lru_cache(maxsize=2)
def _scans_of_value(split: Split) -> tuple[np.ndarray, ...]:
    indices = split_scans(split)
    return tuple(indices[scans()[1][indices] == value] for value in range(10))


def generator(*key: int | str) -> np.random.Generator:
    """A random generator that is a pure function of `key`."""
    words = [part if isinstance(part, int) else int.from_bytes(part.encode()) for part in key]
    return np.random.Generator(np.random.SFC64(words))


def scene(seed: int, split: Split, index: int) -> Scene:
    """The scene number `index` of a split: one to four digits, no value and no ink twice, each in
    its own quarter."""
    random = generator(seed, split, index)
    count = int(random.integers(1, len(PLACES) + 1))
    values = random.permutation(10)[:count]
    inks = random.permutation(len(INKS))[:count]
    places = np.sort(random.permutation(len(PLACES))[:count])
    sides = random.uniform(SMALLEST, LARGEST, count)
    shifts = random.uniform(0, 1, (count, 2))
    by_value = _scans_of_value(split)
    digits = []
    for value, ink, place, side, shift in zip(values, inks, places, sides, shifts, strict=True):
        column, row = place % 2, place // 2
        left, top = column / 2 + shift[0] * (0.5 - side), row / 2 + shift[1] * (0.5 - side)
        scan = int(random.choice(by_value[value]))
        name = list(INKS)[ink]
        digits.append(
            Digit(int(value), name, PLACES[place], scan, float(left), float(top), float(side))
        )
    paper = random.integers(_PAPER_LOW, _PAPER_HIGH, 3)
    return Scene((int(paper[0]), int(paper[1]), int(paper[2])), tuple(digits))


def single_digit(scan: int, seed: int) -> Scene:
    """A sheet with one scan alone, in an ink and place drawn from (seed, scan): what the kNN probe
    looks at."""
    random = generator(seed, "single", scan)
    value = int(scans()[1][scan])
    ink = list(INKS)[int(random.integers(len(INKS)))]
    place = int(random.integers(len(PLACES)))
    side = float(random.uniform(SMALLEST, LARGEST))
    left, top = (float(v) for v in random.uniform(0, 0.5 - side, 2))
    digit = Digit(value, ink, PLACES[place], scan, place % 2 / 2 + left, place // 2 / 2 + top, side)
    return Scene((250, 250, 250), (digit,))


def render(scene: Scene, height: int, width: int | None = None) -> np.ndarray:
    """The sheet as (height, width, 3) uint8, a square one without `width`: each scan enlarged
    bicubically, by the sheet's shorter side, and laid on the paper as ink."""
    width = width or height
    sheet = np.empty((height, width, 3), dtype=np.float32)
    sheet[:] = scene.paper
    for digit in scene.digits:
        side = min(max(8, round(digit.side * min(height, width))), height, width)
        left = min(round(digit.left * width), width - side)
        top = min(round(digit.top * height), height - side)
        scan = Image.fromarray(scans()[0][digit.scan])
        ink = np.asarray(scan.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
        area = sheet[top : top + side, left : left + side]
        area += ink * (np.array(INKS[digit.ink], dtype=np.float32) - area)
    return (sheet + 0.5).astype(np.uint8)


def caption(scene: Scene) -> str:
    """The sheet in words, in reading order: "a red 7 at the top left and a blue 3 at the bottom
    right"."""
    return in_words([phrase(digit) for digit in scene.digits])


def phrase(digit: Digit) -> str:
    """One digit in words: "an orange 4 at the top right"."""
    article = "an" if digit.ink[0] in "aeiou" else "a"
    return f"{article} {digit.ink} {digit.value} at the {digit.place}"


def in_words(phrases: list[str]) -> str:
    """Phrases joined as in English: "x", "x and y", "x, y and z"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


# Every kind of question with its ways of asking; `question` fills them in.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "digit_of_colour": ("Which digit is {ink}?", "What is the {ink} digit?"),
    "colour_of_digit": ("What colour is the {value}?", "In which colour is the {value} written?"),
    "place_of_digit": ("Where is the {value}?", "In which corner is the {value}?"),
    "digit_at_place": ("Which digit is at the {place}?", "What is written at the {place}?"),
    "count": ("How many digits are there?", "How many digits do you see?"),
    "exists": ("Is there a {ink} {value}?", "Do you see a {ink} {value}?"),
    "largest": ("What is the largest digit?", "Which digit has the highest value?"),
}


# What of a digit is asked for, by what else of it: (key, value) as fields of `Digit`.
LOOK_UPS = (
    ("value", "ink"),
    ("value", "place"),
    ("place", "value"),
    ("ink", "value"),
    ("ink", "place"),
    ("place", "ink"),
)
_WORDS = {"value": "digit", "ink": "colour", "place": "place"}
_KEYS = {"value": "the {}", "ink": "the {} digit", "place": "{}"}


def table(scene: Scene, random: np.random.Generator) -> tuple[str, str]:
    """One look-up for every key there could be: ("Which digit for each colour?", "black none, red
    7, …")."""
    key, value = LOOK_UPS[int(random.integers(len(LOOK_UPS)))]
    keys = {"value": map(str, range(10)), "ink": INKS, "place": PLACES}[key]
    found = {str(getattr(digit, key)): getattr(digit, value) for digit in scene.digits}
    answer = ", ".join(f"{name} {found.get(name, 'none')}" for name in keys)
    return f"Which {_WORDS[value]} for each {_WORDS[key]}?", answer


def several(scene: Scene, random: np.random.Generator) -> tuple[str, str]:
    """One look-up for all digits in any order: ("Which colour: the 7 and the 3?", "7 is red, 3 is
    blue")."""
    key, value = LOOK_UPS[int(random.integers(len(LOOK_UPS)))]
    digits = [scene.digits[i]._asdict() for i in random.permutation(len(scene.digits))]
    asked = in_words([_KEYS[key].format(digit[key]) for digit in digits])
    answer = ", ".join(f"{digit[key]} is {digit[value]}" for digit in digits)
    return f"Which {_WORDS[value]}: {asked}?", answer


def question(scene: Scene, random: np.random.Generator, kind: str | None = None) -> SceneQuestion:
    """A question about `scene` with its answer, drawn with `random`; `kind` is a key of `QUESTIONS`
    or None for any."""
    kind = kind or list(QUESTIONS)[int(random.integers(len(QUESTIONS)))]
    digit = scene.digits[int(random.integers(len(scene.digits)))]
    ink, value = digit.ink, digit.value
    if (
        kind == "exists" and random.random() < 0.5
    ):  # change the ink or the value, so that it is not there
        if random.random() < 0.5:
            ink = str(random.choice([name for name in INKS if name != digit.ink]))
        else:
            value = int(random.choice([other for other in range(10) if other != digit.value]))
    answer = {
        "digit_of_colour": str(digit.value),
        "colour_of_digit": digit.ink,
        "place_of_digit": digit.place,
        "digit_at_place": str(digit.value),
        "count": str(len(scene.digits)),
        "exists": "yes" if any((d.ink, d.value) == (ink, value) for d in scene.digits) else "no",
        "largest": str(max(d.value for d in scene.digits)),
    }[kind]
    wording = QUESTIONS[kind][int(random.integers(len(QUESTIONS[kind])))]
    text = wording.format(ink=ink, value=value, place=digit.place).replace(
        " a orange", " an orange"
    )
    return SceneQuestion(kind, text, answer)
