"""The benchmarks run, and compare like with like; their figures are no part of any verdict."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"
NANO = ["--size", "nano", "--image-size", "56", "--vocab", "300", "--steps", "1"]


def run(script: str, *words: str) -> str:
    """What the benchmark prints."""
    command = [sys.executable, str(BENCHMARKS / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plain_step_has_the_loss_and_the_gradient_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import END, build, caption_batch
    from plain import PlainPreTraining, renamed

    from aimv2_mllm.objective import PreTrainingObjective

    model = build("nano", 56, 300)
    plain = PlainPreTraining(model)
    batch = caption_batch(4, 56, [12, 25, 40, 76], 300)
    objective = PreTrainingObjective(14, END)
    loss = objective(model, batch, objective.targets(batch)).total
    loss.backward()
    plain_loss = plain.loss(batch, END)
    plain_loss.backward()
    assert abs(loss.item() - plain_loss.item()) < 1e-5
    gradients = renamed({name: p.grad for name, p in model.named_parameters()})
    assert gradients.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_the_step_benchmark_prints_both_sides_and_their_equal_losses() -> None:
    printed = run("pretrain_step.py", *NANO, "--pairs", "1", "--precision", "fp32")
    for word in ("plain ", "ours ", "ratio ", "floor "):
        assert word in printed
    [difference] = re.findall(r"first losses differ by (\S+)", printed)
    assert float(difference) < 1e-4


def test_the_padded_side_has_the_loss_and_the_gradient_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tuning
    from llava_shaped import LLMS, assembled, write_models, write_rows
    from padded_trainer import Rows, collated

    from aimv2_mllm.place import Place
    from aimv2_mllm.stages.table import STAGES

    sizes = ["--tower", "nano", "--llm", "nano", "--image-size", "28", "--rows", "6"]
    args = tuning.parse([*sizes, "--batch", "6", "--micro-batch", "6", "--mode", tuning.MODES[1]])
    write_rows(tmp_path, 6)
    write_models(tmp_path, "nano", 28, LLMS["nano"])
    recipe = tuning.recipe_of(args, tmp_path, 1)
    torch.manual_seed(0)
    job = STAGES["align"].build(recipe.stages["align"], Place(recipe, tmp_path / "run"))
    [batch] = job.batches(0)
    model, processor = assembled(tmp_path)
    rows = Rows(tmp_path / "rows.json", tuning.numbers(args, 0, 1))
    padded = collated(processor)([rows[number] for number in range(6)])
    for one in (batch, padded):  # whose pictures come in other orders, and are decoded otherwise
        one["pixel_values"] = torch.full_like(one["pixel_values"], 0.3)
    loss = job.objective(job.model, batch, job.objective.targets(batch)).total
    loss.backward()
    padded_loss = model(**padded).loss
    padded_loss.backward()
    assert abs(padded_loss.item() - loss.item()) < 1e-5
    for name, parameter in job.parts["connector"]:
        gradient = model.get_parameter(name.removeprefix("llava.")).grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_other_benchmarks_run() -> None:
    mixed = run(
        "mixed_sizes.py", "--size", "nano", "--images", "3", "--repeats", "1", "--precision", "fp32"
    )
    [difference] = re.findall(r"features differ by (\S+)", mixed)
    assert float(difference) < 1e-4
    one_row = ["--batches", "1", "--image-sizes", "224", "--captions", "40", "--steps", "1"]
    scaling = run("scaling.py", "--size", "nano", "--vocab", "300", *one_row)
    assert len(scaling.splitlines()) == 3
    sizes = ["--tower", "nano", "--llm", "nano", "--image-size", "28", "--rows", "8"]
    for mode in ("tune", "align-second-epoch"):
        printed = run("tuning.py", *sizes, "--rounds", "1", "--mode", mode)
        losses = [
            line.split()[5:] for line in printed.splitlines() if line.startswith(("tr", "ou"))
        ]
        assert len(losses) == 2
        assert abs(float(losses[0][0]) - float(losses[1][0])) < 1e-2
    tower = run("llava_tower.py", "--rounds", "1")
    ours, clip = (float(x) for x in re.findall(r"(\S+) GFLOP", tower))
    assert abs(ours / clip - 1) < 0.01


@pytest.mark.slow
def test_two_processes_tell_what_loading_took() -> None:
    printed = run("loading.py", "--tiny").splitlines()
    assert printed[0].startswith("llm: the model as it is held while it loads, ")
    assert [line.split()[0] for line in printed[1:]] == ["rank", "0", "1"]


def test_the_chat_benchmark_gets_the_same_tokens_both_ways() -> None:
    sizes = ["--tower", "nano", "--llm", "nano", "--image-size", "56"]
    printed = run("chat.py", *sizes, "--tokens", "4", "--rounds", "2")
    assert printed.count("ratio ") == 4
    assert printed.endswith("answers with the same tokens: 4 of 4\n")


@pytest.mark.slow
def test_visitors_of_the_demo_get_what_there_is_without_it(tiny_run: Path) -> None:
    pytest.importorskip("gradio", reason="needs pip install 'aimv2-mllm[demo]'")
    few = ["--visitors", "3", "--questions", "2", "--rounds", "1"]
    printed = run("demo.py", str(tiny_run), *few)
    assert re.match(r"page after .* computing\n6 answers, 6 of them as without the demo", printed)
    assert re.search(r"round 1: server holds \d+ MiB", printed)
