"""The attentive probe of the AIMv2 paper: one learnable query pools frozen patch tokens by
attention, a linear classifier reads the result; a grid of settings is swept in one pass.

Owns the protocol (section 4 and appendix of arXiv 2411.14402). Never sees a test picture
while it learns or chooses: a part of the training pictures chooses the setting.

Letters in shapes: B pictures, N patches, D width, G settings, h heads, d = D / h, K classes.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from aimv2_mllm.errors import UsageError

EPOCHS, BATCH_SIZE, BETAS, CLIP, LAST_LR = 100, 1024, (0.9, 0.999), 3.0, 1e-5
FEWEST_BATCHES = 10  # an epoch; of few pictures a batch is the tenth part, else nothing is learned
# From 5e-5 to 2e-3 as in the paper, which does not say the steps between: ours.
LEARNING_RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
WEIGHT_DECAYS = (0.05, 0.1)
HEAD_WIDTH = 64  # as in ViT-B with its 12 heads; the paper does not say
CHOOSING_SHARE = 0.1  # of the training pictures of each class, never trained on


class Setting(NamedTuple):
    """One point of the grid."""

    lr: float
    weight_decay: float


GRID = tuple(Setting(*one) for one in itertools.product(LEARNING_RATES, WEIGHT_DECAYS))


@dataclass(frozen=True)
class Told:
    """What the probe said: the classes (S,) of the test pictures, by the setting that did best on
    the pictures that chose, and how many of these each setting told rightly."""

    classes: Tensor
    chosen: Setting
    batch_size: int
    right: dict[Setting, int]
    num_learned: int
    num_choosing: int


class Probe(nn.Module):
    """What one setting of the grid trains, drawn with `seed` and so alike for all."""

    def __init__(self, width: int, num_classes: int, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape), generator=random))

        self.query = nn.Parameter(torch.randn(width, generator=random) * 0.02)
        self.key, self.value = drawn(width, width), drawn(width, width)
        self.weight = drawn(num_classes, width)
        self.bias = nn.Parameter(torch.zeros(num_classes))


class Sweep(nn.Module):
    """A probe for each of G settings over the same tokens, normalised by the same batch norm."""

    def __init__(self, num_settings: int, width: int, num_classes: int, seed: int) -> None:
        super().__init__()
        most = max(1, width // HEAD_WIDTH)
        self.num_heads = next(heads for heads in range(most, 0, -1) if width % heads == 0)
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.probes = nn.ModuleList(Probe(width, num_classes, seed) for _ in range(num_settings))

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits (G, B, K) for tokens (B, N, D).

        Keys and values are never made for a token: a score q . (K x) is (K' q) . x, and a sum of
        a (V x) is V (sum of a x). So a head costs a token D products, and not D * d.
        """
        batch, _, width = tokens.shape
        settings, heads = len(self.probes), self.num_heads
        x = self.norm(tokens.flatten(0, 1)).view_as(tokens)
        query = self._all("query").view(settings, heads, 1, -1)  # (G, h, 1, d)
        key = self._all("key").view(settings, heads, -1, width)  # (G, h, d, D)
        directions = (query @ key).flatten(0, 2) * (width // heads) ** -0.5  # (G * h, D)
        weights = (x @ directions.T).softmax(dim=1)  # (B, N, G * h), over the patches
        pooled = weights.transpose(1, 2) @ x  # (B, G * h, D)
        pooled = pooled.view(batch, settings, heads, width).permute(1, 2, 0, 3)  # (G, h, B, D)
        value = self._all("value").view(settings, heads, -1, width)
        mixed = pooled @ value.transpose(2, 3)  # (G, h, B, d)
        read = mixed.transpose(1, 2).reshape(settings, batch, width)  # heads side by side
        return torch.baddbmm(self._all("bias")[:, None], read, self._all("weight").mT)

    def _all(self, name: str) -> Tensor:
        """The parameter of that name of every setting: (G, …)."""
        return torch.stack([getattr(probe, name) for probe in self.probes])


def attentive_probe(
    tokens: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    seed: int,
    epochs: int = EPOCHS,
    grid: tuple[Setting, ...] = GRID,
) -> Told:
    """What a probe trained on `tokens` (S, N, D) with `labels` (S,) says of `queries` (Q, N, D).

    No augmentation: the tokens are computed once. Equal input and seed give equal results.
    """
    learning, choosing = _parted(labels, seed)
    num_classes = int(labels.max()) + 1
    sweep = Sweep(len(grid), tokens.shape[-1], num_classes, seed)
    size = min(BATCH_SIZE, math.ceil(len(learning) / FEWEST_BATCHES))
    _train(sweep, tokens, labels, _batches(learning, size, epochs, seed), grid)
    said = _classes(sweep, tokens, choosing)  # (G, choosing)
    right = (said == labels[choosing]).sum(1).tolist()
    best = int(np.argmax(right))  # of equally good ones the first
    everything = torch.arange(len(queries))
    told = _classes(sweep, queries, everything)[best]
    counts = dict(zip(grid, right, strict=True))
    return Told(told, grid[best], size, counts, len(learning), len(choosing))


def _parted(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The indices to learn from and those that choose: a tenth of each class that has two."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in torch.unique(labels):
        members = order[labels[order] == label]
        count = max(1, round(len(members) * CHOOSING_SHARE)) if len(members) > 1 else 0
        chosen.append(members[:count])
    choosing = torch.cat(chosen).sort().values
    if not len(choosing):
        raise UsageError("the attentive probe needs two training pictures of some class")
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[choosing] = False
    return kept.nonzero().squeeze(1), choosing


def _train(
    sweep: Sweep,
    tokens: Tensor,
    labels: Tensor,
    batches: list[Tensor],
    grid: tuple[Setting, ...],
) -> None:
    """Train all settings on the same batches; each has its own rate, decay and clipping."""
    groups = [
        {"params": list(one.parameters()), "weight_decay": setting.weight_decay}
        for one, setting in zip(sweep.probes, grid, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    sweep.train()
    bar = tqdm(batches, desc="attentive probe", unit="step", disable=None)
    for step, batch in enumerate(bar):
        logits = sweep(tokens[batch].float())  # (G, B, K)
        targets = labels[batch].expand(len(grid), -1)
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="sum") / len(batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        for group, setting in zip(optimizer.param_groups, grid, strict=True):
            nn.utils.clip_grad_norm_(group["params"], CLIP)
            fall = (1 + math.cos(math.pi * step / len(batches))) / 2
            group["lr"] = LAST_LR + (setting.lr - LAST_LR) * fall
        optimizer.step()


def _batches(learning: Tensor, size: int, epochs: int, seed: int) -> list[Tensor]:
    """The indices of every batch, each in the order of the file, if the tokens lie in one."""
    random = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(learning), generator=random) for _ in range(epochs)]
    return [learning[part].sort().values for one in orders for part in torch.split(one, size)]


@torch.inference_mode()
def _classes(sweep: Sweep, tokens: Tensor, indices: Tensor) -> Tensor:
    """The likeliest class of each picture by each setting: (G, len(indices))."""
    sweep.eval()
    parts = [sweep(tokens[batch].float()).argmax(-1) for batch in torch.split(indices, BATCH_SIZE)]
    return torch.cat(parts, dim=1)
