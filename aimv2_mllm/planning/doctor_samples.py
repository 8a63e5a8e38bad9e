"""What the first samples of a stage are: pictures that are there, words that are learned, one shown
as the model will be given it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from aimv2_mllm.data.drawing import Skipped
from aimv2_mllm.data.pairs.batches import CaptionBatches, encode_captions
from aimv2_mllm.data.pairs.corpus import Sample
from aimv2_mllm.data.talks.batches import TalkBatches
from aimv2_mllm.data.talks.corpus import TalkSample
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.marks import TURNS, UNSUPERVISED
from aimv2_mllm.objective import ContrastiveObjective
from aimv2_mllm.planning.problems import Problem
from aimv2_mllm.recipe.stages import PATCH
from aimv2_mllm.stages.job import Job
from aimv2_mllm.towers.examined import shown

NUM_SAMPLES = 64  # read of a stage
SHOWN = 5  # unusable rows that are named
ALL_WORDS = 2**20  # more than a caption has
AnySample = TypeVar("AnySample", Sample, TalkSample)


@dataclass
class Report:
    """Lines of ok, note and show as they are found, and the problems, which come at the end."""

    say: Callable[[str], None]
    problems: list[Problem] = field(default_factory=list)

    def tell(self, kind: str, text: str) -> None:
        """Say one finding."""
        self.say(f"{kind:5} {text}")

    def knows(self, key: str) -> bool:
        """Whether a problem at `key`, or below it, is known."""
        return any(f"{problem.key}.".startswith(f"{key}.") for problem in self.problems)

    def fault(self, key: str, text: str) -> None:
        """Remember a problem, unless it is known from elsewhere."""
        if not any(text == problem.text for problem in self.problems):
            self.problems.append(Problem(key, text))


def examine_talks(
    here: str, job: Job, batches: TalkBatches, num_image_tokens: int | None, report: Report
) -> None:
    """What is learned of the first conversations of the `data` at `here`, where the model makes
    `num_image_tokens` of a picture (None: it has no eyes)."""

    def read(number: int, skipped: Skipped) -> TalkSample:
        return batches.corpus.sample(number, batches.writer, skipped)

    samples = _read(here, read, job.data.max_skipped, report)
    if not samples:
        return
    rows = [sample.encoded for sample in samples]
    learned = [int((row.labels[1:] != UNSUPERVISED).sum()) for row in rows]
    total = sum(len(row.ids) for row in rows)
    report.tell(
        "ok", f"samples: {100 * sum(learned) / total:.1f} % of the tokens of {len(rows)} are "
        f"learned, {min(learned)} to {max(learned)} of each; {max(len(r.ids) for r in rows)} tokens"
        " the longest"
    )  # fmt: skip
    if num_image_tokens is not None:
        _examine_places(here, samples, batches.writer.image_token_id, num_image_tokens, report)
        pictures = [picture for sample in samples for picture in sample.pictures]
        _tell_pictures([one for one in pictures if isinstance(one, np.ndarray)], report)
    writer = batches.writer
    decode, image = writer.tokenizer.decode, writer.image_token_id
    ids, labels = rows[0].ids.tolist(), rows[0].labels.tolist()
    for line in shown(ids, labels, decode, image=image, stands_for=1):
        report.tell("show", line)


def _read(
    here: str, read: Callable[[int, Skipped], AnySample], most: float, report: Report
) -> list[AnySample]:
    """The first samples, up to one that cannot be had; rows left out for them are told."""
    samples: list[AnySample] = []
    skipped = Skipped()
    try:
        for number in range(NUM_SAMPLES):
            of_one = Skipped()  # which names a few rows, and they may come again
            samples.append(read(number, of_one))
            skipped.counts.update(of_one.counts)
            skipped.examples += [one for one in of_one.examples if one not in skipped.examples]
    except (UsageError, RunFailed) as error:
        report.fault(here, str(error))
        return samples
    turns = skipped.counts.pop(TURNS, 0)
    if turns:
        report.tell("note", f"samples: {turns} last turns are left out, beyond max_tokens")
    left_out = sum(skipped.counts.values())
    if not left_out:
        report.tell("ok", f"samples: {len(samples)} read, no row unusable")
        return samples
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.counts.items()))
    text = (
        f"{left_out} of {len(samples) + left_out} rows drawn cannot be used ({counts}), such as "
        f"{'; '.join(skipped.examples[:SHOWN])}"
    )
    if left_out > most * (len(samples) + left_out):
        report.fault(f"{here}.max_skipped", f"{text}: more than the {most:.1%} that a run allows")
    else:
        report.tell("note", f"samples: {text}; others take their places")
    return samples


def _examine_places(
    here: str, samples: Sequence[TalkSample], image: int, num_image_tokens: int, report: Report
) -> None:
    """That the words leave as many places as the model fills."""
    for number, sample in enumerate(samples):
        found, due = int((sample.encoded.ids == image).sum()), len(sample.pictures)
        if found != due * num_image_tokens:
            report.fault(
                here, f"sample {number} has {found} image tokens for {due} pictures, of each of "
                f"which the model makes {num_image_tokens}"
            )  # fmt: skip
            return
    count = sum(len(sample.pictures) for sample in samples)
    report.tell("ok", f"samples: {num_image_tokens} image tokens for each of {count} pictures")


def _tell_pictures(pictures: Sequence[np.ndarray], report: Report) -> None:
    """Sizes and brightness of pictures (H, W, 3) uint8, and how many are of one colour."""
    if not pictures:
        report.tell("note", "pictures: none")
        return
    sizes = sorted({picture.shape[1::-1] for picture in pictures})
    said = " to ".join(f"{w} x {h}" for w, h in dict.fromkeys([sizes[0], sizes[-1]]))
    bright = np.mean([picture.mean() for picture in pictures])
    text = f"pictures: {len(pictures)} read, {said} pixels, mean brightness {bright:.0f} of 255"
    report.tell("ok", text)
    if blank := sum(picture.min() == picture.max() for picture in pictures):
        report.tell("note", f"pictures: {blank} are of one colour")


def examine_captions(here: str, job: Job, batches: CaptionBatches, report: Report) -> None:
    """The first pictures and captions of the `data` at `here`: how long, and what is cut."""

    def read(number: int, skipped: Skipped) -> Sample:
        return batches.corpus.sample(number, skipped)

    samples = _read(here, read, job.data.max_skipped, report)
    if not samples:
        return
    captions, most = [sample.caption for sample in samples], batches.max_text_tokens
    ids, lengths = encode_captions(captions, batches.tokenizer, ALL_WORDS)
    cut = int((lengths > most).sum())
    report.tell(
        "ok", f"captions: {lengths.min()} to {lengths.max()} tokens, {lengths.float().mean():.0f} "
        f"in the mean; max_text_tokens {most} cuts {100 * cut / len(lengths):.1f} %"
    )  # fmt: skip
    _tell_pictures([sample.pixels for sample in samples], report)
    _show_caption(ids[0, : lengths[0]].tolist(), job, batches, report)


def _show_caption(
    caption: Sequence[int], job: Job, batches: CaptionBatches, report: Report
) -> None:
    """The first sample: how many patches are seen and how many continued, and its words."""
    first = batches(0)[0]
    height, width = first["pixel_values"][0].shape[-2:]
    rows, columns = height // PATCH, width // PATCH
    seen = int(first["prefix_length"][0])
    most, decode = batches.max_text_tokens, batches.tokenizer.decode
    said = f"{width} x {height} pixels, {rows} x {columns} patches: the first {seen} seen"
    report.tell("show", f"{'image':11} {said}, {rows * columns - seen} learned")
    word = "read" if isinstance(job.objective, ContrastiveObjective) else "learned"
    report.tell("show", f"{word:11} {decode(caption[:most])!r} and the end token")
    if caption[most:]:
        report.tell("show", f"{'cut off':11} {decode(caption[most:])!r}")
