"""Weights in shards: whole, or refused with the file or tensor that is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_namings import LAYOUTS, assert_same, tiny_encoder
from test_weights import twin
from transformers import Aimv2VisionModel

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model import shards
from aimv2_mllm.model.namings import NAMINGS, rename
from aimv2_mllm.model.weights import load_encoder, save_encoder


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three or more shards, of at most 4 kB but for what is larger alone."""
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 4000)
    save_encoder(tiny_encoder(), tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 3
    return tmp_path


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def test_shards_come_back_bit_for_bit(sharded: Path) -> None:
    assert not (sharded / "model.safetensors").exists()
    assert_same(load_encoder(sharded).state_dict(), tiny_encoder().state_dict())
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    sizes = [tensor.numel() * 4 for tensor in tiny_encoder().state_dict().values()]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_are_written_in_every_layout(sharded: Path, layout: str) -> None:
    save_encoder(load_encoder(sharded), sharded, layout=layout)
    assert_same(load_encoder(sharded).state_dict(), tiny_encoder().state_dict())


def test_transformers_reads_our_shards(sharded: Path) -> None:
    save_encoder(tiny_encoder(), sharded, layout="transformers")
    model, report = Aimv2VisionModel.from_pretrained(sharded, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(model.state_dict(), rename(tiny_encoder().state_dict(), NAMINGS["transformers"]))


def test_we_read_shards_of_transformers(tmp_path: Path) -> None:
    twin(tiny_encoder()).save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 3
    assert_same(load_encoder(tmp_path).state_dict(), tiny_encoder().state_dict())


def test_shards_and_a_single_file_replace_each_other(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    save_encoder(load_encoder(sharded), sharded)
    assert sorted(path.name for path in sharded.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load_encoder(sharded).state_dict(), tiny_encoder().state_dict())


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UsageError, match=f"lacks {lost.name}, which model.safetensors.index.json"):
        load_encoder(sharded)


def test_a_shard_that_is_cut_off_is_named(sharded: Path) -> None:
    cut = sorted(sharded.glob("model-*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UsageError, match=f"{cut.name} is cut off or not a safetensors file"):
        load_encoder(sharded)


def test_an_index_that_promises_a_tensor_which_its_shard_has_not_is_refused(sharded: Path) -> None:
    first = sorted(sharded.glob("model-*.safetensors"))[0].name
    change_index(sharded, lambda index: index.update({"trunk.blocks.9.norm_1.weight": first}))
    said = f"says that trunk.blocks.9.norm_1.weight is in {first}, and it is not"
    with pytest.raises(UsageError, match=said):
        load_encoder(sharded)


def test_a_tensor_that_the_index_does_not_know_is_refused(sharded: Path) -> None:
    change_index(sharded, lambda index: index.pop("trunk.post_trunk_norm.weight"))
    with pytest.raises(UsageError, match=r"has trunk.post_trunk_norm.weight, which .* is nowhere"):
        load_encoder(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor.clone()}, second)
    with pytest.raises(UsageError, match=f"{second.name}: has {name}, which .* in {first.name}"):
        load_encoder(sharded)


def test_an_index_that_names_a_tensor_twice_is_refused(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(
        path.read_text().replace('"weight_map": {', '"weight_map": {"a": "b", "a": "b",')
    )
    with pytest.raises(UsageError, match="it names a twice"):
        load_encoder(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UsageError, match="is not an index of shards"):
        load_encoder(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", 3])
def test_an_index_that_leads_out_of_the_folder_is_refused(sharded: Path, shard: object) -> None:
    change_index(sharded, lambda index: index.update({"a": shard}))  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="is not the name of a file beside it"):
        load_encoder(sharded)


def test_both_forms_of_weights_in_one_folder_are_refused(sharded: Path) -> None:
    save_file({"a": torch.zeros(1)}, sharded / "model.safetensors")
    with pytest.raises(UsageError, match=r"has both model.safetensors and"):
        load_encoder(sharded)
