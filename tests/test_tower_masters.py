"""Un-freezing an AIMv2 in bfloat16: with weights of float32 behind it every weight learns and all
stays finite; weights that are bfloat16 themselves swallow most of what they are told."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from aimv2_mllm.engine.loop import train
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.recipe.train import TrainConfig

DEPTH = 24  # of AIMv2-L
LR = 2e-6  # at which published recipes train their towers
OUTLIER = 1000.0  # times its neighbours, as single channels of large encoders are


class Loss(NamedTuple):
    total: Tensor


class Classes:
    def targets(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return {"pictures": len(batch["pixel_values"])}

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], totals: dict[str, int]) -> Loss:
        scores = model(batch["pixel_values"]).mean(1)[:, :4].float()  # (B, 4)
        return Loss(nn.functional.cross_entropy(scores, batch["labels"]))


def tower() -> AIMv2Encoder:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    made = AIMv2Encoder(EncoderConfig(**sizes, num_hidden_layers=DEPTH, image_size=28))
    with torch.no_grad():
        made.preprocessor.patchifier.norm.weight[3] *= OUTLIER
    return made


def batches(step: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(step)
    pictures = torch.randn(4, 3, 28, 28, generator=generator)
    return [{"pixel_values": pictures, "labels": torch.arange(4)}]


def moved(model: nn.Module, dtype: torch.dtype) -> float:
    """The share of weights that are not those of a new tower any more; all must be finite."""
    pairs = zip(model.parameters(), tower().to(dtype).parameters(), strict=True)
    told = [(a != b).float() for a, b in pairs]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return float(torch.cat([t.flatten() for t in told]).mean())


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is told that it multiplies bfloat16."""
    for module in ("precision", "loop", "strategies"):
        monkeypatch.setattr(f"aimv2_mllm.engine.{module}.has_bf16", lambda device: True)


def test_every_weight_of_the_tower_learns_in_bf16_and_stays_finite(
    tmp_path: Path, emulated: None
) -> None:
    model = tower()
    config = {"steps": 3, "batch_size": 4, "lr": LR, "precision": "bf16", "device": "cpu"}
    outcome = train(
        model,
        {"tower": list(model.named_parameters())},
        Classes(),
        batches,
        config=TrainConfig.model_validate(config),
        seed=0,
        folder=tmp_path,
        fingerprint="f",
        narrate=lambda text: None,
    )
    assert outcome["steps"] == 3
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert moved(model, torch.float32) > 0.99


def test_weights_of_bf16_would_swallow_the_same_steps() -> None:
    model = tower().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        [batch] = batches(step)
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        optimizer.zero_grad()
        Classes()(model, batch, {"pictures": 4}).total.backward()
        optimizer.step()
    assert moved(model, torch.bfloat16) < 0.2
