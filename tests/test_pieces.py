"""Tensors in pieces: whoever wrote them, anybody reads the rows that are needed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aimv2_mllm.engine.pieces import Piece, Stored, fill, held, to_write, write

WHOLE = torch.arange(21.0).reshape(7, 3)


def cut(folder: Path, *ends: int) -> list[Path]:
    """WHOLE in files of its rows up to each of `ends`; the first holds a scalar too."""
    paths, first = [], 0
    for number, end in enumerate(ends):
        pieces = {"weight": Piece(WHOLE[first:end], first, 7)}
        if number == 0:
            pieces["step"] = Piece(torch.tensor(5.0), 0, 1)
        paths.append(folder / f"{number}.safetensors")
        write(paths[-1], pieces)
        first = end
    return paths


@pytest.mark.parametrize("ends", [(7,), (4, 7), (3, 6, 7), (1, 2, 3, 4, 5, 6, 7)])
def test_any_rows_are_read_from_any_pieces(tmp_path: Path, ends: tuple[int, ...]) -> None:
    stored = Stored(cut(tmp_path, *ends)[::-1])  # in no order
    assert set(stored) == {"weight", "step"}
    assert torch.equal(stored["weight"], WHOLE)
    assert stored["step"] == 5
    assert stored.kind("weight") == ((7, 3), torch.float32)
    assert stored.kind("step") == ((), torch.float32)
    for first in range(8):
        for end in range(first, 8):
            assert torch.equal(stored.rows("weight", first, end), WHOLE[first:end]), (first, end)


def test_a_piece_is_a_file_that_the_library_reads(tmp_path: Path) -> None:
    first, _ = cut(tmp_path, 4, 7)
    assert torch.equal(load_file(first)["weight"], WHOLE[:4])


def test_pieces_that_do_not_make_the_tensor_are_refused(tmp_path: Path) -> None:
    paths = cut(tmp_path, 3, 6, 7)
    for some in (paths[:2], paths[1:], [paths[0], paths[2]], [*paths, paths[1]]):
        with pytest.raises(ValueError, match="the pieces of weight do not make 7 rows"):
            Stored(some)
    write(paths[0], {"weight": Piece(WHOLE[:3], 0, 8)})
    with pytest.raises(ValueError, match="weight has 7 rows in 1"):
        Stored(paths)


def test_what_is_filled_keeps_its_place_and_the_file_its_content(tmp_path: Path) -> None:
    stored = Stored(cut(tmp_path, 4, 7))
    target = torch.zeros(7, 3)
    fill(target, stored, "weight")
    target += 1
    assert torch.equal(stored["weight"], WHOLE)
    count = torch.tensor(0.0)
    fill(count, stored, "step")
    assert count == 5


def test_rank_0_alone_writes_what_every_rank_has() -> None:
    tensors = {"weight": WHOLE, "step": torch.tensor(1.0), "none": torch.empty(0, 4)}
    assert to_write(tensors, is_first=False) == {}
    assert set(to_write(tensors, is_first=True)) == set(tensors)
    assert held(WHOLE) == (WHOLE, 0, 7)
    assert held(tensors["step"]).is_whole
