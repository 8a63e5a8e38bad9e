"""Adapters merged layer by layer, without a second LLM in memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_mllm import TOKENIZER, llm, tower

from aimv2_mllm.model import adapting, mllm
from aimv2_mllm.model.merging import merged_aside, share_unquantised
from aimv2_mllm.model.quantising import is_quantised, quantise


def adapted(model: Any, **words: Any) -> Any:
    made = adapting.adapt(model, ["q_proj", "down_proj"], {"r": 2, "lora_alpha": 4, **words})
    torch.manual_seed(2)
    for name, parameter in made.named_parameters():
        if adapting.ADDED in name:
            parameter.data.normal_()
    return made


@pytest.mark.parametrize("words", [{}, {"use_dora": True}, {"use_rslora": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_aside_is_merged_by_peft_to_the_bit(
    words: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = mllm.assemble(tower(), llm(), TOKENIZER)
    before = model.model.language_model.layers[1].mlp.down_proj.weight.detach().clone()
    ours, theirs = (adapted(copy.deepcopy(model), **words) for _ in range(2))
    whole = merged_aside(ours, tmp_path, dtype).to(dtype).state_dict()
    expected = theirs.merge_and_unload().to(dtype).state_dict()
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], expected[name]) for name in expected)
    moved = whole["model.language_model.layers.1.mlp.down_proj.weight"]
    assert not torch.equal(moved, before.to(dtype))
    assert not list(tmp_path.iterdir())


def test_what_is_not_quantised_is_shared_and_not_copied() -> None:
    held, full = (mllm.assemble(tower(), llm(), TOKENIZER) for _ in range(2))
    quantise(held.model.language_model, "nf4")
    before = {name: p.data_ptr() for name, p in full.named_parameters()}
    share_unquantised(held, full)
    have = dict(held.named_parameters())
    assert any(is_quantised(p) for p in have.values())
    for name, parameter in full.named_parameters():
        wanted = before[name] if is_quantised(have[name]) else have[name].data_ptr()
        assert parameter.data_ptr() == wanted, name
