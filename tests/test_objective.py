"""The losses against naive loops, one test for each rule of what is scored."""

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig, Predictions
from aimv2_mllm.objective import (
    AnswerObjective,
    ContrastiveObjective,
    ConversationBatch,
    Loss,
    PreTrainingBatch,
    PreTrainingObjective,
    patchify,
    standardise,
)

NUM_PATCHES, VOCABULARY, END = 9, 11, 1


def tiny_model() -> AIMv2ForPreTraining:
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(16, 24, 1, 2, image_size=42))
    return AIMv2ForPreTraining(encoder, DecoderConfig(24, 32, 1, 3, VOCABULARY, 5))


def tiny_batch() -> PreTrainingBatch:
    """Four samples, whose captions are padded with the end token, as SigLIP's tokenizer does."""
    torch.manual_seed(1)
    caption_ids = torch.randint(2, VOCABULARY, (4, 5))
    caption_length = torch.tensor([5, 0, 1, 3])
    caption_ids[torch.arange(5) >= caption_length[:, None]] = END
    return PreTrainingBatch(
        pixel_values=torch.randn(4, 3, 42, 42) * torch.tensor([0.1, 1, 3, 9])[:, None, None, None],
        prefix_length=torch.tensor([1, 4, 8, 5]),
        caption_ids=caption_ids,
        caption_length=caption_length,
    )


def part_of(batch: PreTrainingBatch, start: int, stop: int) -> PreTrainingBatch:
    return {name: tensor[start:stop] for name, tensor in batch.items()}  # type: ignore[return-value]


def naive_loss(predictions: Predictions, batch: PreTrainingBatch, alpha: float) -> list[float]:
    """[total, image, text] by loops over samples, patches and tokens, in numpy's float64."""
    patches, words = (part.detach().double().numpy() for part in predictions)
    pixels = batch["pixel_values"].double().numpy()
    image_terms: list[float] = []
    text_terms: list[float] = []
    for sample in range(len(pixels)):
        for patch in range(int(batch["prefix_length"][sample]), NUM_PATCHES):
            top, left = patch // 3 * 14, patch % 3 * 14
            values = [
                pixels[sample, channel, top + row, left + column]
                for row in range(14)
                for column in range(14)
                for channel in range(3)
            ]
            mean = sum(values) / 588
            variance = sum((value - mean) ** 2 for value in values) / 587
            target = (numpy.array(values) - mean) / (variance + 1e-6) ** 0.5
            image_terms.append(((patches[sample, patch - 1] - target) ** 2).mean())
        length = int(batch["caption_length"][sample])
        caption = [*batch["caption_ids"][sample, :length].tolist(), END]
        for position, word in enumerate(caption):
            logits = words[sample, position]
            text_terms.append(numpy.log(numpy.exp(logits).sum()) - logits[word])
    image, text = sum(image_terms) / len(image_terms), sum(text_terms) / len(text_terms)
    return [text + alpha * image, image, text]


class Recited(nn.Module):
    """Stands for a model: answers with the tensors it was given, whatever the question."""

    def __init__(self, patches: Tensor, words: Tensor) -> None:
        super().__init__()
        self.answer = Predictions(patches, words)

    def forward(self, **_: Any) -> Predictions:
        return self.answer


def one_sample(caption: list[int], length: int, prefix_length: int) -> PreTrainingBatch:
    torch.manual_seed(2)
    return PreTrainingBatch(
        pixel_values=torch.randn(1, 3, 42, 42),
        prefix_length=torch.tensor([prefix_length]),
        caption_ids=torch.tensor([caption]),
        caption_length=torch.tensor([length]),
    )


def sure_of(words: list[int]) -> Tensor:
    """Logits (Q, V) that put all probability on `words`."""
    return torch.nn.functional.one_hot(torch.tensor(words), VOCABULARY).float() * 100


@pytest.mark.parametrize("alpha", [0.4, 0.0, 2.0])
def test_the_loss_equals_a_naive_loop_over_everything(alpha: float) -> None:
    model, batch = tiny_model(), tiny_batch()
    objective = PreTrainingObjective(patch_size=14, end_token_id=END, alpha=alpha)
    loss = objective(model, batch, objective.targets(batch))
    expected = naive_loss(model(**batch), batch, alpha)
    assert [part.item() for part in loss] == pytest.approx(expected, rel=1e-5)


