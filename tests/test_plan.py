"""A plan says what training would do: the same parts, operations and memory, and every problem."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPES, tiny_recipe

from aimv2_mllm import __main__ as cli
from aimv2_mllm.engine.accelerators import ACCELERATORS, Accelerator, accelerator
from aimv2_mllm.engine.flops import FlopCounter
from aimv2_mllm.engine.rehearsal import rehearse
from aimv2_mllm.engine.strategies import blocks, keep_inputs
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.answering import CHUNKS, UNSUPERVISED, Answering
from aimv2_mllm.model.shapes import only_shapes
from aimv2_mllm.objective import AnswerObjective
from aimv2_mllm.place import Place
from aimv2_mllm.planning.plan import plan
from aimv2_mllm.planning.planned import Memory, StagePlan
from aimv2_mllm.planning.stand_ins import grown
from aimv2_mllm.planning.text import limits, written
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.stages.table import STAGES

LARGE = Accelerator("large", 10**12, True, 1e15, 1e14)
PROCESSOR = replace(LARGE, name="a processor", has_bf16=False, is_shared=True)


def memory_of(folder: Path, *overrides: str, devices: int = 1) -> Memory:
    """What a plan says of the memory of the quickstart's first stage."""
    recipe = tiny_recipe(folder, *overrides)
    alone = recipe.model_copy(update={"stages": {"pretrain": recipe.stages["pretrain"]}})
    found = plan(alone, LARGE, devices)
    assert not found.problems
    [stage] = found.stages
    assert stage.memory
    return stage.memory


def test_a_plan_has_the_parts_and_operations_of_the_run(tiny_run: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_run)
    found = plan(tiny_recipe(tmp_path / "new"), LARGE, 1)
    assert not found.problems
    stages = found.stages
    assert [stage.name for stage in stages] == list(recipe.stages)
    for stage in stages:
        record = json.loads((tiny_run / stage.name / "model" / "stage.json").read_text())
        assert sorted(map(list, stage.table)) == sorted(record["parts"])
        job = STAGES[stage.kind].build(recipe.stages[stage.name], Place(recipe, tiny_run))
        [batch] = job.batches(0)
        with FlopCounter() as counter:
            job.objective(job.model.train(), batch, job.objective.targets(batch))
        assert stage.flops * 4 == counter.flops
    assert not (tmp_path / "new").exists()


def most_bytes(model: torch.nn.Module, objective: Any, batch: dict[str, Any]) -> int:
    """The most that forward and backward allocate, as torch's profiler has it.

    On one thread: attention's kernel has a scratch for each, which beside this small model counts.
    The larger of two, for the profiler may lose an event.
    """
    from torch.profiler import ProfilerActivity, profile

    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(2):
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            objective(model, batch, objective.targets(batch)).total.backward()
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        found.append(most)
    torch.set_num_threads(threads)
    return max(found)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["pretrain", "align", "tune"])
def test_memory_is_what_is_allocated(
    tiny_run: Path, tmp_path: Path, name: str, checkpointing: bool
) -> None:
    recipe = tiny_recipe(tiny_run)
    stage, where = recipe.stages[name], Place(recipe, tiny_run)
    job = STAGES[stage.kind].build(stage, where)
    [batch] = job.batches(0)
    with only_shapes():
        shapes = STAGES[stage.kind].build(stage, where)
    footprint = rehearse(
        shapes.model.train(),
        shapes.objective,
        grown(dict(batch), 4, None),
        half=False,
        checkpointing=checkpointing,
        words=512,
        gradients_before=False,
    )
    model = job.model.train()
    if checkpointing:
        keep_inputs(model)
    pixels = batch["pixel_values"].nbytes  # which lie there before
    measured = most_bytes(model, job.objective, batch) + pixels
    assert footprint.activations + footprint.gradients == pytest.approx(measured, rel=0.15)
    assert 0 <= footprint.logits < footprint.activations
    assert not any("forward" in vars(block) for block in blocks(shapes.model))


