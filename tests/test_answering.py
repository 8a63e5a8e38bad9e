"""What is trained on conversations: packed they count as each would alone, no scores are kept."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_mllm import LLMS, SIZES, TOKENIZER, assembled, llm, tower
from torch import Tensor, nn

from aimv2_mllm.data.talks.batches import pack
from aimv2_mllm.data.talks.templates import Encoded
from aimv2_mllm.engine.strategies import keep_inputs
from aimv2_mllm.model import answering as answering_module
from aimv2_mllm.model.answering import Answering, cross_entropy
from aimv2_mllm.model.rows import Rows

IMAGE = TOKENIZER.convert_tokens_to_ids("<image>")
# Tokens and pictures of each conversation: words alone, then one and two pictures of 16 tokens.
TALKS = ((7, 0), (9, 0), (30, 1), (60, 2))
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5, "head_dim": 8},
    "phi3": {"sliding_window": 5},
    "qwen2": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5,
              "use_sliding_window": True},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5,
                    "head_dim": 8},
}  # fmt: skip


def talks(image_tokens: int = 16, shapes: Any = TALKS) -> tuple[list[Encoded], list[Tensor]]:
    """Conversations, and the pixel values of each."""
    random = torch.Generator().manual_seed(3)
    rows, pictures = [], []
    for length, count in shapes:
        ids = torch.randint(10, 200, (length,), generator=random)
        for number in range(count):
            ids[2 + number * (image_tokens + 3) :][:image_tokens] = IMAGE
        learned = (torch.rand(length, generator=random) < 0.5) & (ids != IMAGE)
        rows.append(Encoded(ids.numpy(), torch.where(learned, ids, -100).numpy()))
        pictures.append(torch.randn(count, 3, 56, 56, generator=random))
    return rows, pictures


def packed(rows: list[Encoded], pictures: list[Tensor]) -> dict[str, Any]:
    batch: dict[str, Any] = dict(pack(rows))
    seen = torch.cat(pictures)
    return {**batch, "pixel_values": seen} if len(seen) else batch


def alone(model: Any, rows: list[Encoded], pictures: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What the stock model says of each conversation by itself: scores (L, V), and the loss."""
    scores, total = [], torch.zeros(())
    for row, seen in zip(rows, pictures, strict=True):
        words = {"pixel_values": seen} if len(seen) else {}
        said = model(input_ids=torch.from_numpy(row.ids)[None], use_cache=False, **words).logits[0]
        labels = torch.from_numpy(row.labels)
        total = total + F.cross_entropy(said[:-1], labels[1:], reduction="sum")
        scores.append(said)
    return scores, total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_as_alone(model: Any, rows: list[Encoded], pictures: list[Tensor]) -> Answering:
    """Scores, loss and gradients of the packed conversations are those of each by itself."""
    scores, loss = alone(model, rows, pictures)
    loss.backward()
    expected = gradients(model)
    answers, batch = Answering(model), packed(rows, pictures)
    total = answers(**batch)
    total.backward()
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-5)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        size = max(float(expected[name].abs().max()), 1e-3)
        assert (gradient - expected[name]).abs().max() <= 1e-4 * size, name
    labels = batch.pop("labels")
    with torch.no_grad():
        hidden = answers.hidden(**batch)
    said = model.lm_head(hidden)
    torch.testing.assert_close(said, torch.cat(scores), rtol=1e-4, atol=1e-4)
    assert labels.shape[1] == len(said)
    return answers


