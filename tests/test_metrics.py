"""Metrics: those of the benchmarks' own scripts, on published, random and odd examples."""

import hashlib
import json
import random
import re
from fractions import Fraction
from itertools import pairwise

import pytest

from aimv2_mllm.data.questions.asked import Question
from aimv2_mllm.evaluation import metrics, vqa
from aimv2_mllm.evaluation.controls import majority_answers, other_picture
from aimv2_mllm.evaluation.intervals import bootstrap_interval, interval, wilson_interval
from aimv2_mllm.evaluation.metrics import METRICS


def question(*answers: str, choices: tuple[str, ...] = ()) -> Question:
    return Question("1", "?", answers, choices=choices)


def score(name: str, given: str, *answers: str, choices: tuple[str, ...] = ()) -> float:
    [found] = METRICS[name].score([question(*answers, choices=choices)], [given])
    return found


@pytest.mark.parametrize(
    ("given", "answers", "expected"),
    [
        ("red", ["red"], 1),
        (" Red.\n", ["red"], 1),
        ("“red”", ["red"], 0),  # only marks of ASCII are overlooked
        ("the red one", ["red"], 0),
        ("blue", ["red", "Blue"], 1),
        ("STRASSE", ["straße"], 1),
        ("cafe\u0301", ["café"], 1),
        ("５", ["5"], 1),
        ("two  words", ["two words"], 1),
        ("", ["red"], 0),
        ("1,000", ["1000"], 0),
        ("-3", ["3"], 0),
    ],
)
def test_exact_match(given: str, answers: list[str], expected: float) -> None:
    assert score("exact", given, *answers) == expected