def test_scores_that_torch_computes_out_of_sight_are_counted() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def answering() -> Answering:
        sizes: Any = {"vocab_size": 20_000, "hidden_size": 16, "intermediate_size": 32}
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        made = Answering(LlamaForCausalLM(LlamaConfig(**sizes)))
        made.requires_grad_(False).llava.model.norm.requires_grad_(True)
        return made

    places = torch.arange(200)[None]
    batch = {"lengths": torch.tensor([200]), "input_ids": places, "position_ids": places}
    batch["labels"] = places.where(places > 0, UNSUPERVISED)
    with torch.device("meta"):
        shapes = answering()
    shapes.chunk = CHUNKS["cpu"]
    words: Any = {"half": False, "checkpointing": False, "gradients_before": False}
    footprint = rehearse(shapes, AnswerObjective(), batch, words=20_000, **words)
    found = most_bytes(answering(), AnswerObjective(), batch)
    assert footprint.activations + footprint.gradients == pytest.approx(found, rel=0.1)
    assert footprint.logits >= 128 * 20_000 * 4
    assert footprint.small < footprint.logits  # they have pages of their own


@pytest.mark.parametrize("name", ["align", "tune"])
def test_a_micro_batch_by_tokens_is_planned_full(tiny_run: Path, tmp_path: Path, name: str) -> None:
    def words(tokens: int) -> list[str]:
        own = ["train.batch_size=32", f"train.micro_batch_tokens={tokens}", "data.max_tokens=120"]
        return [f"stages.{name}.{word}" for word in own]

    def planned(tokens: int) -> tuple[StagePlan, Memory]:
        found = plan(tiny_recipe(tmp_path / "new", *words(tokens)), LARGE, 1)
        assert not found.problems
        [stage] = [stage for stage in found.stages if stage.name == name]
        assert stage.memory
        assert any(f"a micro-batch of {tokens:,} tokens" in note for note in stage.notes)
        assert stage.shapes["input_ids"] == (1, tokens)
        return stage, stage.memory

    (few, small), (many, large) = planned(200), planned(800)
    assert few.num_micro_batches >= 3 * many.num_micro_batches > 0
    assert few.flops == pytest.approx(many.flops, rel=0.05)  # but for padding in attention
    # What training allocates for the fullest of its own.
    recipe = tiny_recipe(tiny_run, *words(800))
    stage, where = recipe.stages[name], Place(recipe, tiny_run)
    job = STAGES[stage.kind].build(stage, where)
    batch = max(job.batches(0), key=lambda batch: batch["input_ids"].shape[1])
    share = batch["input_ids"].shape[1] / 800
    assert 0.7 < share <= 1
    measured = most_bytes(job.model.train(), job.objective, batch) + batch["pixel_values"].nbytes
    assert large.activations + large.gradients == pytest.approx(measured / share, rel=0.2)
    assert small.activations < large.activations / 2


def test_every_other_kind_of_stage_is_planned_too(tiny_run: Path, tmp_path: Path) -> None:
    from test_encoder_stages import lit, pretrain

    native = {"size": "aimv2_nano", "image_size": 56, "native": True, "areas": [6, 16]}
    train = {"steps": 2, "batch_size": 8, "micro_batch_size": 4, "lr": 1e-3}
    language = load_recipe(RECIPES / "tiny_llm.yaml", [f"output={tmp_path / 'llm'}"])
    for recipe in (
        lit(tiny_run, tmp_path / "lit").recipe,
        pretrain(tmp_path / "native", encoder=native, train=train).recipe,
        language,
    ):
        found = plan(recipe, LARGE, 1)
        assert not found.problems
        [stage] = found.stages
        assert stage.memory
        assert stage.memory.activations > 0
        assert stage.flops > 0
        assert sum(count for _, count, trained in stage.table if trained) > 10_000


def test_sharding_divides_what_is_kept_and_copies_keep_all(tmp_path: Path) -> None:
    alone = memory_of(tmp_path)
    copied = memory_of(tmp_path, devices=4)
    halves = ("stages.pretrain.train.strategy=fsdp2", "stages.pretrain.train.precision=bf16")
    sharded = memory_of(tmp_path, *halves, devices=4)
    assert copied.weights == alone.weights
    assert copied.gradients == alone.weights == alone.optimiser // 2
    assert sharded.weights == alone.weights // 4
    assert sharded.optimiser == alone.optimiser // 4


