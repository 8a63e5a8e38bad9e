"""Conversation number g of a run, from whichever source has its turn: tokens and pixels, or why
not. A pure function of (seed, g)."""

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from aimv2_mllm.data.drawing import Drawing, Skipped
from aimv2_mllm.data.files import Later, Unusable
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.pictures.decode import decode, decode_padded, middle_square, rim_of
from aimv2_mllm.data.pictures.own_shapes import OwnShapes
from aimv2_mllm.data.talks.conversations import Message, conversation, num_pictures
from aimv2_mllm.data.talks.sources import Talk, open_talk_sources
from aimv2_mllm.data.talks.templates import Encoded, Writer
from aimv2_mllm.errors import UsageError
from aimv2_mllm.marks import TURNS
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.recipe.data import ConversationData, HandwritingTalks

# A picture as (H, W, 3) uint8, or what a tower made of it (N, D).
Seen = np.ndarray | Tensor
See = Callable[[bytes], Seen]  # of an encoded picture


class TalkSample(NamedTuple):
    """A conversation in tokens, and its pictures in the order of the text."""

    encoded: Encoded
    pictures: list[Seen]


class Said(NamedTuple):
    """What is said in a row, in tokens; `pictures` are looked at when they are called, and `turns`
    were too many."""

    encoded: Encoded
    pictures: list[Callable[[See], Seen]]
    turns: int


class Draft:
    """A sample of which the text is known and the pictures are not: what `encoded` says stands if
    these can be used, and otherwise another row takes its place."""

    def __init__(self, tries: Generator[Said, None, None], skipped: Skipped) -> None:
        self._tries, self._skipped = tries, skipped  # which has the rows left out by `tries`
        self._said = next(tries)

    @property
    def encoded(self) -> Encoded:
        """The conversation in tokens."""
        return self._said.encoded

    @property
    def has_pictures(self) -> bool:
        """Whether it is about any."""
        return bool(self._said.pictures)

    def sample(self, see: See, skipped: Skipped) -> TalkSample:
        """The sample, once; what had to be left out for it is added to `skipped`.

        RunFailed when too many rows one after the other are unusable.
        """
        said, pictures = self._said, None
        while pictures is None:
            try:
                pictures = [look(see) for look in said.pictures]
            except Unusable as error:
                said = self._tries.throw(error)
        skipped.join(self._skipped)
        if said.turns:
            skipped.counts[TURNS] += said.turns
        return TalkSample(said.encoded, pictures)


class TalkCorpus:
    """The conversations of a recipe's `data`, by number; they have no end.

    Without `preprocessing` they are for a model without eyes: the embedded world is told in words,
    and rows with pictures are unusable. With `shapes` pictures from files keep theirs.
    """

    def __init__(
        self,
        data: ConversationData,
        seed: int,
        preprocessing: Preprocessing | None,
        shapes: OwnShapes | None = None,
    ) -> None:
        self._data, self.seed, self._preprocessing = data, seed, preprocessing
        self._shapes = shapes
        self._sources = open_talk_sources(data)
        opened = [None if isinstance(s, HandwritingTalks) else s for s in self._sources]
        self._drawing = Drawing(opened, [config.weight for config in data.sources], seed)
        self.notes, self.digest = self._drawing.notes, self._drawing.digest
        self.num_rows = self._drawing.num_rows

    @property
    def max_tokens(self) -> int:
        """How many tokens a conversation has at most."""
        return self._data.max_tokens

    @property
    def image_aspect(self) -> str:
        """How a picture is made square, or that it is not."""
        return self._data.image_aspect

    def sample(self, number: int, writer: Writer, skipped: Skipped) -> TalkSample:
        """Sample `number`; what had to be left out for it is added to `skipped`.

        RunFailed when too many rows one after the other are unusable.
        """
        return self.draft(number, writer).sample(self.pixels, skipped)

    def draft(self, number: int, writer: Writer) -> Draft:
        """The same of which no picture was read yet."""
        turn, position = self._drawing.turn(number)
        world, skipped = self._sources[turn], Skipped()
        if isinstance(world, HandwritingTalks):
            return Draft(self._of_world(world, turn, position, writer), skipped)

        def use(turn: int, row: int, place: int) -> Said:
            talk, counts = self._read(turn, row), None
            if self._shapes is not None:
                # How many tokens they become stands in their headers: they are read now.
                contents = [read() for read in talk.pictures]
                counts = [self._shapes.num_tokens(content) for content in contents]
                talk = talk._replace(pictures=[partial(_given, content) for content in contents])
            encoded, turns = self._fitted(talk.messages, writer, counts)
            kept = num_pictures(talk.messages[: len(talk.messages) - 2 * turns])
            return Said(encoded, [partial(_seen, read) for read in talk.pictures[:kept]], turns)

        return Draft(self._drawing.usable(number, skipped, use), skipped)

    def _of_world(
        self, world: HandwritingTalks, turn: int, position: int, writer: Writer
    ) -> Generator[Said, None, None]:
        sheet = scenes.scene(self.seed, "train", position)
        messages = self._about(world, sheet, position, "talk")
        try:
            encoded, turns = self._fitted(messages, writer)
        except Unusable as error:
            text = f"data.sources.{turn}: a conversation {error}: choose another template or"
            raise UsageError(f"{text} a larger max_tokens") from None
        size = self._preprocessing.image_size if self._preprocessing else 0
        yield Said(encoded, [lambda see: scenes.render(sheet, size)] if size else [], turns)

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
        self, messages: list[Message], writer: Writer, counts: list[int] | None = None
    ) -> tuple[Encoded, int]:
        """The conversation in tokens, cut if need be, and how many turns that took."""
        cut = self._data.too_long == "cut"
        return writer.fitted(messages, self._data.max_tokens, cut=cut, counts=counts)

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
                    talk = self._read(turn, self._drawing.row(turn, place))
                    contents = [read() for read in talk.pictures]
                except Unusable:
                    continue
                yield from contents
            first += len(own)

    def pixels(self, content: bytes) -> np.ndarray:
        """An encoded picture as (S, S, 3) uint8, or in its own shape; `Unusable` where it is
        none."""
        assert self._preprocessing is not None
        if not content:
            raise Unusable("empty", "the picture is empty")
        if self._shapes is not None:
            return self._shapes.pixels(content)
        size = self._preprocessing.image_size
        if self._data.image_aspect == "crop":
            return decode(content, size, middle_square)
        return decode_padded(content, size, rim_of(self._preprocessing.mean))


def _seen(read: Later, see: See) -> Seen:
    return see(read())


def _given(content: bytes) -> bytes:
    return content
