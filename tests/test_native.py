"""Native resolution as a stage: whole pictures of many sizes, the same however it is run."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import jpeg, write_tar
from PIL import Image
from test_corpus import TOKENIZER, data_of, samples, shards_of
from test_corpus_run import Killed, die_in_step_5, lines
from test_distributed import ended, started
from test_encoder_stages import built, pretrain

from aimv2_mllm import __main__ as command
from aimv2_mllm.data.pairs.batches import EVERYTHING, CaptionBatches, Share, caption_batches
from aimv2_mllm.data.pairs.corpus import Corpus, Skipped
from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.workers import prepared_by_workers
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.towers import load_tower
from aimv2_mllm.model.weights import load_encoder
from aimv2_mllm.recipe.data import CaptionData
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.recipe.schema import Recipe, deciding
from aimv2_mllm.recipe.train import TrainConfig
from aimv2_mllm.runs import run as runs
from aimv2_mllm.stages.table import check_shares

AREAS = (9, 36)
RECIPE = """\
name: native
stages:
  see:
    kind: pretrain
    encoder: {size: aimv2_nano, image_size: 56, native: true, areas: [9, 36]}
    decoder: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2}
    tokenizer: tiny_llm
    data: {seed: 1}
    train: {steps: 7, batch_size: 12, micro_batch_size: 3, lr: 1e-3, log_every: 1,
            checkpoint_every: 3, device: cpu}
"""


def batches_of(
    data: CaptionData | None = None, *, share: Share = EVERYTHING, **train: int
) -> CaptionBatches:
    return caption_batches(
        data or CaptionData(),
        TrainConfig.model_validate(
            {"steps": 9, "batch_size": 12, "micro_batch_size": 3, "lr": 1.0, **train}
        ),
        seed=3,
        tokenizer=TOKENIZER,
        preprocessing=Preprocessing(56, native=True),
        max_text_tokens=40,
        areas=AREAS,
        share=share,
    )


def grids(batch: Any) -> list[tuple[int, int]]:
    """Rows and columns of the pictures of a batch."""
    return [(picture.shape[1] // 14, picture.shape[2] // 14) for picture in batch["pixel_values"]]


def same(ours: Any, theirs: Any) -> bool:
    """Whether two lists of batches hold the same samples in the same order."""
    pairs = list(zip(samples(ours), samples(theirs), strict=True))
    return all(torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in pairs)


def run(folder: Path, output: str, *words: str) -> list[str]:
    said: list[str] = []
    (folder / "recipe.yaml").write_text(RECIPE)
    overrides = [f"output={folder / output}", *(f"stages.see.{word}" for word in words)]
    runs.run(load_recipe(folder / "recipe.yaml", overrides), said.append)
    return said


def run_as_one_of_several(folder: Path, ranks: Ranks) -> None:
    """What each process does that a launcher has started."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    # `run` joins the others itself: a second group is not wanted in the same process.
    runs.run_stage(
        "see",
        (recipe := load_recipe(folder.parent / "recipe.yaml", [f"output={folder}"])).stages["see"],
        runs.Place(recipe, folder, Share(ranks.rank, ranks.size)),
        lambda text: None,
        ranks,
    )


def test_a_mini_batch_has_whole_pictures_of_one_area_and_as_many_patches_as_any_other() -> None:
    batches, sizes, ratios = batches_of(), set(), set()
    assert batches.areas is not None
    for number, batch in enumerate(batch for step in range(6) for batch in batches(step)):
        area, found = batches.areas.mini_batch(number).area, grids(batch)
        assert len(found) == 3 * 16 // area  # 3 pictures of 56 pixels have so many patches
        for (rows, columns), prefix in zip(found, batch["prefix_length"].tolist(), strict=True):
            assert 1 <= prefix < rows * columns <= area
            ratios.add(rows / columns)
        sizes.add(len(found))
    assert (min(sizes), number + 1) == (1, 6 * 4)
    assert max(sizes) >= 4
    assert min(ratios) < 0.6 < 1.6 < max(ratios)


def test_samples_go_on_from_mini_batch_to_mini_batch_and_from_step_to_step() -> None:
    corpus = Corpus(CaptionData(), batches_of().seed, image_size=56, max_text_tokens=40)
    made = [batch for step in range(3) for batch in batches_of()(step)]
    said = [
        TOKENIZER.decode(ids[:length].tolist()).strip()
        for batch in made
        for ids, length in zip(batch["caption_ids"], batch["caption_length"], strict=True)
    ]
    assert said == [corpus.sample(number, Skipped()).caption for number in range(len(said))]
    assert len(said) > 12


