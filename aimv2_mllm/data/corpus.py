"""Sample number g of a run, from whichever source has its turn: pixels and words, or why not.

A pure function of (seed, g): which row, how it is cropped, and which row stands in for one that
cannot be used.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from aimv2_mllm.data import scenes
from aimv2_mllm.data.decode import Fit, decode, middle_square, random_crop, whole
from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.order import EpochOrder, Mixture, mixed
from aimv2_mllm.data.sources import open_sources
from aimv2_mllm.errors import RunFailed
from aimv2_mllm.recipe_data import CaptionData

MOST_TRIES = 10  # rows tried for one sample
EXAMPLES = 3  # names of unusable rows that are passed on, per batch
# The longest token of the usual vocabularies that is a word has about 20 characters; what comes
# after this many times the tokens that are kept cannot be among them.
CHARACTERS_PER_TOKEN = 32
LONGEST_SHEET = 2.0  # of the embedded world where sizes vary: the largest aspect ratio


@dataclass
class Skipped:
    """Rows that could not be used: how many by reason, and the first of them in words."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, error: Unusable) -> None:
        """Count one more."""
        self.counts[error.reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{error} ({error.reason})")


@dataclass(frozen=True)
class Sample:
    """Pixels (H, W, 3) uint8 and their caption."""

    pixels: np.ndarray
    caption: str


class Corpus:
    """The samples of a recipe's `data`, by number; they have no end."""

    def __init__(
        self, data: CaptionData, seed: int, *, image_size: int, max_text_tokens: int
    ) -> None:
        self._data, self._seed, self._size = data, seed, image_size
        self._most_text = CHARACTERS_PER_TOKEN * max_text_tokens
        self._mixture = Mixture([config.weight for config in data.sources], mixed(seed, 0))
        self._sources = open_sources(data)
        self._orders = [
            None if source is None else EpochOrder(source.groups, mixed(seed, 1, number))
            for number, source in enumerate(self._sources)
        ]
        opened = [source for source in self._sources if source is not None]
        self.notes = [f"{sum(s.groups):,} rows, the first is {s.name(0)}" for s in opened]
        self.notes += [note for source in opened for note in source.notes]
        digests = " ".join(source.digest for source in opened)
        # Nothing for the embedded world alone, which never changes.
        self.digest = hashlib.sha256(digests.encode()).hexdigest()[:16] if opened else ""

    def sample(self, number: int, skipped: Skipped, fit: Fit | None = None) -> Sample:
        """Sample `number`; rows that had to be left out for it are added to `skipped`.

        Its picture is a square of `image_size` pixels, or with `fit` a whole picture at the size
        that this gives. RunFailed when `MOST_TRIES` rows in a row are unusable.
        """
        turn, position = self._mixture.turn(number)
        source, order = self._sources[turn], self._orders[turn]
        if source is None or order is None:
            sheet = scenes.scene(self._seed, "train", position)
            width, height = self._sheet_size(position, fit)
            return Sample(scenes.render(sheet, height, width), scenes.caption(sheet))
        errors = []
        for place in range(position, position + MOST_TRIES):
            row = order.row(place)
            try:
                content, caption = source.read(row)
                caption = self._cleaned(caption)
                if not caption:
                    raise Unusable("no_caption", "its caption is empty")
                return Sample(self._pixels(content, (turn, place), fit), caption)
            except Unusable as error:
                name = source.name(row)
                text = str(error) if name in str(error) else f"{name}: {error}"
                errors.append(Unusable(error.reason, text))
                skipped.add(errors[-1])
        said = "\n".join(f"  {error} ({error.reason})" for error in errors[:EXAMPLES])
        raise RunFailed(
            f"data.sources.{turn}: {MOST_TRIES} rows one after the other cannot be used, such as\n"
            f"{said}\nmend or remove them, and run the same command again"
        )

    def _sheet_size(self, position: int, fit: Fit | None) -> tuple[int, int]:
        """Width and height of a sheet in pixels; with `fit` its aspect ratio is drawn."""
        if fit is None:
            return self._size, self._size
        exponent = scenes.generator(self._seed, "aspect", position).uniform(-0.5, 0.5)
        longer = LONGEST_SHEET**exponent
        return fit(round(1000 * longer), round(1000 / longer))

    def _pixels(self, content: bytes, where: tuple[int, int], fit: Fit | None) -> np.ndarray:
        if not content:
            raise Unusable("empty", "the picture is empty")
        size = fit or self._size
        if not self._data.augment:
            return decode(content, size, whole if fit else middle_square)
        random = scenes.generator(self._seed, "crop", *where)
        pixels = decode(content, size, whole if fit else lambda w, h: random_crop(w, h, random))
        return pixels[:, ::-1] if random.random() < self._data.flip else pixels

    def _cleaned(self, caption: str) -> str:
        # Cut first: a caption may be a book, and only its beginning becomes tokens.
        text = " ".join(caption[: self._most_text].split())
        return text.lower() if self._data.clean == "lower" else text
