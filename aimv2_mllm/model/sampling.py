"""How the next token of an answer is chosen, and where an answer ends early.

Owns the settings and what they may be. Refuses the others before any model is loaded.
"""

from dataclasses import dataclass
from typing import NamedTuple

from aimv2_mllm.errors import UsageError, show


class Range(NamedTuple):
    """What a setting may be: `low` to `high`, and 0 where `zero_is_off`; `words` say so."""

    low: float
    high: float
    words: str
    zero_is_off: bool = False

    def allows(self, value: float) -> bool:
        """Whether it is in the range, which NaN is not."""
        return (self.zero_is_off and value == 0) or self.low <= value <= self.high


MOST_SEED = 2**63 - 1
RANGES = {
    "temperature": Range(0.01, 2.0, "0 (always the likeliest), or 0.01 to 2", zero_is_off=True),
    "top_p": Range(1e-6, 1.0, "above 0, up to 1 (all)"),
    "top_k": Range(1, 2**31 - 1, "0 (all), or a whole number from 1 on", zero_is_off=True),
    "repetition_penalty": Range(0.1, 10.0, "0.1 to 10, 1 for none"),
    "seed": Range(0, MOST_SEED, "a whole number from 0 on"),
}
WHOLE = {"top_k", "seed"}


@dataclass(frozen=True)
class Sampling:
    """Greedy as it stands; with a `temperature` above 0, tokens are drawn.

    Drawn is among the `top_k` likeliest (0: all), of these among the fewest whose probabilities
    make up `top_p`. `seed` makes it repeatable, None makes each answer another one.
    `repetition_penalty` divides the scores of tokens that were there before. An answer ends before
    the first of the texts `stop`. UsageError for a value out of `RANGES`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            kinds = int if name in WHOLE else int | float
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            if not is_number or not allowed.allows(value):
                raise UsageError(f"{name} is {show(value)}, must be {allowed.words}")
        for text in self.stop:
            if not text:
                raise UsageError("stop has an empty text: give what an answer is to end before")

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest, whatever was said before."""
        return not self.temperature and self.repetition_penalty == 1


GREEDY = Sampling()
