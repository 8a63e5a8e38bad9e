"""The command line: what each verb calls, and the exit code.

0 done; 1 a run could not go on; 2 what was asked cannot be done; 130 interrupted; 141 nobody reads
the output any more. Nothing heavy is imported before a verb needs it: `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimv2_mllm.errors import RunFailed, UsageError, nearest
from aimv2_mllm.parser import PROGRAM, parse

# Modules that `pip install aimv2-mllm` alone does not bring.
OPTIONAL = {
    "accelerate", "jinja2", "matplotlib", "peft", "pydantic", "sklearn", "tokenizers", "tqdm",
    "transformers", "yaml",
}  # fmt: skip
INSTALL = "pip install 'aimv2-mllm[train]'"
EXTRA = {"gradio": "demo"}  # those of other extras
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Their progress bars, warnings and reports of use are not what was asked for.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def run(args: argparse.Namespace) -> None:
    """Run a recipe and print where its report is and what can be done with the result."""
    import shlex

    from aimv2_mllm.recipe_file import load_recipe

    try:
        recipe = load_recipe(args.recipe, args.overrides)
    except UsageError:
        # Of the processes that a launcher started here, one tells what all of them find.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2) from None
        raise
    asked = {key: getattr(args, key) for key in ("accelerator", "devices", "utilisation")}
    if args.dry_run:
        _dry_run(recipe, **asked)
        return
    if given := [f"--{key}" for key, value in asked.items() if value is not None]:
        raise UsageError(f"{', '.join(given)} belongs to --dry-run, which is not there")
    # After the recipe is known to be right: it takes seconds.
    from aimv2_mllm.folders import TALKING
    from aimv2_mllm.run import run as run_stages

    folder = run_stages(recipe, _note)
    if folder is None:
        return
    report = folder / "report.md"
    print(f"report: {report}" if report.is_file() else f"result: {folder}")
    if any(stage.kind in TALKING for stage in recipe.stages.values()):
        model, picture, lead = shlex.quote(str(folder)), "PICTURE", "next:   "
        if {one.kind for stage in recipe.stages.values() for one in stage.data.sources} == {
            "handwriting"
        }:
            picture = shlex.quote(str(folder / "sheet.png"))
            print(f"{lead}{_program()} sample {model} {picture}")
            lead = " " * len(lead)
        print(f"{lead}{_program()} chat {model} --image {picture}")


def _dry_run(
    recipe: Any, accelerator: str | None, devices: int | None, utilisation: int | None
) -> None:
    """Print the plan, and end with the problems if there are any."""
    from aimv2_mllm.engine.accelerators import accelerator as known
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    stay_offline_unless_reached()
    from aimv2_mllm.plan import plan
    from aimv2_mllm.plan_text import limits, written

    device, num_devices = known(accelerator), devices or 1
    planned = plan(recipe, device, num_devices)
    print(written(planned, device, num_devices, (utilisation or 40) / 100))
    _end_with([*planned.problems, *limits(recipe, planned, device, num_devices)])


def doctor(args: argparse.Namespace) -> None:
    """Print what is sound of a recipe that is to be run, and end with the problems if any."""
    from aimv2_mllm.recipe_file import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    stay_offline_unless_reached()
    from aimv2_mllm.doctor import examine

    _end_with(examine(recipe, print))


def _end_with(problems: Sequence[object]) -> None:
    """UsageError with all of the problems, a line each; a line of its own where there is none."""
    if problems:
        sys.stdout.flush()
        raise UsageError("\n".join(map(str, problems)))
    print("no problem found")


def _program() -> str:
    """The words that call this program again, as they were typed."""
    import shlex
    import shutil

    script = Path(sys.argv[0])
    if script.stem != PROGRAM:
        return f"python -m {__package__}"
    found = shutil.which(PROGRAM)
    on_path = found is not None and Path(found).absolute() == script.absolute()
    return PROGRAM if on_path else shlex.quote(str(script))


def chat(args: argparse.Namespace) -> None:
    """Answer one question about a picture, or as many as are asked."""
    from aimv2_mllm.data.images import open_image
    from aimv2_mllm.folders import talking_folder
    from aimv2_mllm.sampling import Sampling

    if args.image is None:
        raise UsageError(
            "chat needs --image FILE; to make a picture that the model can know: "
            f"{_program()} sample {args.model} sheet.png"
        )
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt is empty: ask something, or leave it out to ask by keyboard")
    if args.system is not None and not args.system.strip():
        raise UsageError("--system is empty: say something, or leave it out")
    pictures = [open_image(file) for file in args.image]
    names = ("temperature", "top_p", "top_k", "seed")
    words: dict[str, Any] = {name: getattr(args, name) for name in names}
    sampling = Sampling(**words, stop=tuple(args.stop))
    talking_folder(Path(args.model))  # seconds before torch is there to load it
    from aimv2_mllm.chat import answer, load_model
    from aimv2_mllm.prompts import said
    from aimv2_mllm.terminal import talk

    bot = load_model(args.model)
    if args.prompt is None:
        talk(bot, pictures, args.max_tokens, system=args.system, sampling=sampling)
        return
    system = [] if args.system is None else [said("system", args.system)]
    asked = [*system, said("user", args.prompt, pictures=len(pictures))]
    words = {"max_new_tokens": args.max_tokens, "sampling": sampling}
    print(answer(bot, asked, pictures, **words))


def demo(args: argparse.Namespace) -> None:
    """Serve the page where models are talked to, until Ctrl-C."""
    import importlib

    login = _login(Path(args.login)) if args.login else None
    if login is None and not args.no_login and (args.share or args.host not in LOOPBACK):
        way = "--share" if args.share else f"--host {args.host}"
        raise UsageError(
            f"{way} lets everybody in who finds it: give --login FILE with lines NAME:PASSWORD, or "
            "--no-login if that is meant"
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    here = Path(__file__).resolve().parent
    # An installed package carries it; in the repository it stands beside the package.
    sys.path.insert(0, str(next(f for f in (here / "_demo", here.parent / "demo") if f.is_dir())))
    importlib.import_module("app").serve(
        args.models, host=args.host, port=args.port, share=args.share, login=login
    )


def _login(file: Path) -> list[tuple[str, str]]:
    """Names and passwords, from lines NAME:PASSWORD; UsageError for others."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--login {file}: cannot be read ({error})") from None
    found = [line.partition(":")[::2] for line in lines if line.strip()]
    if not found or not all(name and password for name, password in found):
        raise UsageError(f"--login {file}: each of its lines must be NAME:PASSWORD")
    return found