@pytest.mark.parametrize("kind", LLMS)
def test_packed_conversations_are_as_alone_in_a_llava_of_every_llm(kind: str) -> None:
    model, _ = assembled(tower(), llm(kind))
    assert type(model) is transformers.LlavaForConditionalGeneration
    assert assert_as_alone(model, *talks()).is_packed


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_window_shorter_than_a_conversation_stays_inside_it(kind: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **WINDOWS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    rows, pictures = talks(shapes=((3, 0), (4, 0), (11, 0), (12, 0)))
    assert assert_as_alone(model, rows, pictures).is_packed


def test_a_llava_of_ours_is_packed_too() -> None:
    model, _ = assembled(tower(), llm(), connector="pixel_shuffle", options={"factor": 2})
    assert model.config.model_type == "aimv2_mllm_llava"
    rows, pictures = talks(4)
    assert assert_as_alone(model, rows, pictures).is_packed


# Attention that is no plain one: scores that are capped, sinks, and states instead of attention.
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "attn_implementation": "eager"},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
                "attn_implementation": "eager"},
    "mamba": {"state_size": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_an_llm_of_another_kind_sees_padded_rows(kind: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **OTHERS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    rows, pictures = talks(shapes=((9, 0), (4, 0), (12, 0)))
    if hasattr(config, "final_logit_softcapping"):
        config.final_logit_softcapping = None  # a Llava has none
    assert not assert_as_alone(model, rows, pictures).is_packed


def test_what_another_conversation_says_changes_no_bit() -> None:
    answers = Answering(assembled(tower(), llm())[0])
    batch = packed(*talks())
    del batch["labels"]
    with torch.no_grad():
        before = answers.hidden(**batch)
        batch["input_ids"][0, 7:16] = torch.arange(20, 29)  # all of the second one
        after = answers.hidden(**batch)
    changed = (before != after).any(1)
    assert changed[7:16].all()
    assert not changed[:7].any()
    assert not changed[16:].any()


def test_conversations_of_any_order_and_length_find_their_way_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for lengths in ([1], [3, 3, 3], [5, 1, 9, 2], [1, 40, 41], [2, 2, 3, 700]):
        query, key, value = (
            torch.randn(sum(lengths), heads, 8, generator=generator) for heads in (4, 2, 2)
        )
        rows = Rows(lengths, torch.device("cpu"))
        got = rows.attend(query, key, value, window=None, scale=None, dropout_p=0.0)
        parts = [x.split(lengths) for x in (query, key, value)]
        for own, *given in zip(got.split(lengths), *parts, strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in given)
            alone = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.testing.assert_close(own, alone[0].transpose(0, 1))
        padded = sum(group.size * group.width for group in rows.groups)
        assert padded <= 1.25 * sum(lengths)


def test_where_conversations_begin_is_made_once_for_all_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Tensor] = []

    def varlen_attn(query: Tensor, key: Tensor, value: Tensor, *words: Any, **_: Any) -> Tensor:
        given.extend(words[:2])
        return query

    kernel = ModuleType("torch.nn.attention.varlen")  # the real one runs on CUDA only
    kernel.varlen_attn = varlen_attn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    rows, tokens = Rows([2, 3], torch.device("cpu")), torch.randn(5, 4, 8)
    for _ in range(3):
        rows._by_variable_lengths(tokens, tokens, tokens, None, None)
    assert {id(starts) for starts in given} == {id(given[0])}
    assert given[0].tolist() == [0, 2, 5]


def test_activations_computed_again_give_the_same_gradients() -> None:
    answers = Answering(assembled(tower(), llm())[0])
    batch = packed(*talks())
    answers(**batch).backward()
    expected = gradients(answers)
    keep_inputs(answers)
    answers(**batch).backward()
    for name, gradient in gradients(answers).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


def test_nothing_to_learn_gives_zero_and_a_gradient_of_zeros() -> None:
    answers, batch = Answering(assembled(tower(), llm())[0]), packed(*talks())
    batch["labels"] = torch.full_like(batch["labels"], -100)
    total = answers(**batch)
    total.backward()
    assert total == 0
    found = gradients(answers)
    assert {n for n in found if "multi_modal_projector" in n}
    assert not any(gradient.any() for gradient in found.values())


def test_how_it_was_trained_is_not_in_what_is_saved(tmp_path: Path) -> None:
    answers = Answering(assembled(tower(), llm())[0])
    answers.llava.save_pretrained(tmp_path)
    assert "packed" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("count", [0, 1, 128, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_the_cross_entropy_is_that_of_all_scores(
    fused: bool, count: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    monkeypatch.setattr(answering_module, "_is_fused", lambda *_: fused)
    torch.manual_seed(0)
    head, targets = nn.Linear(8, 50, bias=bias), torch.randint(50, (count,))
    hidden = torch.randn(count, 8, requires_grad=True)
    F.cross_entropy(head(hidden), targets, reduction="sum").backward()
    expected = [hidden.grad, *(p.grad for p in head.parameters())]
    plain = F.cross_entropy(head(hidden), targets, reduction="sum")
    hidden.grad = None
    head.zero_grad()
    got = cross_entropy(hidden, head, targets)
    (got * 0.5).backward()
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
    for found, own in zip([hidden, *head.parameters()], expected, strict=True):
        torch.testing.assert_close(found.grad, 0.5 * own)


def test_a_frozen_llm_gets_no_gradient_and_the_connector_does() -> None:
    model, _ = assembled(tower(), llm())
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    answers = Answering(model)
    answers(**packed(*talks())).backward()
    assert set(gradients(answers)) == {
        f"llava.model.multi_modal_projector.{n}"
        for n, _ in model.model.multi_modal_projector.named_parameters()
    }
