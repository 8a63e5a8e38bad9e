"""Conversation number g of a run, from whichever source has its turn: tokens and pixels, or why
not. A pure function of (seed, g)."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from aimv2_mllm.data import scenes
from aimv2_mllm.data.conversations import Message, conversation, num_pictures
from aimv2_mllm.data.decode import decode, decode_padded, middle_square, rim_of
from aimv2_mllm.data.drawing import Drawing, Skipped
from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.talk_sources import Talk, open_talk_sources
from aimv2_mllm.data.templates import Encoded, Writer
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.recipe_data import ConversationData, HandwritingTalks

TURNS = "turns"  # last turns of rows that were too long, counted beside rows (engine.skipping)


# A picture as (S, S, 3) uint8, or what a tower made of it (N, D).
Seen = np.ndarray | Tensor


class TalkSample(NamedTuple):
    """A conversation in tokens, and its pictures in the order of the text."""

    encoded: Encoded
    pictures: list[Seen]


class TalkCorpus:
    """The conversations of a recipe's `data`, by number; they have no end.

    Without `preprocessing` they are for a model without eyes: the embedded world is told in words,
    and rows with pictures are unusable.
    """

    def __init__(
        self, data: ConversationData, seed: int, preprocessing: Preprocessing | None
    ) -> None:
        self._data, self.seed, self._preprocessing = data, seed, preprocessing
        self._sources = open_talk_sources(data)
        opened = [None if isinstance(s, HandwritingTalks) else s for s in self._sources]
        self._drawing = Drawing(opened, [config.weight for config in data.sources], seed)
        self.notes, self.digest = self._drawing.notes, self._drawing.digest

    @property
    def max_tokens(self) -> int:
        """How many tokens a conversation has at most."""
        return self._data.max_tokens

    @property
    def image_aspect(self) -> str:
        """How a picture is made square."""
        return self._data.image_aspect

    def sample(
        self,
        number: int,
        writer: Writer,
        skipped: Skipped,
        see: Callable[[bytes], Seen] | None = None,
    ) -> TalkSample:
        """Sample `number`; what had to be left out for it is added to `skipped`.

        An encoded picture becomes what `see` makes of it, by default `pixels`.
        RunFailed when too many rows one after the other are unusable.
        """
        turn, position = self._drawing.turn(number)
        world = self._sources[turn]
        if isinstance(world, HandwritingTalks):
            sheet = scenes.scene(self.seed, "train", position)
            messages = self._about(world, sheet, position, "talk")
            try:
                encoded = self._fitted(messages, writer, skipped)[0]
            except Unusable as error:
                text = f"data.sources.{turn}: a conversation {error}: choose another template or"
                raise UsageError(f"{text} a larger max_tokens") from None
            size = self._preprocessing.image_size if self._preprocessing else 0
            return TalkSample(encoded, [scenes.render(sheet, size)] if size else [])

        def use(turn: int, row: int, place: int) -> TalkSample:
            talk = self._read(turn, row)
            left_out = Skipped()
            encoded, kept = self._fitted(talk.messages, writer, left_out)
            pictures = [(see or self.pixels)(content) for content in talk.pictures[:kept]]
            skipped.counts.update(left_out.counts)  # only of a row that is used
            return TalkSample(encoded, pictures)

        return self._drawing.first_usable(number, skipped, use)

    def words(self, number: int, skipped: Skipped) -> list[Message]:
        """What is said in sample `number` of a corpus for a model without eyes; of the embedded
        world another conversation than the `sample` of that number."""
        turn, position = self._drawing.turn(number)
        world = self._sources[turn]
        if isinstance(world, HandwritingTalks):
            sheet = scenes.scene(self.seed, "train", position)
            return self._about(world, sheet, position, "words")
        return self._drawing.first_usable(
            number, skipped, lambda turn, row, place: self._read(turn, row).messages
        )

    def _about(
        self, world: HandwritingTalks, sheet: scenes.Scene, position: int, stream: str
    ) -> list[Message]:
        return conversation(
            sheet,
            scenes.generator(self.seed, stream, position),
            tasks={str(task): weight for task, weight in world.tasks.items()},
            turns=world.turns,
            seen=self._preprocessing is not None,
        )

    def _read(self, turn: int, row: int) -> Talk:
        source = self._sources[turn]
        assert not isinstance(source, HandwritingTalks), turn
        talk = source.read(row)
        if talk.pictures and self._preprocessing is None:
            raise Unusable("picture", "is about a picture, and an LLM alone is trained")
        return talk

    def _fitted(
        self, messages: list[Message], writer: Writer, skipped: Skipped
    ) -> tuple[Encoded, int]:
        """The conversation in tokens, cut if need be, and how many pictures are left of it."""
        cut = self._data.too_long == "cut"
        encoded, turns = writer.fitted(messages, self._data.max_tokens, cut=cut)
        if turns:
            skipped.counts[TURNS] += turns
        return encoded, num_pictures(messages[: len(messages) - 2 * turns])

    def num_places(self, samples: int) -> int:
        """How many rows so many samples are made of, each counted once."""
        return sum(len(places) for _, places in self._drawing.rows(samples))

    def pictures(self, samples: int, places: range) -> Iterator[bytes]:
        """The encoded pictures of some of the rows that so many samples are made of, by their
        places among these; what is unusable is left out."""
        first = 0
        for turn, own in self._drawing.rows(samples):
            for place in own[max(places.start - first, 0) : max(places.stop - first, 0)]:
                try:
                    yield from self._read(turn, self._drawing.row(turn, place)).pictures
                except Unusable:
                    continue
            first += len(own)

    def pixels(self, content: bytes) -> np.ndarray:
        """An encoded picture as (S, S, 3) uint8; `Unusable` where it is none."""
        assert self._preprocessing is not None
        if not content:
            raise Unusable("empty", "the picture is empty")
        size = self._preprocessing.image_size
        if self._data.image_aspect == "crop":
            return decode(content, size, middle_square)
        return decode_padded(content, size, rim_of(self._preprocessing.mean))
