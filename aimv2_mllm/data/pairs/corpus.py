"""Sample number g of a run, from whichever source has its turn: pixels and words, or why not.

A pure function of (seed, g): which row, how it is cropped, and which row stands in for one that
cannot be used.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from aimv2_mllm.data.drawing import Drawing, Skipped
from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.pairs.sources import open_sources
from aimv2_mllm.data.pictures.decode import Fit, decode, middle_square, random_crop, whole
from aimv2_mllm.recipe.data import CaptionData

# The longest token of the usual vocabularies that is a word has about 20 characters; what comes
# after this many times the tokens that are kept cannot be among them.
CHARACTERS_PER_TOKEN = 32
LONGEST_SHEET = 2.0  # of the embedded world where sizes vary: the largest aspect ratio


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
        self._sources = open_sources(data)
        self._drawing = Drawing(self._sources, [config.weight for config in data.sources], seed)
        self.notes, self.digest = self._drawing.notes, self._drawing.digest
        self.num_rows = self._drawing.num_rows

    def sample(self, number: int, skipped: Skipped, fit: Fit | None = None) -> Sample:
        """Sample `number`; rows that had to be left out for it are added to `skipped`.

        Its picture is a square of `image_size` pixels, or with `fit` a whole picture at the size
        that this gives. RunFailed when too many rows one after the other are unusable.
        """
        turn, position = self._drawing.turn(number)
        if self._drawing.is_endless(turn):
            sheet = scenes.scene(self._seed, "train", position)
            width, height = self._sheet_size(position, fit)
            return Sample(scenes.render(sheet, height, width), scenes.caption(sheet))
        return self._drawing.first_usable(number, skipped, partial(self._made, fit))

    def _made(self, fit: Fit | None, turn: int, row: int, place: int) -> Sample:
        source = self._sources[turn]
        assert source is not None, turn
        content, caption = source.read(row)
        caption = self._cleaned(caption)
        if not caption:
            raise Unusable("no_caption", "its caption is empty")
        return Sample(self._pixels(content, (turn, place), fit), caption)

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
