"""The attentive probe against the plain rendering of its words, and that it never peeks."""

import pytest
import torch
import torch.nn.functional as F

from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation import attentive
from aimv2_mllm.evaluation.attentive import GRID, Setting, Sweep, attentive_probe


def plain_logits(probe, tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Batch norm, keys, values, attention of one query, linear: with every key and value made."""
    batch, count, width = tokens.shape
    x = F.batch_norm(tokens.flatten(0, 1), None, None, training=True, eps=1e-6).view_as(tokens)
    key, value = (
        (x @ weight.T).view(batch, count, num_heads, -1).transpose(1, 2)
        for weight in (probe.key, probe.value)
    )
    query = probe.query.view(1, num_heads, 1, -1).expand(batch, -1, -1, -1)
    pooled = F.scaled_dot_product_attention(query, key, value)  # (B, h, 1, d)
    return pooled.transpose(1, 2).reshape(batch, width) @ probe.weight.T + probe.bias


def test_keys_and_values_that_are_never_made_change_nothing(monkeypatch) -> None:
    monkeypatch.setattr(attentive, "HEAD_WIDTH", 8)
    sweep = Sweep(3, 24, 5, seed=0)
    assert sweep.num_heads == 3
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sweep.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random))
    tokens = torch.randn(6, 7, 24, generator=random)
    said = sweep(tokens)
    for one, probe in zip(said, sweep.probes, strict=True):
        torch.testing.assert_close(one, plain_logits(probe, tokens, 3), rtol=1e-4, atol=1e-4)


def test_all_settings_begin_alike_and_the_number_of_heads_divides_the_width() -> None:
    sweep = Sweep(2, 200, 3, seed=1)
    assert sweep.num_heads == 2  # 200 // 64 = 3 does not divide 200
    for first, second in zip(*(one.parameters() for one in sweep.probes), strict=True):
        assert torch.equal(first, second)


def test_the_grid_is_the_papers() -> None:
    assert GRID[0] == Setting(5e-5, 0.05)
    assert GRID[-1] == Setting(2e-3, 0.1)
    assert len(GRID) == 12


def examples(count: int, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    tokens = torch.randn(count, 4, width, generator=random)
    tokens[:, :, :3] += 2 * torch.eye(3)[labels][:, None]
    return tokens.half(), labels


def test_a_setting_trained_among_others_is_what_it_is_alone() -> None:
    tokens, labels = examples(90)
    queries, _ = examples(60)
    together = attentive_probe(tokens, labels, queries, seed=0, epochs=3)
    for setting in (GRID[0], GRID[-1]):
        alone = attentive_probe(tokens, labels, queries, seed=0, epochs=3, grid=(setting,))
        assert alone.right[setting] == together.right[setting]
        if setting == together.chosen:
            assert torch.equal(alone.classes, together.classes)


def test_the_setting_is_chosen_by_training_pictures_that_were_not_trained_on(monkeypatch) -> None:
    tokens, labels = examples(90)
    trained, asked = set[int](), []
    real, classes = attentive._batches, attentive._classes

    def spied(learning, *rest):
        trained.update(learning.tolist())
        return real(learning, *rest)

    def overheard(sweep, seen, indices):
        asked.append((seen is tokens, set(indices.tolist())))
        return classes(sweep, seen, indices)

    monkeypatch.setattr(attentive, "_batches", spied)
    monkeypatch.setattr(attentive, "_classes", overheard)
    told = attentive_probe(tokens, labels, tokens[:5], seed=0, epochs=1)
    assert (told.num_learned, told.num_choosing) == (81, 9)
    assert len(trained) == 81
    [(of_training, choosing), (of_test, _)] = asked
    assert (of_training, of_test) == (True, False)
    assert choosing == set(range(90)) - trained
    held = [index for index in range(90) if index not in trained]
    assert sorted(labels[held].tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    best = max(told.right.values())
    assert told.chosen == next(one for one in GRID if told.right[one] == best)


def test_what_is_asked_does_not_change_what_is_learned() -> None:
    tokens, labels = examples(60)
    queries, _ = examples(30)
    first = attentive_probe(tokens, labels, queries, seed=0, epochs=2)
    second = attentive_probe(tokens, labels, queries[:4], seed=0, epochs=2)
    assert second.right == first.right
    assert torch.equal(second.classes, first.classes[:4])


def test_each_setting_has_its_own_falling_rate_and_clipping(monkeypatch) -> None:
    seen, clipped = [], []
    real = torch.nn.utils.clip_grad_norm_

    def clip(parameters, largest):
        clipped.append((len(parameters), largest))
        return real(parameters, largest)

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    tokens, labels = examples(90)
    attentive_probe(tokens, labels, tokens[:1], seed=0, epochs=10)
    assert clipped == [(5, 3.0)] * 12 * 90
    assert seen[0] == pytest.approx([one.lr for one in GRID])
    assert all(1e-5 <= rate < 1.1e-5 for rate in seen[-1])
    assert len(seen) == 90  # of the 81 pictures to learn from a batch is the tenth part


def test_classes_of_one_picture_each_leave_nothing_to_choose_by() -> None:
    with pytest.raises(UsageError, match="two training pictures"):
        attentive_probe(torch.zeros(3, 2, 4), torch.arange(3), torch.zeros(1, 2, 4), seed=0)