def test_alpha_is_the_papers_unless_said() -> None:
    assert PreTrainingObjective(14, END).alpha == 0.4


def test_the_targets_are_the_patches_outside_the_prefix_and_the_words_with_their_end() -> None:
    targets = PreTrainingObjective(14, END).targets(tiny_batch())
    assert targets == {"image": 8 + 5 + 1 + 4, "text": 6 + 1 + 2 + 4}
    assert all(type(count) is int for count in targets.values())


def test_the_first_scored_patch_is_the_first_outside_the_prefix() -> None:
    batch, objective = one_sample([3, 4], 2, prefix_length=7), PreTrainingObjective(14, END)
    right = standardise(patchify(batch["pixel_values"], 14)[0, 7:])  # patches 7 and 8
    totals = objective.targets(batch)
    loss = objective(Recited(right, sure_of([3, 4, END])), batch, totals)
    assert [part.item() for part in loss] == pytest.approx([0, 0, 0], abs=1e-6)
    one_early = standardise(patchify(batch["pixel_values"], 14)[0, 6:8])
    assert objective(Recited(one_early, sure_of([3, 4, END])), batch, totals).image > 1


def test_the_model_that_repeats_the_word_it_reads_is_wrong() -> None:
    batch, objective = one_sample([3, 4], 2, prefix_length=8), PreTrainingObjective(14, END)
    patch, totals = torch.zeros(1, 588), objective.targets(batch)
    assert objective(Recited(patch, sure_of([3, 4, END])), batch, totals).text < 1e-6
    assert objective(Recited(patch, sure_of([0, 3, 4])), batch, totals).text > 99


def test_the_end_is_learned_once_though_padding_has_the_same_id() -> None:
    batch, objective = one_sample([3, END, END, END], 1, 8), PreTrainingObjective(14, END)
    assert objective.targets(batch)["text"] == 2
    patch, totals = torch.zeros(1, 588), objective.targets(batch)
    assert objective(Recited(patch, sure_of([3, END])), batch, totals).text < 1e-6
    without_end = objective(Recited(patch, sure_of([3, 5])), batch, totals)
    assert without_end.text == pytest.approx(50, rel=1e-3)  # one of two tokens is wrong by 100


def test_the_end_follows_a_caption_that_fills_the_row() -> None:
    batch, objective = one_sample([3, 4], 2, 8), PreTrainingObjective(14, END)
    words, totals = sure_of([3, 4, END]), objective.targets(batch)
    assert objective(Recited(torch.zeros(1, 588), words), batch, totals).text < 1e-6


def test_the_values_of_a_patch_go_by_row_then_column_then_channel() -> None:
    pixels = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)  # patches of 2 x 2: 2 rows, 3 columns
    patches = patchify(pixels, 2)
    assert patches.shape == (2, 6, 12)
    top, left = 2, 4  # of the last patch
    assert patches[1, 5].tolist() == [
        pixels[1, channel, top + row, left + column].item()
        for row in range(2)
        for column in range(2)
        for channel in range(3)
    ]


def test_a_patch_is_standardised_by_its_own_mean_and_unbiased_variance() -> None:
    patches = torch.tensor([[1.0, 2.0, 3.0, 6.0], [100.0, 200.0, 300.0, 600.0]])
    variance = (4 + 1 + 0 + 9) / 3  # not / 4
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / variance**0.5
    assert standardise(patches).tolist() == [pytest.approx(expected.tolist(), abs=1e-5)] * 2
    flat = standardise(torch.full((1, 4), 7.0))
    assert flat.tolist() == [[0, 0, 0, 0]]
    faint = standardise(torch.tensor([[-1e-3, 1e-3]]))  # variance 2e-6, made 3e-6
    assert faint[0, 1].item() == pytest.approx(1e-3 / 3e-6**0.5, rel=1e-4)


def test_micro_batches_of_any_cut_add_up_to_the_whole_batch() -> None:
    model, batch, objective = tiny_model(), tiny_batch(), PreTrainingObjective(14, END)
    totals = objective.targets(batch)
    whole = objective(model, batch, totals)
    whole.total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    parts: list[Loss] = []
    for start, stop in ((0, 1), (1, 4)):  # of unequal numbers of targets
        parts.append(objective(model, part_of(batch, start, stop), totals))
        parts[-1].total.backward()
    for index in range(3):
        assert sum(part[index].item() for part in parts) == pytest.approx(whole[index].item())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_scored_patch_still_learns_its_words() -> None:
    model, objective = tiny_model(), PreTrainingObjective(14, END)
    batch = one_sample([3, 4], 2, prefix_length=9)
    loss = objective(model, batch, objective.targets(batch))
    assert loss.image == 0
    assert loss.total == loss.text
    assert torch.isfinite(loss.total)