def test_the_mended_contractions_are_the_official_ones() -> None:
    # The 114 of vqaEval.py; its keys with capital letters are never met, as words are small there.
    content = json.dumps(sorted(vqa.CONTRACTIONS.items())).encode()
    assert hashlib.sha256(content).hexdigest() == (
        "853d25c89947b7f6d41f6c5f81b2d6c3119927f4b16f557fc1b03af6ef45605e"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("a an the", ""),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("2.5", "2.5"),
        ("tv.", "tv"),
        ("." * 40, "." * 8),  # 32 go, for a flag stands where a count is read
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("it's 5:30", "it's 5:30"),
        ("well-known", "well known"),
        ("yes!", "yes"),
        ("(left) side", "left side"),
        ("Im", "im"),
        ("no\u00a0one", "no 1"),
        ("٣,٣", "٣ ٣"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_the_official_script_does(text: str, expected: str) -> None:
    # Each of the right side is what vqaEval.py makes of the left one.
    assert vqa.normalised(text) == expected


TEN = ["yes"] * 7 + ["no"] * 2 + ["Maybe."]


@pytest.mark.parametrize(
    ("given", "answers", "expected"),
    [
        ("yes", TEN, 1.0),
        ("no", TEN, 0.6),  # two say no: 8 times 2/3 and 2 times 1/3
        ("maybe", TEN, 0.3),
        ("perhaps", TEN, 0.0),
        ("", TEN, 0.0),
        ("The Yes!", TEN, 1.0),
        ("Yes.", ["yes"] * 10, 1.0),  # where all say the same, too
        ("a yes", ["Yes"] * 10, 1.0),
        ("2", ["two"] * 3 + ["3"] * 7, 0.9),
        ("yes", ["yes"] * 4 + ["no"] * 6, 1.0),
    ],
)
def test_vqa_accuracy_of_ten_people(given: str, answers: list[str], expected: float) -> None:
    assert score("vqa", given, *answers) == pytest.approx(expected)


WORDS = ["the", "two", "Cat", "cat", "don't", "dont", "couldnt've", "1,000", "2.5", "no", "ten"]
WORDS += ["é", "None", "a", "An", "it's", "5:30", "none", "couldntve"]
BETWEEN = [" ", " ", "  ", "", ".", ". ", ", ", ",", "-", " -", "/", "?", "!", "\t", "\n", '"']
MEANT = {"two": "2", "ten": "10", "none": "0", "dont": "don't", "couldnt've": "couldn't've"}


def drawn(chance: random.Random, words: list[str], between: list[str], most: int) -> str:
    return "".join(
        chance.choice(words) + chance.choice(between) for _ in range(chance.randint(0, most))
    )


def normalised_letter_by_letter(text: str) -> str:
    """VQA's way of writing answers, as its page and its script define it, for these words."""
    digits, bare, words, num_stops = "0123456789", "", list[str](), 0
    has_thousands = any(
        one in digits and comma == "," and other in digits
        for one, comma, other in zip(text, text[1:], text[2:], strict=False)
    )
    for letter in text:
        if letter not in ';/[]"{}()=+\\_-><@`,?!':
            bare += letter
        elif not has_thousands and all({*pair} != {letter, " "} for pair in pairwise(text)):
            bare += " "
    word = ""
    for letter, after in pairwise(f"{bare}  "):
        if letter == "." and after not in digits and num_stops < 32:
            num_stops += 1
        elif not letter.isspace():
            word += letter.lower()
        elif word:
            words.append(MEANT.get(word, word))
            word = ""
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def test_answers_are_normalised_as_letter_by_letter() -> None:
    chance = random.Random(6)
    changed = 0
    for _ in range(3000):
        text = drawn(chance, WORDS, BETWEEN, 5) + "." * (40 * (chance.random() < 0.01))
        assert vqa.normalised(text) == normalised_letter_by_letter(text), text
        changed += vqa.normalised(text) != text
    assert changed > 1000


def left_out_one_by_one(answers: list[str], given: str) -> float:
    """The definition, word for word: ten subsets of nine people."""
    *people, model = (
        normalised_letter_by_letter(text.translate({9: " ", 10: " "}).strip())
        for text in (*answers, given)
    )
    total = 0.0
    for left_out in range(len(people)):
        others = [text for n, text in enumerate(people) if n != left_out]
        total += min(sum(text == model for text in others) / 3, 1)
    return total / len(people)


def test_vqa_accuracy_is_the_mean_over_subsets_of_nine() -> None:
    chance = random.Random(0)
    values = set()
    for _ in range(500):
        pool = [drawn(chance, WORDS, BETWEEN, 2) for _ in range(3)]
        pool += [pool[0].upper(), f"{pool[0]}.", f"the {pool[1]}"]
        answers = [chance.choice(pool[: chance.randint(1, 6)]) for _ in range(10)]
        given = chance.choice(pool)
        values.add(found := vqa.vqa_accuracy(answers, given))
        assert found == pytest.approx(left_out_one_by_one(answers, given))
    assert len(values) > 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [("The Coca", 0.0), ("CocaCola", 0.89), ("Coca cola", 1.0), ("Cola", 0.0), ("Cat", 0.0)],
)
def test_anls_of_the_published_example(given: str, expected: float) -> None:
    # The example of the Robust Reading Competition's task page.
    found = score("anls", given, "Coca Cola", "Coca Cola Company")
    assert found == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("given", "answers", "expected"),
    [
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        ("ab", ["ax"], 0.5),  # the threshold itself counts
        ("abc", ["axy"], 0.0),
        ("A  b", ["a b"], 1.0),
        ("ab", ["a b"], 2 / 3),
        ("naïve", ["naive"], 0.8),
        ("12/15/89", ["12/15/88"], 7 / 8),
    ],
)
def test_anls_at_its_edges(given: str, answers: list[str], expected: float) -> None:
    assert score("anls", given, *answers) == pytest.approx(expected)