def test_what_is_loaded_is_told_of_the_first_process_or_where_it_is_quantised_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    words = ("stages.tune.train.strategy=fsdp2", "stages.tune.train.precision=bf16")

    def loaded(*more: str) -> int:
        found = plan(tiny_recipe(tmp_path, *words, *more), LARGE, 4)
        [tune] = [stage for stage in found.stages if stage.name == "tune"]
        trained = sum(count for _, count, is_trained in tune.table if is_trained)
        frozen = sum(count for _, count, is_trained in tune.table if not is_trained)
        assert tune.loaded == 4 * trained + 2 * frozen
        return tune.loaded

    assert loaded() == loaded("stages.tune.quantise=nf4")
    recipe, output = str(RECIPES / "quickstart.yaml"), f"output={tmp_path / 'run'}"
    code, out, err = dry_run(capsys, recipe, output, *words, "--devices", "4")
    assert (code, err) == (0, "")
    said = f"while it loads, {loaded() / 2**20:.1f} MiB of its machine's memory for "
    assert f"{said}the first process alone\n" in out
    words = (*words, "stages.tune.quantise=nf4")
    code, out, err = dry_run(capsys, recipe, output, *words, "--devices", "4")
    assert (code, err) == (0, "")
    assert f"{said}each process, {loaded() / 2**18:.1f} MiB for 4\n" in out


def test_half_precision_and_checkpointing_take_less(tmp_path: Path) -> None:
    def activations(*words: str) -> int:
        more = ["stages.pretrain.train.batch_size=64", "stages.pretrain.encoder.image_size=112"]
        return memory_of(tmp_path, *more, *words).activations

    plain = activations()
    assert activations("stages.pretrain.train.activation_checkpointing=true") < plain / 2
    assert activations("stages.pretrain.train.precision=bf16") < plain * 0.95


def test_hours_follow_from_operations() -> None:
    train = tiny_recipe(Path("x")).stages["pretrain"].train
    stage = StagePlan("a", "pretrain", train, 4, 1, (), flops=3e12)
    assert stage.samples == 12
    assert stage.hours(LARGE, 2, 0.5) == pytest.approx(12 * 3e12 / 1e14 / 3600)


def test_accelerators_have_a_peak_and_a_memory() -> None:
    for name in ACCELERATORS:
        device = accelerator(name)
        assert device.bf16 > device.fp32 > 1e13
        assert device.memory > 2e10
    with pytest.raises(UsageError, match=r"there is no h10; there is .* did you mean h100"):
        accelerator("h10")


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["run", *words, "--dry-run", "--accelerator", "h100"])
    return code, *capsys.readouterr()


def test_a_dry_run_prints_the_plan_of_the_quickstart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(RECIPES / "quickstart.yaml")
    code, out, err = dry_run(capsys, recipe, f"output={tmp_path / 'run'}")
    assert (code, err) == (0, "")
    for words in ("encoder           1,209,728  trained", "no problem found", "80,000 in all"):
        assert words in out
    assert not list(tmp_path.iterdir())


def test_every_problem_is_told_beside_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aimv2_mllm.engine import trackers

    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("WandBTracker", "no_such_package"))
    (tmp_path / "recipe.yaml").write_text("name: another\nstages: {}\n")
    code, out, err = dry_run(
        capsys,
        str(RECIPES / "quickstart.yaml"),
        f"output={tmp_path}",
        "stages.pretrain.data.sources=[{kind: shards, urls: nowhere/a.tar}]",
        "stages.pretrain.tokenizer=./nowhere",
        "stages.align.train.batch_size=33",
        "stages.align.train.trackers=[wandb]",
        "stages.tune.lora.targets=[q_prj]",
        "--devices",
        "2",
    )
    assert code == 2
    for words in (
        "output: ",
        "stages.pretrain.data.sources.0: nowhere/a.tar: there is no folder nowhere",
        "stages.pretrain.tokenizer: ./nowhere: no tokenizer can be loaded",
        "stages.align.train.batch_size is 33, which 2 processes cannot share evenly",
        "no_such_package is not installed",
        "stages.tune: lora.targets: the LLM has no q_prj",
    ):
        assert words in err, words
    assert len(err.splitlines()) == 6, err
    assert "all are counted with 64 tokens" in out
    assert "counted with 32,000 words" in out
    assert "caption_ids 16x64" in out


