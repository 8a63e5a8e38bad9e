"""The losses on held-out sheets against the naive sum."""

import pytest
import torch

from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.talks.tokenizer import train_tokenizer
from aimv2_mllm.evaluation import losses
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig
from aimv2_mllm.objective import patchify, standardise

CONFIG = EncoderConfig(16, 32, 1, 2, image_size=28)


def test_held_out_losses_are_the_naive_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "BATCH_SIZE", 2)
    tokenizer = train_tokenizer([" a red 7 at the top left"], 300)
    torch.manual_seed(0)
    decoder = DecoderConfig(16, 32, 1, 2, vocab_size=len(tokenizer), max_text_tokens=80)
    model = AIMv2ForPreTraining(AIMv2Encoder(CONFIG), decoder).eval()
    sheets = [scenes.scene(0, "heldout", index) for index in range(5)]
    said = losses.held_out_losses(model, tokenizer, Preprocessing(28), sheets, seed=4)

    pixel, flat, caption = [], [], []
    for index, sheet in enumerate(sheets):
        pixels = Preprocessing(28).normalise(scenes.render(sheet, 28)[None])
        prefix = int(scenes.generator(4, "prefix", index).integers(1, 4))
        words = tokenizer(f" {scenes.caption(sheet)}").input_ids[:80]
        patches, guesses = model(
            pixels, torch.tensor([prefix]), torch.tensor([words]), torch.tensor([len(words)])
        )
        targets = standardise(patchify(pixels, 14))[0]
        for patch in range(prefix, 4):
            pixel.append((patches[0, patch - 1] - targets[patch]).square().mean().item())
            flat.append(targets[patch].square().mean().item())
        likely = guesses[0].log_softmax(-1)
        caption += [-likely[t, w].item() for t, w in enumerate([*words, tokenizer.eos_token_id])]
    expected = {"caption_loss": caption, "pixel_loss": pixel, "pixel_loss_flat": flat}
    assert said == pytest.approx({k: sum(v) / len(v) for k, v in expected.items()}, rel=1e-4)