def slow_distance(one: str, other: str) -> int:
    """Levenshtein's distance by its recursive definition."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return slow_distance(one[1:], other[1:])
    ways = ((one[1:], other), (one, other[1:]), (one[1:], other[1:]))
    return 1 + min(slow_distance(*way) for way in ways)


def test_edits_are_counted_as_by_their_definition() -> None:
    chance = random.Random(1)
    for _ in range(200):
        one, other = ("".join(chance.choices("abé", k=chance.randint(0, 5))) for _ in range(2))
        assert metrics.distance(one, other) == slow_distance(one, other)


@pytest.mark.parametrize(
    ("given", "answers", "expected"),
    [
        ("105", ["100"], 1),
        ("105.1", ["100"], 0),
        ("95", ["100"], 1),
        ("-95", ["-100"], 1),
        ("95", ["-100"], 0),
        ("5%", ["0.05"], 1),
        ("5", ["5%"], 0),
        ("0", ["0"], 1),
        ("0.0", ["0"], 0),  # relative to zero: only the same text
        ("Yes", ["yes"], 1),
        ("1,000", ["1000"], 0),  # not read as a number, as in pix2struct
        ("", ["100"], 0),
        ("nan", ["100"], 0),
        ("2e2", ["200"], 1),
        ("7", ["100", "7.2"], 1),
    ],
)
def test_relaxed_accuracy(given: str, answers: list[str], expected: float) -> None:
    assert score("relaxed", given, *answers) == expected


NUMBER = re.compile(r"([+-]?)(\d*)(?:\.(\d*))?(%?)")


def exact_number(text: str) -> Fraction | None:
    """A decimal number, without rounding; with a % behind it the hundredth."""
    found = NUMBER.fullmatch(text)
    if found is None or not (found[2] or found[3]):
        return None
    behind = found[3] or ""
    value = Fraction(int((found[2] or "0") + behind), 10 ** len(behind))
    return value * (-1 if found[1] == "-" else 1) / (100 if found[4] else 1)


def relaxed_by_fractions(answer: str, given: str) -> bool | None:
    """ChartQA's definition: within 5 % of a number, else the same text; None where it is too near
    to that limit for floating point."""
    right, told = exact_number(answer), exact_number(given)
    if right is None or told is None or right == 0:
        return answer.lower() == given.lower()
    off = abs(told / right - 1)
    return None if abs(off - Fraction(1, 20)) < Fraction(1, 10**9) else off <= Fraction(1, 20)


def test_relaxed_accuracy_is_that_of_fractions() -> None:
    chance = random.Random(7)
    found = {True: 0, False: 0, None: 0}
    for _ in range(4000):
        value = chance.choice(
            [chance.randint(-30, 30), chance.uniform(-2, 2), chance.gauss(0, 1e4)]
        )
        near = value * chance.choice([1, 1.02, 0.98, 1.049, 1.051, 0.951, 0.949, -1, 1.5])
        texts = [
            chance.choice([f"{n:.0f}", f"{n:.2f}", f"{n:+.3f}", f"{n:.1f}%", f"{n:,.0f}", f"{n} m"])
            for n in (value, near)
        ]
        answer, given = (chance.choice([text, text, text, "Red", "red", "0"]) for text in texts)
        expected = relaxed_by_fractions(answer, given)
        found[expected] += 1
        if expected is not None:
            assert score("relaxed", f" {given}\n", answer) == expected, (answer, given)
    assert min(found[True], found[False]) > 500


ANIMALS = ("a red cat", "dog", "big dog")


@pytest.mark.parametrize(
    ("given", "choices", "expected"),
    [
        ("B", ANIMALS, 1),
        ("(B)", ANIMALS, 1),
        ("B. dog", ANIMALS, 1),
        ("C) or B", ANIMALS, 2),
        ("The answer is B", ANIMALS, 1),
        ("the answer is: (B)", ANIMALS, 1),
        ("The answer is A dog", ANIMALS, 1),
        ("B is right", ANIMALS, 1),
        ("option A", ANIMALS, 0),
        ("Dog.", ANIMALS, 1),
        ("It is a red cat.", ANIMALS, 0),
        ("A cat", ANIMALS, None),  # an article, and no choice's words
        ("I think B", ANIMALS, 1),
        ("A or B", ANIMALS, None),
        ("The answer is A or (C)", ANIMALS, None),
        ("Answer: (A)\nB is no animal", ANIMALS, 0),
        ("A as it barks", ANIMALS, 0),
        ("A was seen there", ANIMALS, 0),
        ("I was there", (), None),  # the pronoun
        ("big dog", ANIMALS, 2),
        ("the big dog", ANIMALS, None),  # the words of two choices
        ("D", ANIMALS, None),
        ("D", (), 3),
        ("b", ANIMALS, None),  # small letters are words
        ("", ANIMALS, None),
        ("是 B", ANIMALS, 1),
    ],
)
def test_a_choice_is_told(given: str, choices: tuple[str, ...], expected: int | None) -> None:
    assert metrics.chosen(question("A", choices=choices), given) == expected


@pytest.mark.parametrize("letter", "ABCDHIZ")
@pytest.mark.parametrize(
    "said",
    [
        "{}",
        "({})",
        "{}.",
        "{}: it has four legs",
        "**{}**",
        "{} is correct.",
        "{} because it has four legs",
        "{} since it has four legs",
        "I think {}",
        "I choose {}, the one with legs.",
        "Option {}",
        "Answer: {}",
        "Answer: {} because it has four legs.",
        "Answer: {}\nIt is what has legs.",
        "The answer is {}",
        "The answer is {} because it has four legs.",
        "The correct answer is option {}.",
        "The answer is ({}) since it has four legs.",
        "{} is the right choice",
    ],
)
def test_no_letter_is_told_less_often_than_another(letter: str, said: str) -> None:
    assert metrics.chosen(question("A"), said.format(letter)) == ord(letter) - ord("A")


def test_the_right_choice_is_a_letter_or_its_words() -> None:
    assert score("choice", "B", "dog", choices=ANIMALS) == 1
    assert score("choice", "dog", "B", choices=ANIMALS) == 1
    assert score("choice", "A", "B", choices=ANIMALS) == 0
    assert score("choice", "no idea", "B", choices=ANIMALS) == 0
    assert score("choice", "A", "A", choices=("B", "A")) == 0  # a choice that is called A


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Yes", "yes"),
        ("No, there is none.", "no"),
        ("There is not", "no"),
        ("Sure. No.", "yes"),  # the first sentence counts
        ("NO", "yes"),  # these two as the script has it
        ("", "yes"),
        ("nothing", "yes"),
        ("no\n", "yes"),
    ],
)
def test_yes_and_no_are_read_as_popes_script_does(given: str, expected: str) -> None:
    assert metrics.yes_or_no(given) == expected


def said_word_by_word(given: str) -> str:
    """POPE's definition: no where a word of the first sentence, without its commas, denies."""
    word, said = "", "yes"
    for letter in [*given, "."]:
        if letter in " .":
            said = "no" if word in ("No", "no", "not") else said
            word = ""
        elif letter != ",":
            word += letter
        if letter == ".":
            return said
    raise AssertionError("there is an end")


