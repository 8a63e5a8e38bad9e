"""The one pass over labelled pictures: what is kept, what is skipped, what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from aimv2_mllm.data.questions.labelled import LabelledPictures
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.evaluation import examples
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.towers import Tower


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower(
        "aimv2", AIMv2Encoder(EncoderConfig(16, 32, 1, 2, image_size=28)), Preprocessing(28)
    )


def pictures(count: int, broken: tuple[int, ...] = ()) -> LabelledPictures:
    def draw(index: int, side: int) -> Image.Image:
        if index in broken:
            raise UsageError(f"{index}.png: is not a picture")
        random = np.random.default_rng(index)
        return Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8))

    return LabelledPictures([index % 3 for index in range(count)], draw)


def test_features_are_the_mean_over_the_patches_of_each_picture(tower, monkeypatch) -> None:
    monkeypatch.setattr(examples, "BATCH_SIZE", 4)
    found = examples.look(tower, pictures(10), "pictures", keep_tokens=True)
    alone = torch.cat([tower(tower.prepare([pictures(10).open(i, 28)])) for i in range(10)])
    torch.testing.assert_close(found.features, alone.mean(1))
    torch.testing.assert_close(found.tokens, alone.half(), rtol=1e-3, atol=1e-3)
    assert found.labels.tolist() == [index % 3 for index in range(10)]
    assert found.thumbnails.shape == (10, 56 * 56 * 3)
    assert found.thumbnails.dtype == torch.uint8


def test_what_cannot_be_decoded_is_left_out_and_counted(tower, monkeypatch) -> None:
    monkeypatch.setattr(examples, "BATCH_SIZE", 8)
    whole = examples.look(tower, pictures(40), "pictures", keep_tokens=True)
    found = examples.look(tower, pictures(40, (3, 17)), "pictures", keep_tokens=True)
    kept = [index for index in range(40) if index not in (3, 17)]
    assert found.skipped == ["3.png: is not a picture", "17.png: is not a picture"]
    assert torch.equal(found.labels, whole.labels[kept])
    torch.testing.assert_close(found.tokens, whole.tokens[kept], rtol=1e-2, atol=1e-2)


def test_more_than_a_twentieth_is_refused(tower) -> None:
    said = r"pictures: 3 of 40 cannot be decoded, and 5% are the most; the first: 3.png"
    with pytest.raises(UsageError, match=said):
        examples.look(tower, pictures(40, (3, 17, 20)), "pictures")


def test_features_that_are_no_numbers_are_refused() -> None:
    encoder = AIMv2Encoder(EncoderConfig(16, 32, 1, 2, image_size=28))
    torch.nn.init.constant_(encoder.trunk.post_trunk_norm.weight, torch.inf)
    with pytest.raises(RunFailed, match="not finite numbers"):
        examples.look(Tower("aimv2", encoder, Preprocessing(28)), pictures(2), "pictures")


def test_large_tokens_go_to_a_safetensors_file_that_goes_with_the_process(
    tower, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(examples.tempfile, "tempdir", None)
    in_memory = examples.look(tower, pictures(10), "pictures", keep_tokens=True)
    monkeypatch.setattr(examples, "MOST_IN_MEMORY", 100)
    written = []
    real = examples.np.memmap

    def mapped(path, *args, **words):
        written.append(path)
        with safe_open(path, "pt") as file:
            assert file.get_tensor("tokens").shape == (10, 4, 16)
        return real(path, *args, **words)

    monkeypatch.setattr(examples.np, "memmap", mapped)
    in_file = examples.look(tower, pictures(10), "pictures", keep_tokens=True)
    assert len(written) == 1
    assert torch.equal(in_file.tokens, in_memory.tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_the_work(monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(examples, "MOST_IN_MEMORY", 100)
    monkeypatch.setattr(examples.os, "posix_fallocate", full)
    with pytest.raises(UsageError, match=r"no room for 0.0 GiB .*set TMPDIR"):
        examples.room(10, 4, 16)