def sample(args: argparse.Namespace) -> None:
    """Write a held-out sheet of the world in which a model was trained; print its path."""
    import secrets

    from aimv2_mllm.files import demand_picture_place, write_picture

    _demand_handwriting(Path(args.model))
    demand_picture_place(Path(args.out), "sheet.png")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    from PIL import Image

    from aimv2_mllm.data import scenes

    scene = scenes.scene(seed, "heldout", 0)
    write_picture(Path(args.out), Image.fromarray(scenes.render(scene, args.size)))
    _note(f"what is on it: {scenes.caption(scene)} (--seed {seed})")
    print(args.out)


def _kinds_of_sources(data: dict[str, Any]) -> list[str | None]:
    """Where a stage's samples came from; records hold one source, or a list of them."""
    return [source.get("kind") for source in data.get("sources", [])] or [data.get("source")]


def _demand_handwriting(model: Path) -> None:
    from aimv2_mllm.folders import stages_of

    sources = [
        kind
        for stage in stages_of(model).values()
        for kind in _kinds_of_sources(stage.get("data", {}))
    ]
    if not sources or set(sources) != {"handwriting"}:
        known = f"were trained on {', '.join(map(str, sources))}" if sources else "are not known"
        raise UsageError(
            f"{model}: its stages {known}; sheets are for models trained on handwriting: "
            "show this one a picture of your own"
        )


def probe(args: argparse.Namespace) -> None:
    """Print what frozen features tell of labelled pictures; write it as JSON, and a picture."""
    from aimv2_mllm import files

    if (args.kind == "zeroshot") != (args.templates is not None):
        raise UsageError("--templates FILE belongs to --kind zeroshot, and is needed there")
    if args.kind == "zeroshot" and (args.pca or args.image_size):
        raise UsageError("--pca and --image-size are not for --kind zeroshot")
    if args.out:
        files.demand_place(Path(args.out), "results.json")
    if args.pca:
        files.demand_picture_place(Path(args.pca))
    from aimv2_mllm.seeing import probe_tower, probe_zero_shot

    (probe_zero_shot if args.kind == "zeroshot" else probe_tower)(args)