class Answers(nn.Module):
    """Called as what is trained on conversations is; it gives their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, Any] = {}

    def forward(self, **asked: Any) -> Tensor:
        self.asked = asked
        return torch.tensor(6.0)


def conversations() -> ConversationBatch:
    return ConversationBatch(
        lengths=torch.tensor([4, 3]),
        input_ids=torch.tensor([[2, 3, 4, 5, 6, 7, 8]]),
        position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        labels=torch.tensor([[-100, -100, 4, 5, -100, -100, 8]]),
    )


def test_the_answer_loss_is_the_models_sum_over_the_steps_targets() -> None:
    model, objective, batch = Answers(), AnswerObjective(), conversations()
    assert objective.targets(batch) == {"text": 3}
    loss = objective(model, batch, {"text": 12})
    assert loss.total.item() == loss.text.item() == 0.5
    assert model.asked == batch
    batch["labels"] = torch.full((1, 7), -100)
    assert objective.targets(batch) == {"text": 0}
    assert torch.isfinite(objective(model, batch, {"text": 0}).total)


def test_without_captions_only_patches_are_learned_and_words_change_nothing() -> None:
    model, batch = tiny_model(), tiny_batch()
    objective = PreTrainingObjective(14, END, alpha=0.4, text_weight=0.0)
    totals = objective.targets(batch)
    assert totals["text"] == 0
    loss = objective(model, batch, totals)
    both = PreTrainingObjective(14, END, alpha=0.4)
    torch.testing.assert_close(loss.image, both(model, batch, both.targets(batch)).image)
    assert loss.text == 0
    torch.testing.assert_close(loss.total, 0.4 * loss.image)
    other = {**batch, "caption_ids": (batch["caption_ids"] + 1) % VOCABULARY}
    assert torch.equal(objective(model, other, totals).total, loss.total)
    loss.total.backward()
    assert model.word_head.weight.grad is not None  # it takes part, so that ranks agree
    assert model.word_head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("text_weight", [1.0, 0.5])
def test_without_pictures_only_words_are_learned(text_weight: float) -> None:
    model, batch = tiny_model(), tiny_batch()
    batch["prefix_length"] = torch.full((4,), NUM_PATCHES)  # bidirectional: no patch is left
    objective = PreTrainingObjective(14, END, alpha=0.0, text_weight=text_weight)
    totals = objective.targets(batch)
    assert totals["image"] == 0
    loss = objective(model, batch, totals)
    torch.testing.assert_close(loss.total, text_weight * loss.text)
    whole = model.encoder(batch["pixel_values"])
    masked = model.encoder(batch["pixel_values"], batch["prefix_length"])
    torch.testing.assert_close(whole, masked)


class Pairs(nn.Module):
    """A model of two towers whose logits are known: what is asked of it, and what it answers."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.asked = torch.empty(0)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        self.asked = input_ids
        return self.logits


def test_pairs_are_told_apart_both_ways() -> None:
    batch = tiny_batch()
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) * 3
    model, objective = Pairs(logits), ContrastiveObjective(END)
    assert objective.targets(batch) == {"pairs": 4}
    loss = objective(model, batch, {"pairs": 8})  # half of a step's pairs
    table = logits.double().numpy()
    text = sum(-table[i, i] + numpy.log(numpy.exp(table[i]).sum()) for i in range(4)) / 8
    image = sum(-table[i, i] + numpy.log(numpy.exp(table[:, i]).sum()) for i in range(4)) / 8
    assert loss.text.item() == pytest.approx(text, rel=1e-5)
    assert loss.image.item() == pytest.approx(image, rel=1e-5)
    assert loss.total.item() == pytest.approx((text + image) / 2, rel=1e-5)


def test_every_text_of_a_pair_has_its_end_behind_its_last_word() -> None:
    batch, model = tiny_batch(), Pairs(torch.zeros(4, 4))
    ContrastiveObjective(END)(model, batch, {"pairs": 4})
    for row, length in enumerate(batch["caption_length"].tolist()):
        assert model.asked[row, length] == END
        assert torch.equal(model.asked[row, :length], batch["caption_ids"][row, :length])
