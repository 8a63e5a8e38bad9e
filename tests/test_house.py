"""The house rules that a machine can hold: who imports whom, the command line, the recipes."""

import argparse
import ast
import hashlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import aimv2_mllm
from aimv2_mllm.__main__ import VERBS
from aimv2_mllm.flags.parser import build_parser
from aimv2_mllm.recipe.file import load_recipe

HOUSE = Path(aimv2_mllm.__file__).parent
RECIPES = sorted((HOUSE.parent / "recipes").glob("*.yaml"))

# A module imports only what stands above it, or beside it in the same entry.
TABLE = (
    "errors",
    "disk",
    "formats",
    "narration",
    "marks",
    "heap",
    "model.sampling",
    "folders",
    "files",
    "recipe.types",
    "recipe.connectors",
    "recipe.data",
    "recipe.train",
    "recipe.tune",
    "recipe.stages",
    "recipe.schema",
    "recipe.mistakes",
    "recipe.file",
    "model.packed",
    "model.positions",
    "model.blocks",
    "model.encoder",
    "model.namings",
    "model.timm_layout",
    "model.layouts",
    "model.shards",
    "model.decoding",
    "model.speech",
    "model.batched",
    "model.shapes",
    "model.hub",
    "model.weights",
    "model.lit",
    "model.lit_weights",
    "model.pretrainer",
    "model.incremental",
    "model.decoder_weights",
    "model.preprocessing",
    "model.grids",
    "model.layers",
    "model.connectors",
    "model.projectors",
    "model.families",
    "model.foreign",
    "model.towers",
    "model.frozen_tower",
    "model.stock",
    "model.quantising",
    "model.merging",
    "model.adapting",
    "model.llava",
    "model.llms",
    "model.joining",
    "model.mllm",
    "model.rows",
    "model.answering",
    "export.convert",
    "objective",
    "data.files",
    "data.order",
    "data.drawing",
    "data.handwriting",
    "data.pictures",
    "data.rows",
    "data.features",
    "data.pairs",
    "data.talks",
    "data.questions",
    "data",
    "place",
    "chat.prompts",
    "chat.chatbot",
    "chat.session",
    "chat.chat",
    "chat.scoring",
    "evaluation.answerers",
    "engine",
    "stages.job",
    "stages.feature_pass",
    "stages.encoders",
    "stages.llms",
    "stages.tuning",
    "stages.table",
    "evaluation",
    "reports.charts",
    "reports.picture_grids",
    "reports.gallery",
    "reports.page",
    "reports.report",
    "reports.evaluation_page",
    "runs.run_folder",
    "runs.run",
    "planning.problems",
    "planning.stand_ins",
    "planning.talks",
    "planning.planned",
    "planning.processes",
    "planning.plan",
    "planning.text",
    "verbs.seeing",
    "comparison.evaluate",
    "comparison",
    "lmms",
    "chat.transcript",
    "towers",
    "export",
    "planning.doctor_samples",
    "planning.doctor",
    "visitors.visit",
    "visitors.insight",
    "visitors.showroom",
    "chat.terminal",
    "__init__",
    "flags",
    "flags.parser",
    "verbs",
    "__main__",
)
# Narrower than the table: all that these may import of ours.
ONLY = {
    "model.packed": set(),
    "model.positions": set(),
    "model.blocks": {"model.packed"},
    "model.encoder": {"model.blocks", "model.packed", "model.positions"},
    "model.namings": {"errors"},
    "model.timm_layout": {"errors", "model.encoder"},
    "model.layouts": {"errors", "folders", "model.encoder", "model.timm_layout"},
    "model.shards": {"disk", "errors", "model.namings"},
    "model.hub": {"errors", "model.shapes"},
    "model.weights": {
        "errors",
        "folders",
        "model.encoder",
        "model.hub",
        "model.layouts",
        "model.namings",
        "model.shapes",
        "model.shards",
    },
    "model.lit": {"model.blocks", "model.encoder"},
    "export.convert": {"errors", "folders", "files", "model"},
    "objective": {"marks"},
    "engine": {"disk", "errors", "heap", "marks", "recipe.train", "engine"},
    "folders": {"errors"},
    "reports.charts": set(),
    "chat.prompts": {"errors", "narration", "data"},
    "chat.chatbot": {"data", "chat.prompts"},
    "chat.session": {"errors", "model.sampling", "data", "model", "chat.prompts", "chat.chatbot"},
    "chat.chat": {
        "errors",
        "model.sampling",
        "data",
        "model",
        "folders",
        "chat.prompts",
        "chat.chatbot",
        "chat.session",
    },
    "chat.scoring": {"errors", "data", "model", "chat.prompts", "chat.chatbot"},
    "evaluation.answerers": {
        "errors",
        "model.sampling",
        "data",
        "model",
        "folders",
        "chat.prompts",
        "chat.chat",
    },
    "chat.transcript": {"errors", "data", "chat.prompts"},
    "visitors.visit": {"errors", "data", "chat.prompts", "chat.transcript"},
    "towers": {"errors", "folders", "model", "towers"},
}
# What stands in the old environments of host toolkits, where towers live.
BASE = {"torch", "safetensors", "numpy", "PIL"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the house, as `data.files`, with its file."""
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def entry(module: str) -> str:
    """The entry of TABLE under which `module` falls."""
    found = [e for e in TABLE if module == e or module.startswith(f"{e}.")]
    return max(found, key=len, default=module)


@cache
def imports(module: str) -> tuple[set[str], set[str]]:
    """What `module` imports, in functions too: modules of ours, and names of foreign packages."""
    ours, foreign = set[str](), set[str]()
    package = ["aimv2_mllm", *module.split(".")][:-1]
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            known = [f"{base}.{a.name}" for a in node.names]
            # `from a import b` imports the module a.b where there is one, and a otherwise.
            names = [n if n.removeprefix("aimv2_mllm.") in modules() else base for n in known]
        else:
            continue
        ours |= {n.removeprefix("aimv2_mllm.") for n in names if n.startswith("aimv2_mllm.")}
        ours |= {"__init__" for n in names if n == "aimv2_mllm"}
        foreign |= {n.split(".")[0] for n in names if not n.startswith("aimv2_mllm")}
    return ours, foreign


def test_the_import_reader_sees_deferred_relative_and_plain_imports() -> None:
    ours, foreign = imports("verbs.talking")
    assert {"errors", "folders", "chat.chat", "data.handwriting.scenes", "verbs.telling"} <= ours
    assert "argparse" in foreign
    assert "PIL" in foreign
    assert {"model.encoder", "chat.chat"} <= imports("__init__")[0]


PACKAGES = [m for m, path in modules().items() if path.name == "__init__.py" and m != "__init__"]


def test_every_folder_with_modules_is_a_package_that_git_keeps() -> None:
    folders = {path.parent for path in modules().values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
    said = ["git", "check-ignore", "--no-index", *map(str, modules().values())]
    done = subprocess.run(said, cwd=HOUSE.parent, capture_output=True, text=True)
    assert done.stdout == ""  # what git ignores a wheel leaves out


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_owns_and_does_nothing(package: str) -> None:
    [said] = ast.parse(modules()[package].read_text(encoding="utf-8")).body
    assert isinstance(said, ast.Expr)


@pytest.mark.parametrize("module", [m for m in modules() if m not in PACKAGES])
def test_a_module_imports_only_what_stands_above_it(module: str) -> None:
    assert entry(module) in TABLE, f"{module} has no entry in TABLE: give it one"
    for other in imports(module)[0]:
        assert entry(other) in TABLE, f"{module} imports {other}, which has no entry in TABLE"
        above = TABLE.index(entry(other)) <= TABLE.index(entry(module))
        assert above, f"{module} imports {other}, which stands below it"


def test_packages_do_not_import_each_other_in_a_ring() -> None:
    above = {m.split(".")[0]: set[str]() for m in modules()}
    for module in modules():
        package = module.split(".")[0]
        above[package] |= {other.split(".")[0] for other in imports(module)[0]} - {package}
    while above:
        free = [package for package, others in above.items() if not others & above.keys()]
        assert free, f"a ring, or what it needs: {sorted(above)}"
        above = {package: others for package, others in above.items() if package not in free}


@pytest.mark.parametrize("owner", ONLY)
def test_some_import_still_less(owner: str) -> None:
    for module in modules():
        if entry(module) == owner:
            entries = {entry(other) for other in imports(module)[0]}
            allowed = {e for e in entries if e in ONLY[owner] or e.split(".")[0] in ONLY[owner]}
            assert entries == allowed, f"{module} imports {entries - allowed}"


@pytest.mark.parametrize("module", ["packed", "positions", "blocks", "encoder", "namings", "lit"])
def test_the_networks_and_their_names_need_torch_and_nothing_else(module: str) -> None:
    assert imports(f"model.{module}")[1] - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize(
    "module",
    ["weights", "layouts", "timm_layout", "shards", "connectors", "layers", "grids", "projectors"],
)
def test_weights_and_connectors_need_only_what_every_host_has(module: str) -> None:
    assert imports(f"model.{module}")[1] - sys.stdlib_module_names <= BASE


def at_the_top(module: str) -> set[str]:
    """The packages that `module` imports when it is imported itself."""
    found = set[str]()
    for node in ast.parse(modules()[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"aimv2_mllm"}


def reached(start: str) -> set[str]:
    """The modules of ours that importing `start` imports, in functions too."""
    found, waiting = set[str](), {start}
    while waiting:
        found.add(module := waiting.pop())
        waiting |= {other for other in imports(module)[0] if other in modules()} - found
    return found


def test_towers_need_only_what_every_host_has_and_import_the_host_late() -> None:
    inside = [module for module in modules() if module.split(".")[0] == "towers"]
    assert "towers.llava" in inside
    for module in set().union(*(reached(module) for module in inside)):
        assert at_the_top(module) <= BASE, module


def test_towers_run_on_the_python_of_llavas_users() -> None:
    config = tomllib.loads((HOUSE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert config["project"]["requires-python"] == ">=3.10"
    names = set().union(*(reached(m) for m in modules() if m.split(".")[0] == "towers"))
    files = [str(modules()[module]) for module in sorted(names)]
    command = [sys.executable, "-m", "mypy", "--python-version", "3.10", "--no-warn-unused-ignores"]
    command += ["--follow-imports", "silent", "--cache-dir", ".mypy_cache/py310", *files]
    done = subprocess.run(command, cwd=HOUSE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_extras_bring_is_pinned_and_reads_tokenizers_of_sentencepiece() -> None:
    config = tomllib.loads((HOUSE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    extras = config["project"]["optional-dependencies"]
    names = {extra: {re.split(r"[^\w-]", one)[0] for one in extras[extra]} for extra in extras}
    assert {"sentencepiece", "protobuf"} <= names["train"]  # Vicuna has a tokenizer.model alone
    lines = (HOUSE.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines}
    assert set().union(*names.values()) - {"aimv2-mllm", "llava"} <= pinned


def test_the_hub_is_reached_only_where_it_is_asked_for() -> None:
    tree = ast.parse(modules()["model.hub"].read_text(encoding="utf-8"))
    at_the_top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("huggingface_hub" in ast.dump(node) for node in at_the_top)


def test_the_command_line_offers_the_layouts_and_precisions_that_there_are() -> None:
    from aimv2_mllm.engine.accelerators import ACCELERATORS
    from aimv2_mllm.export.formats import FORMATS
    from aimv2_mllm.export.verify import CHECKS
    from aimv2_mllm.flags import parser
    from aimv2_mllm.flags.values import PRECISIONS
    from aimv2_mllm.model import shards
    from aimv2_mllm.model.layouts import LAYOUTS

    assert tuple(LAYOUTS) == parser.LAYOUTS
    assert tuple(ACCELERATORS) == parser.ACCELERATORS
    assert tuple(shards.PRECISIONS) == PRECISIONS
    assert tuple(FORMATS) == parser.FORMATS
    assert tuple(CHECKS) == parser.FORMATS


def flags(parser: argparse.ArgumentParser) -> list[str]:
    """The words of a parser: flags by their longest name, positionals by what help calls them."""
    actions = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    return [a.option_strings[-1] if a.option_strings else str(a.metavar) for a in actions]


def test_verbs_and_flags_are_frozen() -> None:
    parser = build_parser()
    [verbs] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    assert flags(parser) == ["--help", "--version"]
    assert {verb: flags(words) for verb, words in verbs.choices.items()} == {
        "run": [
            "--help", "RECIPE", "key.sub=value", "--dry-run", "--accelerator", "--devices",
            "--utilisation",
        ],
        "doctor": ["--help", "RECIPE", "key.sub=value"],
        "chat": [
            "--help", "MODEL", "--image", "--prompt", "--system", "--max-tokens", "--temperature",
            "--top-p", "--top-k", "--seed", "--stop",
        ],
        "sample": ["--help", "MODEL", "OUT", "--seed", "--size"],
        "demo": ["--help", "MODEL", "--host", "--port", "--login", "--no-login", "--share"],
        "probe": [
            "--help", "ENCODER", "DATA", "--kind", "--out", "--pca", "--templates", "--image-size",
            "--limit", "--k", "--epochs", "--seed",
        ],
        "dream": [
            "--help", "MODEL", "--image", "--sheet", "--seed", "--prefix", "--statistics", "--out",
        ],
        "convert": ["--help", "SRC", "DST", "--layout", "--image-size", "--dtype"],
        "evaluate": [
            "--help", "MODEL", "DATA", "--out", "--metric", "--prompt", "--root", "--column",
            "--split", "--limit", "--batch-size", "--max-new-tokens", "--no-controls",
        ],
        "compare": [
            "--help", "RECIPE", "key.sub=value", "--vary", "--seeds", "--jobs", "--launcher",
            "--data", "--out", "--metric", "--prompt", "--root", "--column", "--split", "--limit",
            "--batch-size", "--max-new-tokens", "--no-controls",
        ],
        "lmms-eval": [
            "--help", "MODEL", "TASKS", "--out", "--environment", "--include-path", "--limit",
            "--batch-size", "--processes", "--dtype", "--simple", "--print",
        ],
        "export": [
            "--help", "RUN", "DST", "--format", "--dtype", "--max-shard-size", "--layout",
        ],
        "verify-export": ["--help", "DST", "RUN"],
    }  # fmt: skip
    assert VERBS.keys() == verbs.choices.keys()


def test_the_command_line_offers_the_probes_and_statistics_that_there_are() -> None:
    from aimv2_mllm.evaluation import dreams, probes
    from aimv2_mllm.flags.looking import PROBES, STATISTICS

    assert (*probes.KINDS, "all", "zeroshot") == PROBES
    assert tuple(dreams.STATISTICS) == STATISTICS


def test_the_command_line_offers_the_metrics_that_there_are() -> None:
    from aimv2_mllm.evaluation.metrics import METRICS
    from aimv2_mllm.flags import judging

    assert tuple(METRICS) == judging.METRICS


def test_public_names_are_those_of_the_lazy_table() -> None:
    assert aimv2_mllm.__all__ == [*aimv2_mllm.NAMES, "__version__"]
    for name, module in aimv2_mllm.NAMES.items():
        value = getattr(aimv2_mllm, name)
        if isinstance(value, dict):  # a table has no name of its own
            continue
        assert value.__name__ == name
        assert value.__module__ == f"aimv2_mllm.{module}"


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'aimv2_tiny'"):
        _ = aimv2_mllm.aimv2_tiny


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads(path: Path) -> None:
    assert load_recipe(path).stages


README = (HOUSE.parent / "README.md").read_text(encoding="utf-8").splitlines()


def test_the_readme_is_short_and_its_commands_are_ones_we_have() -> None:
    assert len(README) < 330  # with the table of towers and connectors
    assert next(number for number, line in enumerate(README, 1) if line.startswith("```")) <= 20
    commands = [line for line in README if line.startswith(".venv/bin/aimv2-mllm ")]
    assert len(commands) >= 4
    for line in commands:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_every_picture_and_file_that_the_readme_names_is_there() -> None:
    named = [name for line in README for name in re.findall(r"!\[.*?\]\((.*?)\)", line)]
    assert named
    assert not [name for name in named if not (HOUSE.parent / name).is_file()]


def test_the_shipped_llm_is_what_its_recipe_makes() -> None:
    folder = HOUSE / "assets" / "tiny_llm"
    record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    recipe = load_recipe(HOUSE.parent / "recipes" / "tiny_llm.yaml")
    # Keys that are newer than the record count with their defaults.
    assert type(recipe.stages["llm"]).model_validate(record["recipe"]) == recipe.stages["llm"]
    for name, digest in record["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 5 * 10**6