def dream(args: argparse.Namespace) -> None:
    """Let a pre-training decoder paint and caption a picture; print the caption and the file."""
    from aimv2_mllm import files

    if (args.image is None) == (not args.sheet):
        raise UsageError("dream needs one picture: --image FILE, or --sheet for a held-out sheet")
    files.demand_picture_place(Path(args.out))
    from aimv2_mllm.data.images import open_image

    if args.sheet:
        _demand_handwriting(Path(args.model))
    picture = None if args.sheet else open_image(args.image)
    from aimv2_mllm.seeing import dream as dream_of

    dream_of(args, picture)


def convert(args: argparse.Namespace) -> None:
    """Write an encoder from a folder or the hub in another layout, size or precision."""
    from aimv2_mllm.convert import convert as write

    words = {"layout": args.layout, "image_size": args.image_size, "dtype": args.dtype}
    print(write(args.source, Path(args.destination), **words, narrate=_note))


def evaluate(args: argparse.Namespace) -> None:
    """Print what a model's answers to the questions of a data set are worth; write a report."""
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    if not os.path.exists(args.model) or not os.path.exists(args.data):
        stay_offline_unless_reached()
    from aimv2_mllm.evaluate import as_table
    from aimv2_mllm.evaluate import evaluate as judge

    print(as_table(judge(args)))
    print(f"\nreport: {Path(args.out) / 'report.md'}")


def compare(args: argparse.Namespace) -> None:
    """Train variants of a recipe, print a table of what each is worth, and write a report."""
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    if args.data and not os.path.exists(args.data):
        stay_offline_unless_reached()
    from aimv2_mllm.comparison.compare import compare as measure
    from aimv2_mllm.comparison.page import as_table

    numbers = measure(args, _note)
    print(as_table(numbers))
    for one in numbers["failed"]:
        _note(f"{PROGRAM}: failed: {one['run']}: {one['why']}")
    print(f"\nreport: {Path(args.out) / 'report.md'}")
    if numbers["failed"]:
        raise SystemExit(1)


def lmms_eval(args: argparse.Namespace) -> None:
    """Print what lmms-eval makes of a model's answers, or the commands that would tell it."""
    from aimv2_mllm.lmms.command import run_benchmarks
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    if not args.print:
        stay_offline_unless_reached()
    print(run_benchmarks(args, _note).rstrip())


def export(args: argparse.Namespace) -> None:
    """Write a finished result as a folder that other tools load."""
    from aimv2_mllm.export.formats import export as write

    chosen = {"dtype": args.dtype, "max-shard-size": args.max_shard_size, "layout": args.layout}
    words = {"format_": args.format, "narrate": _note, "chosen": chosen}
    print(write(args.run, Path(args.destination), **words))


def verify_export(args: argparse.Namespace) -> None:
    """Load an export in a process of its own and print a line for each check."""
    from aimv2_mllm.export.verify import verify

    verify(Path(args.folder), args.run, print)


VERBS = {
    "run": run,
    "doctor": doctor,
    "chat": chat,
    "demo": demo,
    "sample": sample,
    "probe": probe,
    "dream": dream,
    "convert": convert,
    "evaluate": evaluate,
    "compare": compare,
    "lmms-eval": lmms_eval,
    "export": export,
    "verify-export": verify_export,
}


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(text: str) -> None:
    _note("\n".join(f"{PROGRAM}: {line}" for line in text.splitlines()))


def _call(argv: Sequence[str]) -> None:
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        known = f"there is {', '.join(VERBS)}{nearest(verb, VERBS)}"
        raise UsageError(f"there is no verb {verb}; {known}")
    args = parse(argv)
    if args.version:
        from importlib.metadata import version

        print(version(PROGRAM))
    elif args.verb is None:
        raise UsageError(f"a verb is missing: {', '.join(VERBS)}; see {PROGRAM} --help")
    else:
        VERBS[args.verb](args)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words say (`sys.argv`'s by default); the exit code, see the module's docstring.

    What is wrong is said on stderr. SystemExit passes: 0 after --help, 143 after a SIGTERM.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        _call(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UsageError as error:
        _complain(str(error))
        return 2
    except RunFailed as error:
        _complain(str(error))
        return 1
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in EXTRA:
            _complain(f"{error}: pip install 'aimv2-mllm[{EXTRA[missing]}]'")
            return 2
        if missing in OPTIONAL or INSTALL in str(error):
            _complain(f"{error}: {INSTALL}" if INSTALL not in str(error) else str(error))
            return 2
        raise
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            _complain("interrupted")
        return 130
    except BrokenPipeError:
        # The interpreter flushes once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