def test_micro_batches_by_tokens_are_planned_without_conversations_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train.micro_batch_size=null", "train.micro_batch_tokens=1000", "data.max_tokens=120"]
    words.append("data.sources=[{kind: llava, file: nowhere.json}]")
    code, out, err = dry_run(
        capsys,
        str(RECIPES / "quickstart.yaml"),
        f"output={tmp_path / 'run'}",
        *(f"stages.align.{word}" for word in words),
        "stages.tune.train.micro_batch_size=null",
        "stages.tune.train.micro_batch_tokens=50",
        "stages.tune.data.max_tokens=150",
    )
    assert code == 2
    assert "stages.align.data.sources.0: nowhere.json: cannot be read" in err
    assert "all are counted with 120 tokens" in out
    assert "memory is that of a micro-batch of 1,000 tokens\n" in out
    assert "per device 32, about 4 x 1,000 tokens a step" in out
    # 16 of them are of a blank picture beside the longest conversation.
    assert "micro-batch of 166 tokens, which the longest conversation alone may have" in out


def test_what_does_not_fit_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = ("stages.pretrain.encoder.size=aimv2_3b", "stages.pretrain.train.batch_size=64")
    code, out, err = dry_run(
        capsys, str(RECIPES / "ablation.yaml"), f"output={tmp_path / 'run'}", *(
            word.replace("pretrain", "both") for word in huge
        ), "stages.both.train.batch_size=4096"
    )  # fmt: skip
    assert code == 2
    assert "stages.both.train: needs" in err
    assert "try a lower micro_batch_size, activation_checkpointing, strategy fsdp2 or more" in err
    assert "DOES NOT FIT" in out


def test_on_a_processor_the_whole_process_is_foretold(tmp_path: Path) -> None:
    def stages(*words: str) -> dict[str, Memory]:
        found = plan(tiny_recipe(tmp_path, *words), PROCESSOR, 1)
        assert not found.problems
        return {stage.name: stage.memory for stage in found.stages if stage.memory}

    plain = stages()
    for memory in plain.values():
        beside = memory.beside
        parts = (beside.libraries, beside.batches, beside.aside, beside.unused)
        assert memory.total == memory.tensors + sum(parts)
        assert beside.libraries > 100 * 2**20
        assert beside.aside == 0
    # Steps of pre-training are all of a size, and each uses what the one before it freed.
    assert plain["pretrain"].beside.unused == 0
    assert plain["align"].beside.unused > 0
    assert plain["tune"].beside.unused > 2 * plain["align"].beside.unused
    # Two steps ahead for each of two workers.
    batches = stages("stages.align.data.workers=2")["align"].beside.batches
    pixels = 4 * 3 * 56 * 56 * 4
    assert 4 * pixels < batches < 5 * pixels


def test_a_plan_and_its_problems_have_the_same_memory(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    found = plan(recipe, PROCESSOR, 2)
    most = 2 * max(stage.memory.total for stage in found.stages if stage.memory)
    fits, small = (replace(PROCESSOR, memory=most - less) for less in (0, 1))
    text = written(found, fits, 2, 0.4)
    for words in (" in a process, fits: weights ", "and libraries ", ", freed and kept "):
        assert text.count(words) == len(found.stages)
    assert not limits(recipe, found, fits, 2)
    assert written(found, small, 2, 0.4).count("in a process, DOES NOT FIT") == 1
    [problem] = limits(recipe, found, small, 2)
    assert f"needs {most / 2**30:.1f} GiB" in str(problem)
    advice = "a lower micro_batch_size or activation_checkpointing or fewer processes"
    assert str(problem).endswith(advice)
    none = limits(recipe, found, replace(PROCESSOR, memory=1), 2)  # not for weights alone either
    assert all(str(problem).endswith("try a smaller model or fewer processes") for problem in none)


def test_the_micro_batch_that_takes_most_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def rehearsed(model: Any, objective: Any, batch: Any, **words: Any) -> Any:
        found.append(batch)
        footprint = rehearse(model, objective, batch, **words)
        return replace(footprint, activations=10**9 - len(found))  # the shortest takes most

    monkeypatch.setattr("aimv2_mllm.planning.plan.rehearse", rehearsed)
    words = ("stages.tune.train.batch_size=8", "stages.tune.train.micro_batch_size=2")
    stage = plan(tiny_recipe(tmp_path, *words), LARGE, 1).stages[-1]
    first, *_, last = (tuple(batch["input_ids"].shape) for batch in found[-4:])
    assert stage.shapes["input_ids"] == first != last
    assert stage.memory
    assert stage.memory.activations > 9 * 10**8


def test_flags_of_a_dry_run_need_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(RECIPES / "quickstart.yaml"), "--devices", "2"]) == 2
    assert "--devices only works with --dry-run" in capsys.readouterr().err
