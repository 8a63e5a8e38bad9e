"""Which questions are asked, how they are put, and how answers are judged: what `evaluate` and
`compare` are told alike.

Owns the words of the command line that say the same again. Refuses what the metric cannot judge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from aimv2_mllm.data.questions.asked import FIELDS, Asked, Question, load_asked
from aimv2_mllm.errors import UsageError, nearest
from aimv2_mllm.evaluation.metrics import METRICS

CHOICES = "{question}\n{choices}\nAnswer with the letter of the right choice."


@dataclass(frozen=True)
class Questions:
    """The questions of `data`, as `load_asked` takes them: `prompt` is a template with {question}
    and {choices} (see `prompt_of`), `columns` are the data's names of its fields.

    Each field is a flag of the verbs, in the order of `words`.
    """

    data: str = ""  # empty: of `compare` alone, what its recipe is trained on where that is known
    metric: str = "exact"
    prompt: str | None = None
    root: str | None = None
    split: str = "test"
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 64
    columns: Mapping[str, str] = field(default_factory=dict)
    controls: bool = True

    def load(self) -> Asked:
        """The questions; UsageError for one that the metric cannot judge, and for a metric or a
        prompt that is none."""
        if self.metric not in METRICS:
            known = f"{', '.join(METRICS)}{nearest(self.metric, METRICS)}"
            raise UsageError(f"--metric {self.metric}: must be one of {known}")
        asked = load_asked(
            self.data, root=self.root, columns=self.columns, split=self.split, limit=self.limit
        )
        for question in asked.questions:
            if why := METRICS[self.metric].unfit(question):
                raise UsageError(f"{self.data}: question {question.id} {why}")
        if self.prompt is not None and "{question}" not in self.prompt:
            raise UsageError(
                f"--prompt {self.prompt!r}: has no {{question}} where the question comes"
            )
        return asked

    def prompts(self, asked: Asked) -> list[str]:
        """What is put to the model for each of the questions."""
        return [prompt_of(question, self.prompt) for question in asked.questions]

    def words(self) -> list[str]:
        """The flags, behind the data, that say the same."""
        words = list[str]()
        for one in fields(self)[1:]:
            value, flag = getattr(self, one.name), f"--{one.name.replace('_', '-')}"
            if one.name == "columns":
                words += [word for pair in value.items() for word in ("--column", "=".join(pair))]
            elif one.name == "controls":
                words += [] if value else ["--no-controls"]
            elif value is not None:
                words += [flag, str(value)]
        return words


def prompt_of(question: Question, template: str | None) -> str:
    """What is put to the model: `template` with {question} and {choices} filled in; without one the
    question, and its choices by letter where it has any."""
    if template is None:
        template = CHOICES if question.choices else "{question}"
    lettered = [f"{chr(ord('A') + n)}. {text}" for n, text in enumerate(question.choices)]
    return template.replace("{choices}", "\n".join(lettered)).replace("{question}", question.text)


def columns_of(words: Sequence[str] | None) -> dict[str, str]:
    """What fields of the data are called, of words FIELD=NAME."""
    return dict(map(_column, words or ()))


def _column(text: str) -> tuple[str, str]:
    name, _, column = text.partition("=")
    if name not in FIELDS or not column:
        known = f"FIELD is one of {', '.join(FIELDS)}{nearest(name, FIELDS)}"
        raise UsageError(f"--column {text}: must be FIELD=NAME, where {known}")
    return name, column