def test_yes_and_no_are_read_as_word_by_word() -> None:
    chance = random.Random(8)
    words = ["No", "no", "not", "NO", "nothing", "there", "Yes", "is", "isn't", "n", "o"]
    counts = {"yes": 0, "no": 0}
    for _ in range(3000):
        given = drawn(chance, words, [" ", " ", ", ", ",", ". ", "", "\n"], 5)
        assert metrics.yes_or_no(given) == said_word_by_word(given), given
        counts[said_word_by_word(given)] += 1
    assert min(counts.values()) > 500


def test_precision_recall_and_f1_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    chance = random.Random(2)
    for share in (0.2, 0.5, 1.0):
        right = [chance.choice(["yes", "no"]) for _ in range(60)]
        given = ["yes" if chance.random() < share else "no" for _ in right]
        asked = [question(answer) for answer in right]
        told = METRICS["yesno"].more(asked, given)
        scores = METRICS["yesno"].score(asked, given)
        expected = precision_recall_fscore_support(right, given, pos_label="yes", average="binary")
        assert [told["precision"], told["recall"], told["f1"]] == pytest.approx(expected[:3])
        assert sum(scores) / 60 == pytest.approx(accuracy_score(right, given))
        assert told["yes_share"] == given.count("yes") / 60
    nobody = METRICS["yesno"].more([question("yes")], ["no"])
    assert nobody == {"precision": 0, "recall": 0, "f1": 0, "yes_share": 0}


@pytest.mark.parametrize(
    ("name", "one", "why"),
    [
        ("vqa", question("red"), "has 1 answers, and VQA accuracy compares those of ten people"),
        ("yesno", question("red"), "has the answer red, and yesno is for answers that are yes or"),
        ("yesno", question("yes", "no"), "has the answer yes, no"),
        ("choice", question("a", "b"), "has 2 answers, and one choice is right"),
        ("choice", question("cow", choices=ANIMALS), "none of its choices (a red cat, dog"),
        ("choice", question("D", choices=ANIMALS), "has the answer D, which is none"),
        ("choice", question("2", choices=ANIMALS), "from 0, say --column answer_index=NAME"),
        ("choice", question("cow"), "which is none of its choices (A, B, C …)"),
    ],
)
def test_what_a_metric_cannot_judge_is_said(name: str, one: Question, why: str) -> None:
    assert why in (METRICS[name].unfit(one) or "")


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("exact", question("red")),
        ("vqa", question(*TEN)),
        ("yesno", question("Yes")),
        ("choice", question("B", choices=ANIMALS)),
        ("choice", question("C")),
        ("anls", question("")),
        ("relaxed", question("5 %")),
        ("caption", question("a cat", "the cat")),
    ],
)
def test_what_fits_is_judged(name: str, one: Question) -> None:
    assert METRICS[name].unfit(one) is None


