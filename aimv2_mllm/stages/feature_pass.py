"""Before a stage is trained, one pass over its pictures: the features of its frozen tower that are
not kept yet are computed and kept; training then reads them.

A pass that is killed keeps what it has; so do stages and runs of the same tower for each other.
What it would have taken without them is recorded, so that runs can be compared.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from operator import xor
from typing import Any

import torch
from torch import Tensor

from aimv2_mllm.data.features.shards import picture_key
from aimv2_mllm.data.features.store import SHARD_BYTES, FeatureStore, Took
from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.talks.batches import BLANK, TalkBatches
from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.flops import FlopCounter
from aimv2_mllm.engine.metrics import ProgressBar
from aimv2_mllm.engine.precision import has_bf16
from aimv2_mllm.engine.strategies import share_out
from aimv2_mllm.engine.upcoming import upcoming_steps
from aimv2_mllm.model.frozen_tower import FrozenTower, digest_of
from aimv2_mllm.narration import Narrate, note
from aimv2_mllm.recipe.data import ConversationData
from aimv2_mllm.recipe.train import TrainConfig
from aimv2_mllm.stages.job import Ended, Job

ROWS = 16  # whose pictures are decoded at once


@dataclass(frozen=True)
class Pass:
    """The pictures of a stage by chunk, of one rank: which they are, and the pixels of those whose
    features are not kept. It can be sent to another process.

    Ranks share the rows, so that each is read once; a picture of several rows may be of several.
    """

    batches: TalkBatches
    store: FeatureStore
    samples: int

    @property
    def num_chunks(self) -> int:
        """How many chunks this rank has."""
        share, places = self.batches.share, self.batches.corpus.num_places(self.samples)
        return len(range(share.rank * ROWS, places, share.size * ROWS))

    @property
    def name(self) -> str:
        """A name for the pictures, by what decides which they are."""
        corpus, seed = self.batches.corpus, self.batches.corpus.seed
        said = [corpus.digest, corpus.image_aspect, self.samples, seed, self.store.most_gib]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:24]

    def __call__(self, number: int) -> list[dict[str, Any]]:
        """The one batch of this rank's chunk of that number: `all` keys of its pictures, and
        `pixel_values` of those with the `keys`."""
        corpus, share = self.batches.corpus, self.batches.share
        chunk = number * share.size + share.rank
        contents = [] if chunk else [BLANK]
        contents += corpus.pictures(self.samples, range(chunk * ROWS, (chunk + 1) * ROWS))
        found, missing = dict[bytes, None](), dict[bytes, Tensor]()
        for content in contents:
            key = picture_key(content, corpus.image_aspect)
            if key in found:
                continue
            found[key] = None
            if key not in self.store:
                try:
                    pixels = self.batches.pixels(content)
                except Unusable:
                    del found[key]
                    continue
                assert self.batches.preprocessing is not None
                missing[key] = self.batches.preprocessing.normalise(pixels[None])
        pictures = [*missing.values()]
        values = torch.cat(pictures) if pictures else torch.empty(0)
        return [{"all": list(found), "keys": list(missing), "pixel_values": values}]


def keep_features(
    job: Job,
    ranks: Ranks,
    narrate: Narrate,
    *,
    llava: Any,
    data: ConversationData,
    train: TrainConfig,
) -> Ended:
    """Compute the features of the pictures of `job` that are not kept yet, as far as they fit, and
    let it read them; the tower of its `llava` stands outside of it until the training has ended.

    UsageError for a folder that cannot hold them.
    """
    batches: Any = job.batches
    assert isinstance(batches, TalkBatches), batches
    assert batches.preprocessing is not None
    assert data.features is not None
    device = ranks.device(train.device)
    if ranks.size > 1 and train.strategy == "fsdp2":  # only rank 0 may have loaded it
        share_out(llava.model.vision_tower, ranks, torch.device("cpu"))
    half = train.precision == "bf16" and has_bf16(device)
    tower = FrozenTower(llava.model, torch.bfloat16 if half else torch.float32)
    about = tower.about(batches.preprocessing)
    store = FeatureStore(data.features.folder, digest_of(about), data.features.max_gib)
    tell = narrate if ranks.is_first else note  # what is damaged is told by who finds it first
    store.open(about, tell)
    work = Pass(batches, store, train.steps * train.batch_size)
    facts = store.noted(work.name)
    if not all(ranks.gather(facts is not None)):
        filler = _Filler(store, tower, device, tell)
        facts = _filled(work, filler, workers=data.workers, ranks=ranks, narrate=narrate)
    assert facts is not None
    rest = "" if facts["whole"] else "; max_gib is full; the rest is computed at every use"
    kept = f"{facts['kept']:,} of {facts['pictures']:,} pictures"
    narrate(f"features: {kept} are kept in {store.own} ({store.gib:.3f} GiB){rest}")
    job.batches = replace(batches, features=store)
    before = tower.num_kept, tower.num_read
    # Of all that are kept, whoever computed them, and in this or an earlier run.
    _, flops, seconds = store.took(facts["kept"])
    took = {"flops": float(f"{flops:.6g}"), "seconds": round(seconds / ranks.size, 3)}

    def ended() -> dict[str, Any]:
        tower.put_back()
        store.close()
        now = ranks.add_up([tower.num_kept - before[0], tower.num_read - before[1]])
        narrate(f"features: {now[0]:,} read, {now[1]:,} computed while training")
        counts = {"gib": round(store.gib, 6), "read": now[0], "computed": now[1]}
        return {"features": {**facts, **counts, "took": took}}

    return ended


class _Filler:
    """Computes features and hands them to the store, shard by shard."""

    def __init__(
        self, store: FeatureStore, tower: FrozenTower, device: torch.device, tell: Narrate
    ) -> None:
        self._store, self._tower, self._tell = store, tower, tell
        self.device, self._at_once = device, tower.at_once(device)
        self._waiting: dict[bytes, Tensor] = {}  # pixels, until they are enough for the tower
        self._rows: dict[bytes, Tensor] = {}  # features, until they are enough for a shard
        self._flops, self._since = 0, time.monotonic()  # since the last shard
        self.computed, self.is_full = 0, False

    def take(self, keys: Sequence[bytes], pixel_values: Tensor) -> bool:
        """Compute what of these pictures is not kept; False once nothing more fits."""
        for key, pixels in zip(keys, pixel_values, strict=True):
            if key not in self._store and key not in self._rows:
                self._waiting[key] = pixels
        while len(self._waiting) >= self._at_once:
            self._compute()
        return not self.is_full

    def finish(self) -> None:
        """Compute and hand over what is left."""
        if self._waiting:
            self._compute()
        self._hand_over()

    def _compute(self) -> None:
        keys = list(self._waiting)[: self._at_once]
        pixels = torch.stack([self._waiting.pop(key) for key in keys])
        with FlopCounter() as counter:
            features = self._tower.read(pixels.to(self.device)).cpu()
        self._flops += counter.flops
        self._rows |= zip(keys, features, strict=True)
        self.computed += len(keys)
        if sum(row.nbytes for row in self._rows.values()) >= SHARD_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        now = time.monotonic()
        if self._rows and not self.is_full:
            took = Took(len(self._rows), self._flops, now - self._since)
            self.is_full = not self._store.add(self._rows, self._tell, took=took)
        self._rows, self._flops, self._since = {}, 0, now


def _filled(
    work: Pass, filler: _Filler, *, workers: int, ranks: Ranks, narrate: Narrate
) -> dict[str, Any]:
    """What of the pictures is kept in the end, by all ranks together."""
    chunks, seen = work.num_chunks, set[bytes]()
    bar = ProgressBar(chunks * ROWS, unit="row", is_shown=ranks.is_first)
    made = upcoming_steps(work, 0, chunks, device=filler.device, workers=workers)
    with closing(made):
        for chunk, [batch] in made:
            seen.update(batch["all"])
            if not filler.take(batch["keys"], batch["pixel_values"]):
                break
            rate = f"{filler.computed:,} computed, {filler.computed / bar.seconds:.1f} a second"
            bar.show((chunk + 1) * ROWS, f"{len(seen):,} pictures, {rate}")
    filler.finish()
    bar.close()
    seen = seen.difference(*ranks.gather(seen)[: ranks.rank])  # once all have written
    work.store.refresh(narrate)
    kept = sum(key in work.store for key in seen)
    counts = [len(seen), kept, filler.computed, int(filler.is_full)]
    pictures, kept, computed, full = ranks.add_up(counts)
    if computed:
        narrate(f"features: {computed:,} pictures computed in {bar.seconds:.0f} s")
    which = reduce(xor, ranks.gather(reduce(xor, (int.from_bytes(key[:8]) for key in seen), 0)))
    of = f"{work.store.own.name}/{which:016x}"  # the same for the same pictures in any order
    facts = {"pictures": pictures, "kept": kept, "whole": not full, "of": of}
    if ranks.is_first:
        work.store.note_pass(work.name, facts)
    return facts
