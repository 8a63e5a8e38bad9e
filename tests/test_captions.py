"""Captions: words as the COCO captions' tokenizer cuts them, scores as their papers define them."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from aimv2_mllm.data.questions.asked import Question
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation import captions
from aimv2_mllm.evaluation.metrics import METRICS

VOCABULARY = ["a", "man", "dog", "rides", "sits", "red", "on", "the", "horse", "grass", "two"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # What PTBTokenizer of pycocoevalcap 1.2 gives, which needs Java.
        (
            "A man's dog doesn't run; it sits on a red-brown couch.",
            "a man 's dog does n't run it sits on a red-brown couch",
        ),
        (
            "Two people, one on a 3.5 board (blue)!",
            "two people one on a 3.5 board -lrb- blue -rrb-",
        ),
        ("It’s the U.S. flag & a cat's tail.", "it 's the u.s. flag & a cat 's tail"),
        ('"STOP" sign - at 5:30 p.m.', "stop sign at 5:30 p.m."),
        ("can't won't cannot", "ca n't wo n't can not"),
        ("a café, naïve … and…", "a café naïve and"),
        ("a/b test 10,000 people's kites", "a/b test 10,000 people 's kites"),
        ("a man -- on a skateboard... doing a trick", "a man on a skateboard doing a trick"),
        ("I'm sure they've left", "i 'm sure they 've left"),
        ("the dogs' bowls", "the dogs bowls"),
        ("$5 100% #1", "$ 5 100 % # 1"),
        ("", ""),
    ],
)
def test_a_caption_is_cut_into_the_treebanks_words(text: str, words: str) -> None:
    assert captions.words(text) == words


def drawn(count: int) -> tuple[list[Question], list[str]]:
    """Random captions of `count` pictures by people, one to three each, and by a model."""
    chance = random.Random(count)

    def caption() -> str:
        return " ".join(chance.choices(VOCABULARY, k=chance.randint(5, 9)))

    asked = [
        Question(str(n), "?", tuple(caption() for _ in range(chance.randint(1, 3))))
        for n in range(count)
    ]
    # A model that often copies, so that there are long pieces in common.
    given = [
        " ".join([*chance.choice(one.answers).split()[:4], *caption().split()[:4]]) for one in asked
    ]
    return asked, given


def pieces(text: str, size: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[n : n + size]) for n in range(len(words) - size + 1))


def vector(
    found: Counter[tuple[str, ...]], index: dict[tuple[str, ...], int], weights: np.ndarray
) -> np.ndarray:
    """The weighted counts of known pieces, and last the norm of those of all others."""
    known, others = np.zeros(len(index) + 1), 0.0
    for piece, count in found.items():
        if piece in index:
            known[index[piece]] = count * weights[index[piece]]
        else:
            others += (count * weights[-1]) ** 2
    known[-1] = math.sqrt(others)
    return known


def cider_d(asked: list[Question], given: list[str]) -> list[float]:
    """Vedantam et al., 2015, equations 2 to 4 in the variant D: counts of the caption clipped to
    those of people's, and a penalty for another length, sigma 6; ten times that. The terms are
    counts, as in their code, and the frequency of what people never wrote is one."""
    scores = np.zeros(len(asked))
    for size in range(1, 5):
        frequency = Counter(
            piece for one in asked for piece in set().union(*(pieces(a, size) for a in one.answers))
        )
        index = {piece: n for n, piece in enumerate(frequency)}
        weights = np.log(len(asked)) - np.log([*frequency.values(), 1.0])

        for number, (one, text) in enumerate(zip(asked, given, strict=True)):
            model = vector(pieces(text, size), index, weights)
            for answer in one.answers:
                people = vector(pieces(answer, size), index, weights)
                common = (np.minimum(model, people) * people)[:-1].sum()
                norms = np.linalg.norm(model) * np.linalg.norm(people)
                gap = len(text.split()) - len(answer.split())
                near = math.exp(-(gap**2) / (2 * 6**2))
                cosine = common / norms if norms else 0.0
                scores[number] += 10 * near * cosine / 4 / len(one.answers)
    return scores.tolist()


def bleu_4(asked: list[Question], given: list[str]) -> float:
    """Papineni et al., 2002, of the whole: clipped shares of pieces, and a penalty for brevity."""
    logs = 0.0
    for size in range(1, 5):
        right = total = 0
        for one, text in zip(asked, given, strict=True):
            most: Counter[tuple[str, ...]] = Counter()
            for answer in one.answers:
                most |= pieces(answer, size)
            right += (pieces(text, size) & most).total()
            total += pieces(text, size).total()
        logs += math.log(right / total) / 4
    length = sum(len(text.split()) for text in given)
    nearest = sum(
        min((abs(len(a.split()) - len(text.split())), len(a.split())) for a in one.answers)[1]
        for one, text in zip(asked, given, strict=True)
    )
    return math.exp(logs + min(0.0, 1 - nearest / length))


def common_length(one: list[str], other: list[str]) -> int:
    """The length of the longest common subsequence, by its recursive definition."""
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + common_length(one[1:], other[1:])
    return max(common_length(one[1:], other), common_length(one, other[1:]))


def rouge_l(asked: list[Question], given: list[str]) -> float:
    """Lin, 2004, section 3.1, with beta 1.2 and the best precision and recall, as for COCO."""
    scores = []
    for one, text in zip(asked, given, strict=True):
        words = text.split()
        common = [(common_length(words, a.split()), len(a.split())) for a in one.answers]
        precision = max(length / len(words) for length, _ in common)
        recall = max(length / count for length, count in common)
        both = (1 + 1.2**2) * precision * recall
        scores.append(both / (recall + 1.2**2 * precision) if both else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("count", [3, 12])
def test_scores_are_those_of_the_papers_definitions(count: int) -> None:
    asked, given = drawn(count)
    found = METRICS["caption"].score(asked, given)
    assert found == pytest.approx(cider_d(asked, given))
    assert max(found) > 0.5
    told = METRICS["caption"].more(asked, given)
    assert told["bleu_4"] == pytest.approx(bleu_4(asked, given), rel=1e-3)
    assert told["rouge_l"] == pytest.approx(rouge_l(asked, given))


def test_a_perfect_and_an_empty_caption(capsys: pytest.CaptureFixture[str]) -> None:
    asked, _ = drawn(5)
    perfect = METRICS["caption"].score(asked, [one.answers[0].upper() + "." for one in asked])
    assert min(perfect) > 2
    assert METRICS["caption"].score(asked, [""] * 5) == [0.0] * 5
    assert METRICS["caption"].more(asked, [""] * 5)["rouge_l"] == 0
    assert capsys.readouterr() == ("", "")


def test_without_its_library_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UsageError, match=r"pycocoevalcap .*pip install 'aimv2-mllm\[evaluate\]'"):
        METRICS["caption"].score(*drawn(3))