def test_ranks_share_the_mini_batches_of_a_step() -> None:
    whole = batches_of()(2)
    for size in (2, 4):
        parts = [batches_of(share=Share(rank, size))(2) for rank in range(size)]
        assert {len(part) for part in parts} == {4 // size}
        assert same([batch for part in parts for batch in part], whole)


def test_workers_hand_over_many_pictures_through_few_files() -> None:
    batches = batches_of(batch_size=480, micro_batch_size=120)
    expected = batches(1)
    assert sum(len(batch["pixel_values"]) for batch in expected) > 250
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
    try:
        made = dict(prepared_by_workers(batches, 0, 4, workers=1, pin=False))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert same(made[1], expected)
    assert type(made[1][0]["pixel_values"]) is list


def test_a_picture_from_a_file_is_whole_and_only_mirrored(tmp_path: Path) -> None:
    pixels = np.zeros((60, 120, 3), dtype=np.uint8)
    pixels[:, :10] = (255, 0, 0)
    pixels[:, -10:] = (0, 0, 255)
    pair = {"a.jpg": jpeg(Image.fromarray(pixels), quality=98), "a.txt": b"two edges"}
    data = data_of(shards_of(write_tar(tmp_path / "a.tar", pair)))
    sides = set()
    for batch in batches_of(data)(0):
        for picture, (rows, columns) in zip(batch["pixel_values"], grids(batch), strict=True):
            assert abs(columns / rows - 2) <= 0.5
            shown = Preprocessing(56).restore(picture[None])[0].astype(int)
            ends = (shown[:, 2].mean(0), shown[:, -3].mean(0))
            names = ["red" if end[0] > end[2] + 40 else "blue" for end in ends]
            assert sorted(names) == ["blue", "red"]
            sides.add(names[0])
    assert sides == {"red", "blue"}


def test_a_run_is_the_same_with_workers_and_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "whole")
    said = lines(tmp_path / "whole")
    assert len(said) == 7
    # What a step has differs, and is counted as it is.
    per_step = np.diff([0, *(line["samples"] for line in said)])
    assert len(set(per_step)) > 1
    expected = [sum(len(b["caption_ids"]) for b in job_batches(tmp_path)(step)) for step in (0, 6)]
    assert [per_step[0], per_step[6]] == expected
    die_in_step_5(monkeypatch)
    with pytest.raises(Killed):
        run(tmp_path, "killed", "data.workers=1")
    monkeypatch.undo()
    assert "continuing from step 3" in run(tmp_path, "killed")
    assert lines(tmp_path / "killed") == said


def job_batches(folder: Path) -> Any:
    recipe = load_recipe(folder / "recipe.yaml", [])
    return runs.STAGES["pretrain"].build(recipe.stages["see"], runs.Place(recipe, folder)).batches


@pytest.mark.slow
def test_two_ranks_train_as_one_does(tmp_path: Path) -> None:
    run(tmp_path, "alone")
    assert ended(started(2, tmp_path / "two", run_as_one_of_several)) == [0, 0]
    for ours, theirs in zip(lines(tmp_path / "two"), lines(tmp_path / "alone"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def test_the_result_says_nothing_of_a_size_and_is_judged_at_the_stages_own(tmp_path: Path) -> None:
    run(tmp_path, "run", "train.steps=1")
    folder = tmp_path / "run" / "see" / "model"
    told = json.loads((folder / "preprocessor_config.json").read_text())
    assert (told["do_resize"], told["do_center_crop"]) == (False, False)
    assert (told["size"], told["crop_size"]) == (None, None)
    assert Preprocessing.load(folder) == Preprocessing(56, native=True)
    assert load_encoder(folder).config.native
    for size, patches in ((None, 16), (84, 36)):
        tower = load_tower(str(tmp_path / "run"), image_size=size)
        assert tower(tower.prepare([Image.new("RGB", (90, 50))])).shape[1] == patches


def test_a_connector_can_be_aligned_to_squares_of_a_native_tower(tmp_path: Path) -> None:
    run(tmp_path, "run", "train.steps=1")
    tower = str(tmp_path / "run" / "see" / "model")
    align = {"kind": "align", "tower": tower, "llm": "tiny_llm"}
    align["train"] = {"steps": 1, "batch_size": 2, "lr": 1e-3}
    plain = {"name": "next", "output": tmp_path / "next", "stages": {"next": align}}
    job = built(runs.Place(Recipe.model_validate(plain), tmp_path / "next"))
    [batch] = job.batches(0)
    assert batch["pixel_values"].shape == (2, 3, 56, 56)
    assert torch.isfinite(job.objective(job.model, batch, job.objective.targets(batch)).total)


def test_learned_positions_are_left_aside_and_all_else_is_kept(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = tiny_run / "pretrain" / "model"
    encoder = {"size": "aimv2_nano", "image_size": 56, "native": True, "areas": [9, 16]}
    train = {"steps": 1, "batch_size": 1, "lr": 1e-3}
    job = built(pretrain(tmp_path, encoder=encoder, start={"encoder": str(folder)}, train=train))
    assert any("its learned positions, for one size" in note for note in job.data.notes)
    model: Any = job.model
    before, after = load_encoder(folder).state_dict(), model.encoder.state_dict()
    assert set(before) - set(after) == {"preprocessor.pos_embed"}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert model.encoder.config.native
    job.objective(model, job.batches(0)[0], job.objective.targets(job.batches(0)[0]))


def test_the_size_of_a_mini_batch_is_part_of_a_native_run() -> None:
    for native in (True, False):
        small, large = (
            {"kind": "pretrain", "encoder": {"native": native}, "train": {"micro_batch_size": n}}
            for n in (4, 8)
        )
        assert (deciding(small) != deciding(large)) == native


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.compile=true", "must have compile false where encoder.native is true"),
        ("train.micro_batch_size=5", "5 does not divide 12"),
        ("train.micro_batch_size=2", "must have a micro_batch_size of at least 3 where"),
        ("encoder.areas=[36, 9]", "must be the least and then the most patches"),
        ("encoder.areas=[5, 9]", "greater than or equal to 6"),
        ("encoder.native=false", "must be left out where native is false"),
    ],
)
def test_impossible_settings_are_told(
    tmp_path: Path, word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    code = command.main(["run", str(tmp_path / "recipe.yaml"), f"stages.see.{word}"])
    assert code == 2
    assert message in capsys.readouterr().err


def test_mini_batches_that_ranks_cannot_share_are_told(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml", [])
    said = "batch_size / micro_batch_size is 4, which 3 processes cannot share evenly; 3 or 6 they"
    with pytest.raises(UsageError, match=said):
        check_shares("see", recipe.stages["see"], 3)
    check_shares("see", recipe.stages["see"], 4)
