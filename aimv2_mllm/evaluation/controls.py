"""What answers are held against: the same model without the picture or with another, and no model.

A benchmark that is answered without looking says nothing of eyes.
"""

from collections import Counter
from collections.abc import Sequence

# What the model gets to see in the controls in which it is asked again.
SHOWN = {"text_only": "no picture", "blind": "another question's picture"}
MAJORITY = "majority"


def other_picture(number: int, count: int) -> int:
    """The picture, of `count`, that the blind control shows instead of `number`: the next one, and
    the first after the last. Never the same, for which there must be two at least."""
    assert count >= 2, count
    return (number + 1) % count


def majority_answers(kinds: Sequence[str], right: Sequence[Sequence[str]]) -> list[str]:
    """To each question the answer that is right most often among those of its kind: a control
    without any model. `right` are the answers that count for each question."""
    counts: dict[str, Counter[str]] = {}
    for kind, answers in zip(kinds, right, strict=True):
        counts.setdefault(kind, Counter()).update(dict.fromkeys(answers, 1))
    return [counts[kind].most_common(1)[0][0] for kind in kinds]
