"""Pictures in their own shape, from a recipe to a chat, for a tower that takes any size."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_any_tower import native
from tiny_towers import saved

from aimv2_mllm.chat.chat import answer, load_model
from aimv2_mllm.chat.prompts import pixels_of
from aimv2_mllm.data.pictures.own_shapes import OwnShapes
from aimv2_mllm.engine.accelerators import accelerator
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model import mllm
from aimv2_mllm.place import Place
from aimv2_mllm.planning.plan import plan
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.runs.run import run
from aimv2_mllm.stages.table import STAGES, check_inputs

# Width and height of the photos; their patches of 14 px: at most 16, multiples of 2.
SHAPES = [(120, 30), (40, 80), (56, 56), (90, 100)]


def photos(folder: Path) -> list[Image.Image]:
    folder.mkdir()
    random, pictures = np.random.default_rng(0), []
    with (folder / "questions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "question", "answer"])
        for number, (width, height) in enumerate(SHAPES):
            noise = random.integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((width, height))
            picture.save(folder / f"{number}.png")
            pictures.append(picture)
            rows.writerow([f"{number}.png", f"What is {number}?", f"It is {number}."])
        rows.writerow(["", "What is no picture?", "A word."])
    return pictures


def recipe(folder: Path, tower: Path, **data: Any) -> Recipe:
    align = {
        "kind": "align",
        "tower": str(tower),
        "llm": "tiny_llm",
        "connector": {"name": "pixel_shuffle", "factor": 2},
        "data": {
            "sources": [{"kind": "questions", "folder": str(folder / "photos")}],
            "image_aspect": "native",
            **data,
        },
        "train": {"steps": 2, "batch_size": 5, "lr": 1e-2, "log_every": 1},
    }
    return Recipe.model_validate(
        {"name": "native", "output": folder / "run", "stages": {"align": align}}
    )


@pytest.fixture
def made(tmp_path: Path) -> tuple[Recipe, list[Image.Image]]:
    pictures = photos(tmp_path / "photos")
    return recipe(tmp_path, native(tmp_path / "tower")), pictures


def built(made: Recipe) -> Any:
    return STAGES["align"].build(made.stages["align"], Place(made, made.output))


def test_each_picture_has_the_tokens_of_its_own_grid(
    made: tuple[Recipe, list[Image.Image]],
) -> None:
    job = built(made[0])
    [batch] = job.batches(0)
    # 14 px: 120 x 30 becomes 8 x 2 patches, 40 x 80 2 x 4, the others 4 x 4; a token of 2 x 2.
    sizes = sorted(map(tuple, batch["image_sizes"].tolist()))
    assert sizes == sorted([(28, 112), (56, 28), (56, 56), (56, 56)])
    token = job.batches.writer.image_token_id
    assert int((batch["input_ids"] == token).sum()) == 4 + 2 + 4 + 4
    assert batch["pixel_values"].shape == (4, 3, 56, 112)


def test_packed_shapes_learn_what_each_learns_alone(
    made: tuple[Recipe, list[Image.Image]],
) -> None:
    job = built(made[0])
    single = trained_by(made[0], micro_batch_size=1)
    [together], alone = job.batches(0), built(single).batches(0)
    assert len(alone) == 5
    with torch.no_grad():
        whole, *parts = [job.model(**_inputs(batch)) for batch in (together, *alone)]
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=1e-5, atol=1e-5)


def trained_by(made: Recipe, **train: Any) -> Recipe:
    plain = made.model_dump(mode="json")
    plain["stages"]["align"]["train"] |= train
    return Recipe.model_validate(plain)


def _inputs(batch: Any) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if not k.startswith("skipped")}


def test_a_chat_sees_the_pixels_of_training(made: tuple[Recipe, list[Image.Image]]) -> None:
    plan_, pictures = made
    done = run(plan_, lambda _: None)
    bot = load_model(done)
    shapes = OwnShapes.of(bot.processor)
    preprocessing, _ = mllm.pictures_of(bot.processor)
    for number, picture in enumerate(pictures):
        content = (done.parent / "photos" / f"{number}.png").read_bytes()
        trained = preprocessing.normalise(shapes.pixels(content)[None])
        seen = pixels_of(bot.processor, [picture], bot.data)
        assert tuple(seen["image_sizes"][0]) == trained.shape[-2:]
        torch.testing.assert_close(seen["pixel_values"], trained, atol=1e-5, rtol=0)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert isinstance(answer(bot, talk, [pictures[0]], max_new_tokens=3), str)


def test_a_tower_for_squares_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    saved("siglip", tmp_path / "tower")
    fixed = recipe(tmp_path, tmp_path / "tower")
    with pytest.raises(UsageError, match="image_aspect: native is for towers of native"):
        check_inputs(Place(fixed, tmp_path / "run"))
    with pytest.raises(UsageError, match="squares of 28 px: say pad or crop"):
        built(fixed)


def test_a_plan_counts_squares(made: tuple[Recipe, list[Image.Image]]) -> None:
    found = plan(made[0], accelerator(None), 1)
    assert not found.problems
    assert found.stages[0].shapes["pixel_values"][1:] == (3, 56, 56)


def test_their_features_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be null with image_aspect native"):
        recipe(tmp_path, tmp_path / "tower", features={"folder": str(tmp_path / "features")})
