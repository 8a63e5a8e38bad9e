"""Samples packed without padding: equal to one by one, whichever way attention is computed."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2_mllm.model import packed
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.packed import Packing, prefix_mask
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig
from aimv2_mllm.objective import PreTrainingBatch, PreTrainingObjective

LENGTHS, PREFIXES = [3, 5, 5, 2, 5], [1, 5, 2, 2, 4]
SIZES = [(42, 70), (28, 28), (70, 42), (14, 126), (28, 28)]  # pixels; 15, 4, 15, 9, 4 patches


def native_encoder() -> AIMv2Encoder:
    torch.manual_seed(0)
    return AIMv2Encoder(EncoderConfig(32, 48, 2, 4, image_size=56, native=True))


def images() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, height, width) for height, width in SIZES]


def one_by_one(qkv: Tensor, prefixes: list[int] | None, is_causal: bool) -> Tensor:
    """Attention of each sample alone, by the definition: softmax over what a query may look at."""
    mixed = []
    for place, sample in enumerate(qkv.split(LENGTHS)):
        query, key, value = sample.permute(1, 2, 0, 3)  # 3 of (h, N, d)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        for q in range(len(sample)):
            for k in range(q + 1, len(sample)):
                hidden = is_causal if prefixes is None else k >= prefixes[place]
                if hidden:
                    scores = scores.index_put(
                        (torch.arange(len(scores)), torch.tensor(q), torch.tensor(k)),
                        torch.tensor(float("-inf")),
                    )
        mixed.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(mixed)


def plain_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_q: int,
    max_k: int,
    window_size: tuple[int, int],
) -> Tensor:
    """What torch documents of its CUDA kernel: causal attention is aligned at the last key."""
    assert max_q == query_starts.diff().max()
    assert max_k == key_starts.diff().max()
    mixed = []
    for i in range(len(query_starts) - 1):
        q, k, v = (
            tensor[starts[i] : starts[i + 1]].transpose(0, 1)
            for tensor, starts in ((query, query_starts), (key, key_starts), (value, key_starts))
        )
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        if window_size == (-1, 0):
            mask = mask.tril(k.shape[1] - q.shape[1])
        mixed.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1))
    return torch.cat(mixed)


@pytest.mark.parametrize("way", ["attend", "attend_by_variable_lengths"])
@pytest.mark.parametrize(
    ("prefixes", "is_causal"), [(None, False), (None, True), (PREFIXES, False)]
)
def test_packed_attention_and_its_gradient_equal_those_of_each_sample_alone(
    way: str, prefixes: list[int] | None, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = ModuleType("torch.nn.attention.varlen")  # the real one runs on CUDA only
    kernel.varlen_attn = plain_varlen_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    torch.manual_seed(0)
    qkv = torch.randn(sum(LENGTHS), 3, 2, 8, requires_grad=True)
    weights = torch.randn(sum(LENGTHS), 2, 8)
    expected = one_by_one(qkv, prefixes, is_causal)
    [expected_gradient] = torch.autograd.grad((expected * weights).sum(), qkv)
    packed = getattr(Packing(LENGTHS, prefixes, is_causal=is_causal), way)(qkv)
    [gradient] = torch.autograd.grad((packed * weights).sum(), qkv)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)


def test_neighbours_of_equal_length_share_a_run() -> None:
    assert Packing(LENGTHS).runs == [(3, 1), (5, 2), (2, 1), (5, 1)]
    assert Packing(sorted(LENGTHS)).runs == [(2, 1), (3, 1), (5, 3)]


def test_a_prefix_of_everything_is_attention_without_a_mask() -> None:
    assert prefix_mask(torch.tensor([4]), 4).all()


@pytest.mark.parametrize("prefixes", [None, [1, 4, 7, 9, 2]])
def test_images_of_mixed_sizes_are_encoded_as_one_by_one(prefixes: list[int] | None) -> None:
    encoder, pictures = native_encoder(), images()
    together = encoder.encode_images(pictures, prefixes)
    assert [len(features) for features in together] == [15, 4, 15, 9, 4]
    for place, picture in enumerate(pictures):
        prefix = None if prefixes is None else torch.tensor([prefixes[place]])
        alone = encoder(picture[None], prefix)[0]
        torch.testing.assert_close(together[place], alone, rtol=0, atol=1e-5)


def test_the_gradient_of_mixed_sizes_is_the_sum_of_those_one_by_one() -> None:
    encoder, pictures = native_encoder(), images()
    weights = [torch.randn(len(x), 32) for x in encoder.encode_images(pictures)]
    parameters = list(encoder.parameters())
    losses = [(encoder(x[None])[0] * w).sum() for x, w in zip(pictures, weights, strict=True)]
    expected = torch.autograd.grad(sum(losses), parameters)
    together = zip(encoder.encode_images(pictures), weights, strict=True)
    gradients = torch.autograd.grad(sum((x * w).sum() for x, w in together), parameters)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


def test_an_encoder_with_learned_positions_takes_many_images_of_its_one_size() -> None:
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(32, 48, 2, 4, image_size=56))
    pixels = torch.randn(3, 3, 56, 56)
    together = torch.stack(encoder.encode_images(list(pixels)))
    torch.testing.assert_close(together, encoder(pixels), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"56 x 56 .* image has 42 x 70: resize"):
        encoder.encode_images([pixels[0], torch.zeros(3, 42, 70)])


def test_images_that_cannot_be_packed_are_refused() -> None:
    encoder = native_encoder()
    assert encoder.encode_images([]) == []
    with pytest.raises(ValueError, match=r"42 x 50 .* multiples of 14"):
        encoder.encode_images([torch.zeros(3, 28, 28), torch.zeros(3, 42, 50)])
    with pytest.raises(ValueError, match=r"must be \(batch, 3, height, width\)"):
        encoder.encode_images([torch.zeros(4, 28, 28)])
    with pytest.raises(ValueError, match="1 prefix_lengths for 2 images"):
        encoder.encode_images([torch.zeros(3, 28, 28)] * 2, [1])
    with pytest.raises(ValueError, match=r"prefix_lengths must lie in 1\.\.4, and one is 5"):
        encoder.encode_images([torch.zeros(3, 28, 28)], [5])


def pretraining() -> tuple[AIMv2ForPreTraining, PreTrainingBatch]:
    model = AIMv2ForPreTraining(native_encoder(), DecoderConfig(24, 32, 2, 3, 11, 6))
    batch = PreTrainingBatch(
        pixel_values=images(),
        prefix_length=torch.tensor([1, 3, 14, 5, 2]),
        caption_ids=torch.randint(2, 11, (5, 6)),
        caption_length=torch.tensor([6, 0, 2, 2, 5]),
    )
    return model, batch


def test_pre_training_on_mixed_sizes_is_that_on_each_sample_alone() -> None:
    model, batch = pretraining()
    objective = PreTrainingObjective(patch_size=14, end_token_id=1)
    totals = objective.targets(batch)
    assert totals == {"image": 14 + 1 + 1 + 4 + 2, "text": 7 + 1 + 3 + 3 + 6}
    parameters = list(model.parameters())
    together = objective(model, batch, totals)
    alone = []
    for i in range(5):
        sample = {name: value[i : i + 1] for name, value in batch.items()}
        sample["pixel_values"] = batch["pixel_values"][i][None]
        alone.append(objective(model, sample, totals))
    for part in ("total", "image", "text"):
        expected = sum(getattr(loss, part) for loss in alone)
        torch.testing.assert_close(getattr(together, part), expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(together.total, parameters)
    expected_gradients = torch.autograd.grad(sum(loss.total for loss in alone), parameters)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_every_row_of_mixed_sizes_cannot_be_asked_for() -> None:
    model, batch = pretraining()
    with pytest.raises(ValueError, match="different sizes need scored_only=True"):
        model(**batch)
    batch["prefix_length"][1] = 5
    with pytest.raises(ValueError, match=r"prefix_length must lie in 1\.\.4, and is 5"):
        model(**batch, scored_only=True)


def test_a_torch_without_the_package_around_the_kernel_has_no_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find_spec(name: str) -> None:
        if name.endswith(".varlen"):  # as the real one does where the package is missing
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(packed, "find_spec", find_spec)
    assert not packed.has_varlen()
