"""How the next token of an answer is chosen, and where an answer ends early.

Owns the settings and what they may be. Refuses the others before any model is loaded.
"""

import math
from dataclasses import dataclass

from aimv2_mllm.errors import UsageError, show

# setting -> from, to, and both in words; 0 is allowed where the words say what it means
RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.01, 2.0, "0 (always the likeliest), or 0.01 to 2"),  # OpenAI's largest
    "top_p": (1e-6, 1.0, "above 0, up to 1 (all)"),
    "top_k": (1, 2**31 - 1, "0 (all), or a whole number from 1 on"),
    "repetition_penalty": (0.1, 10.0, "0.1 to 10, 1 for none"),
    "seed": (0, 2**63 - 1, "a whole number from 0 on"),
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
        for name, (low, high, words) in RANGES.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            kinds = int if name in WHOLE else int | float
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            is_off = value == 0 and words.startswith("0 (")
            if not is_number or math.isnan(value) or not (is_off or low <= value <= high):
                raise UsageError(f"{name} is {show(value)}, must be {words}")
        for text in self.stop:
            if not text:
                raise UsageError("stop has an empty text: give what an answer is to end before")

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest, whatever was said before."""
        return not self.temperature and self.repetition_penalty == 1


GREEDY = Sampling()
