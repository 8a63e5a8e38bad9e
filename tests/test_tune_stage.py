"""Every way of tuning: what moves, what is held in which form, killed and resumed to the bit."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_corpus_run import Killed, die_in_step_5
from test_plan import LARGE

from aimv2_mllm.engine import metrics
from aimv2_mllm.engine.flops import FlopCounter
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.answering import Answering
from aimv2_mllm.model.llms import TINY_LLM
from aimv2_mllm.model.quantising import num_bytes
from aimv2_mllm.place import Place
from aimv2_mllm.planning.plan import plan
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.runs import run as runs
from aimv2_mllm.stages.job import Job
from aimv2_mllm.stages.table import STAGES

RECIPE = """\
name: tuned
stages:
  tune:
    kind: tune
    start: {start}
    train: {{steps: 7, batch_size: 4, micro_batch_size: 2, lr: 3e-3, log_every: 1,
            checkpoint_every: 3}}
"""
MODES = {
    "connector": ["trains=connector"],
    "lora": [],
    "rslora": ["lora.rslora=true", "lora.dropout=0.1"],
    "dora": ["lora.dora=true"],
    "nf4": ["quantise=nf4"],
    "int8": ["quantise=int8"],
    "nf4, connector": ["quantise=nf4", "trains=connector"],
    "nf4, dora": ["quantise=nf4", "lora.dora=true"],
    "llm": ["trains=llm"],
    "tower": ["trains=connector", "tower_blocks=2", "train.part_lr={tower: 1e-3}"],
    "everything": ["trains=llm", "tower_blocks=all"],
}
COMBINED = ("nf4, connector", "nf4, dora")  # of ways that are there alone


@pytest.fixture(scope="module")
def start(tiny_run: Path) -> Path:
    """The folder of an aligned Llava."""
    return tiny_run / "align" / "model"


def recipe_of(folder: Path, start: Path, output: str, *words: str) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(start=start))
    said = [f"stages.tune.{word}" for word in words]
    return load_recipe(path, [f"output={folder / output}", *said])


def built(folder: Path, start: Path, *words: str) -> Job:
    recipe = recipe_of(folder, start, "built", *words)
    torch.manual_seed(0)
    stage = recipe.stages["tune"]
    return STAGES["tune"].build(stage, Place(recipe, recipe.output))


def run(folder: Path, start: Path, output: str, *words: str) -> list[str]:
    said: list[str] = []
    runs.run(recipe_of(folder, start, output, *words), said.append)
    return said


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "tune" / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in metrics.TIMED_FIELDS}
        for line in text
    ]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tune" / "model" / "stage.json").read_text())


@pytest.mark.parametrize("mode", [m for m in MODES if m not in COMBINED])
def test_a_killed_run_goes_on_to_the_bit(
    tmp_path: Path, start: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, start, "whole", *MODES[mode])
    whole = lines(tmp_path / "whole")
    die_in_step_5(monkeypatch)
    with pytest.raises(Killed):
        run(tmp_path, start, "killed", *MODES[mode])
    monkeypatch.undo()
    assert "continuing from step 3" in run(tmp_path, start, "killed", *MODES[mode])
    assert lines(tmp_path / "killed") == whole
    assert record(tmp_path / "killed")["files"] == record(tmp_path / "whole")["files"]
    for file in ("whole", "killed"):
        assert any((tmp_path / file / "tune" / "checkpoints").iterdir())


def losses(job: Job, num_steps: int = 8) -> list[float]:
    """The loss of one batch, step after step on it alone."""
    batch = job.batches(0)[0]
    batch.pop("skipped", None)
    trained = [p for named in job.parts.values() for _, p in named]
    optimizer, found = torch.optim.AdamW(trained, lr=3e-3), []
    for _ in range(num_steps):
        total = job.objective(job.model, batch, job.objective.targets(batch)).total
        optimizer.zero_grad()
        total.backward()
        assert not [
            n for n, p in job.model.named_parameters() if p.requires_grad != (p.grad is not None)
        ]
        optimizer.step()
        found.append(float(total.detach()))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_what_is_trained_is_what_moves_and_it_learns(
    tmp_path: Path, start: Path, mode: str
) -> None:
    job = built(tmp_path, start, *MODES[mode])
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    declared = {name: p for named in job.parts.values() for name, p in named}
    found = losses(job)
    assert found[-1] < 0.9 * found[0]
    moved = {n for n, p in job.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == declared.keys()
    assert {p.dtype for p in declared.values()} == {torch.float32}


def llava_of(folder: Path) -> Any:
    from aimv2_mllm.model import mllm

    return mllm.load_llava(folder, "auto")[0].eval()


@pytest.mark.parametrize("mode", ["lora", "dora", "nf4", "int8", "everything"])
def test_the_result_is_the_tuned_model_on_its_full_weights(
    tmp_path: Path, start: Path, mode: str
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    job = built(tmp_path, start, *MODES[mode])
    losses(job)
    job.save(tmp_path / "model")
    batch = job.batches(0)[0]
    merged = Answering(llava_of(tmp_path / "model"))
    totals = job.objective.targets(batch)
    with torch.no_grad():
        ours = float(job.objective(merged, batch, totals).total)
        adapter = tmp_path / "model" / "adapter"
        assert adapter.is_dir() == (mode != "everything")
        if mode == "everything":
            theirs = float(job.objective(job.model.eval(), batch, totals).total)
        else:  # peft's own way back: the base that was not quantised, and what was trained
            base = llava_of(start)
            report = base.load_state_dict(
                load_file(adapter / "connector.safetensors"), strict=False
            )
            assert not report.unexpected_keys
            adapted = PeftModel.from_pretrained(base, adapter).eval().get_base_model()
            theirs = float(job.objective(Answering(adapted), batch, totals).total)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_only_the_linear_layers_of_the_llms_body_are_quantised(tmp_path: Path, start: Path) -> None:
    for form, kind in (("nf4", "Linear4bit"), ("int8", "Linear8bitLt")):
        model: Any = built(tmp_path, start, "trains=connector", f"quantise={form}").model
        body = {
            f"llava.model.language_model.{n}"
            for n, m in llava_of(start).model.language_model.named_modules()
            if type(m) is torch.nn.Linear
        }
        assert body
        assert {n for n, m in model.named_modules() if type(m).__name__ == kind} == body


def test_a_quantised_llm_takes_less_memory_and_counts_as_many_weights(
    tmp_path: Path, start: Path
) -> None:
    def weights(*words: str) -> tuple[int, int]:
        job = built(tmp_path, start, "trains=connector", *words)
        llm = job.model.llava.model.language_model.layers
        counted = sum(count for _, count, _ in job.table())
        return counted, sum(p.nbytes for p in llm.parameters() if p.ndim > 1)

    plain, nf4, int8 = (weights(*w) for w in ([], ["quantise=nf4"], ["quantise=int8"]))
    assert plain[0] == nf4[0] == int8[0]
    assert (plain[1] // 8, plain[1] // 4) == (nf4[1], int8[1])


def test_frozen_weights_are_bfloat16_where_products_are(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aimv2_mllm.engine import precision

    words = ("train.precision=bf16", "tower_blocks=1")
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    assert {p.dtype for p in built(tmp_path, start, *words).model.parameters()} == {torch.float32}
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    job = built(tmp_path, start, *words)
    for parameter in job.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    # What was stored in float32 and is trained has lost nothing on the way.
    stored = llava_of(start).state_dict()
    trained = [n for part in ("connector", "tower") for n, _ in job.parts[part]]
    held = {n: job.model.get_parameter(n) for n in trained}
    assert all(torch.equal(p, stored[n.removeprefix("llava.")]) for n, p in held.items())


def test_a_run_of_bf16_leaves_bfloat16_and_another_stage_starts_from_it(
    tmp_path: Path, start: Path
) -> None:
    run(tmp_path, start, "first", "train.precision=bf16", "train.steps=1", "quantise=nf4")
    assert record(tmp_path / "first")["quantised"] == "nf4"
    assert record(tmp_path / "first")["trained"] == ["lora", "connector"]
    assert record(tmp_path / "first")["base"] == {"source": str(start)}
    model = llava_of(tmp_path / "first" / "tune" / "model")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # A run folder stands for its last result; and its answers are those of its model.
    run(tmp_path, tmp_path / "first", "second", "train.steps=1", "trains=llm")
    from aimv2_mllm.chat.chat import answer, load_model

    bot = load_model(tmp_path / "second")
    assert {p.dtype for p in bot.model.parameters()} == {torch.float32}
    question = {"role": "user", "content": [{"type": "text", "text": "Say a digit."}]}
    assert isinstance(answer(bot, [question], [], max_new_tokens=2), str)


def test_a_llava_of_the_hub_is_tuned_as_its_folder_is(
    tmp_path: Path, start: Path, publish: Callable[..., Path]
) -> None:
    publish(start, "org/llava", "a" * 40)
    for output, base in (("folder", start), ("hub", Path("org/llava"))):
        run(tmp_path, base, output, "train.steps=2")
    assert lines(tmp_path / "hub") == lines(tmp_path / "folder")
    told, other = (record(tmp_path / name) for name in ("hub", "folder"))
    changed = {name for name, digest in told["files"].items() if other["files"][name] != digest}
    # One names the base; to the other transformers adds `is_local`.
    assert changed == {"adapter/adapter_config.json", "tokenizer_config.json"}
    origin = {"source": "org/llava", "revision": "a" * 40, "licence": "unknown"}
    assert told["origins"] == [origin]


def test_one_stage_assembles_and_tunes(tmp_path: Path, tiny_run: Path) -> None:
    words = ["start=null", f"tower={tiny_run}/pretrain/model", "llm=tiny_llm", "connector=mlp"]
    words += ["train.steps=2", "quantise=nf4"]
    run(tmp_path, tmp_path, "fresh", *words)
    made = record(tmp_path / "fresh")
    assert made["base"] == {"tower": f"{tiny_run}/pretrain/model", "llm": "tiny_llm"}
    assert {part for part, _, trained in made["parts"] if trained} == {"lora", "connector"}
    llava_of(tmp_path / "fresh" / "tune" / "model")


def test_the_last_blocks_of_the_tower_are_those_that_are_read(tmp_path: Path, start: Path) -> None:
    def names(blocks: int | str) -> set[str]:
        job = built(tmp_path, start, f"tower_blocks={blocks}")
        return {name.removeprefix("llava.model.vision_tower.") for name, _ in job.parts["tower"]}

    whole, one = names("all"), names(1)
    depth = llava_of(start).config.vision_config.num_hidden_layers
    assert {n.split(".")[2] for n in one if n.startswith("encoder")} == {str(depth - 1)}
    assert {n for n in one if not n.startswith("encoder")} == {"rms_norm.weight"}
    assert {n for n in whole if n.startswith("embeddings")}
    assert names(depth) < whole


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (
            ["lora.options={rank_patern: {}}"],
            "LoraConfig has no rank_patern; did you mean rank_pattern",
        ),
        (["lora.options={bias: all}"], "lora.options.bias cannot be given"),
        (["lora.options={init_lora_weights: pissa}"], "is 'pissa', and must be one of true, false"),
        (["lora.options={layers_to_transform: x}"], "lora: peft refuses"),
        (["lora.targets=[q_prj]"], "the LLM has no q_prj; .* did you mean q_proj"),
        (["tower_blocks=9"], "tower_blocks is 9, and of the tower 6 blocks are read"),
        (["start=./nowhere"], r"\./nowhere: no Llava can be loaded from there"),
    ],
)
def test_what_cannot_be_tuned_is_told_before_anything_is_trained(
    tmp_path: Path, start: Path, words: list[str], rule: str
) -> None:
    with pytest.raises(UsageError, match=rule) as error:
        run(tmp_path, start, "run", *words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "tune").exists()


def test_without_bitsandbytes_nothing_is_quantised(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"needs bitsandbytes: pip install 'aimv2-mllm\[qlora\]'"):
        run(tmp_path, start, "run", "quantise=nf4")


def test_weights_of_another_llm_are_refused(tmp_path: Path, start: Path) -> None:
    folder = shutil.copytree(start, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"do not fit its config.json: .* has another shape"):
        built(tmp_path, folder)
    for name, part, rule in (("encoder", "pretrain", "is an encoder"), ("llm", "", "is an LLM")):
        source = start.parents[1] / part / "model" if part else TINY_LLM
        with pytest.raises(UsageError, match=rule):
            run(tmp_path, source, name)


@pytest.mark.parametrize("mode", ["lora", "nf4", "int8", "everything"])
def test_a_plan_knows_every_way_of_tuning(tmp_path: Path, start: Path, mode: str) -> None:
    recipe = recipe_of(tmp_path, start, "plan", *MODES[mode])
    found = plan(recipe, LARGE, 1)
    assert not found.problems
    [stage] = found.stages
    job = built(tmp_path, start, *MODES[mode])
    assert stage.table == job.table()
    assert stage.memory
    assert stage.memory.weights == sum(num_bytes(p) for p in job.model.parameters())
    batches = job.batches(0)
    with FlopCounter() as counter:
        for batch in batches:
            batch.pop("skipped", None)
            job.objective(job.model, batch, job.objective.targets(batch))
    assert stage.flops * 4 == counter.flops
    assert stage.checkpoint == 3 * 4 * sum(count for _, count, trained in job.table() if trained)