@pytest.mark.parametrize("num_pictures", [2, 3, 200])
def test_the_blind_control_never_sees_the_same_picture(num_pictures: int) -> None:
    others = [other_picture(number, num_pictures) for number in range(num_pictures)]
    assert all(other != number for number, other in enumerate(others))
    assert sorted(others) == list(range(num_pictures))


def test_the_majority_answer_is_that_of_its_kind() -> None:
    kinds = ["count", "count", "count", "exists"]
    right = [["2"], ["2", "two"], ["3"], ["no"]]
    assert majority_answers(kinds, right) == ["2", "2", "2", "no"]


def test_the_interval_of_a_share_is_wilsons() -> None:
    # 8 of 10, worked out by hand from the formula: (0.9921 ± 0.4527·…)/1.3841.
    assert wilson_interval(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert interval([1.0] * 8 + [0.0] * 2) == wilson_interval(8, 10)


def test_a_share_is_told_from_scores_that_happen_to_be_whole() -> None:
    assert interval([0.0] * 10) == wilson_interval(0, 10)
    assert interval([0.0] * 10, are_shares=False) == (0.0, 0.3)
    assert interval([1.0] * 10, are_shares=False) == (0.7, 1.3)


def normal_interval(scores: list[float], groups: list[int]) -> tuple[float, float]:
    """By the variance of a mean over clusters (Cochran, 1977, section 2.11, as a ratio)."""
    from scipy.stats import norm

    mean = sum(scores) / len(scores)
    off = dict.fromkeys(groups, 0.0)
    for score, group in zip(scores, groups, strict=True):
        off[group] += score - mean
    count = len(off)
    variance = count / (count - 1) * sum(one**2 for one in off.values()) / len(scores) ** 2
    low, high = norm.interval(0.95, mean, variance**0.5)
    return float(low), float(high)


def test_the_interval_of_other_means_is_near_the_normal_one() -> None:
    chance = random.Random(3)
    scores = [chance.choice([0.0, 0.3, 0.6, 0.9, 1.0]) for _ in range(400)]
    assert interval(scores) == bootstrap_interval(scores)
    assert bootstrap_interval(scores, groups=range(400)) == bootstrap_interval(scores)
    expected = normal_interval(scores, list(range(400)))
    assert bootstrap_interval(scores) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("sizes", [(7,), (1, 2, 9)])
def test_questions_about_one_picture_are_drawn_together(sizes: tuple[int, ...]) -> None:
    chance = random.Random(4)
    scores, groups = list[float](), list[int]()
    for group in range(150):
        ease = chance.random()
        for _ in range(chance.choice(sizes)):
            scores.append(float(chance.random() < ease))
            groups.append(group)
    together, apart = interval(scores, groups=groups), interval(scores)
    assert apart == wilson_interval(round(sum(scores)), len(scores))
    assert together == pytest.approx(normal_interval(scores, groups), abs=0.01)
    assert together[1] - together[0] > 1.3 * (apart[1] - apart[0])
    order = list(range(len(scores)))
    chance.shuffle(order)
    shuffled = interval([scores[n] for n in order], groups=[groups[n] for n in order])
    assert shuffled == pytest.approx(together, abs=0.01)


def test_what_is_alike_everywhere_is_not_certain() -> None:
    assert bootstrap_interval([0.0] * 60) == (-0.05, 0.05)
    assert bootstrap_interval([0.0] * 60, groups=[n // 6 for n in range(60)]) == (-0.3, 0.3)
    # As many right about each picture: what differs between pictures is not seen.
    assert bootstrap_interval([0.0, 1.0] * 30, groups=[n // 2 for n in range(60)]) == (0.4, 0.6)
    assert interval([1.0] * 60, groups=[n // 6 for n in range(60)]) == wilson_interval(10, 10)
    assert bootstrap_interval([0.5]) == (-0.5, 1.5)
