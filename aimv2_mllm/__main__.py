"""The command line: parse, call, exit code.

0 done; 1 a run could not go on; 2 what was asked cannot be done; 130 interrupted; 141 nobody reads
the output any more. Nothing heavy is imported before a verb needs it: `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from aimv2_mllm.errors import RunFailed, UsageError, nearest

if TYPE_CHECKING:
    from PIL import Image

# Modules that `pip install aimv2-mllm` alone does not bring.
OPTIONAL = {
    "accelerate", "jinja2", "matplotlib", "peft", "pydantic", "sklearn", "tokenizers", "tqdm",
    "transformers", "yaml",
}  # fmt: skip
PROGRAM = "aimv2-mllm"
INSTALL = "pip install 'aimv2-mllm[train]'"
# Their progress bars, warnings and reports of use are not what was asked for.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
SMALLEST_SHEET, LARGEST_SHEET = 28, 4096  # pixels, the sides of images that a recipe allows
MOST_NEW_TOKENS, MOST_SEED = 100_000, 2**63 - 1
LAYOUTS, DTYPES = ("original", "transformers", "timm"), ("fp32", "bf16")


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
    # After the recipe is known to be right: it takes seconds.
    from aimv2_mllm.folders import TALKING
    from aimv2_mllm.run import run as run_stages

    folder = run_stages(recipe, _note)
    if folder is None:
        return
    report = folder / "report.md"
    print(f"report: {report}" if report.is_file() else f"result: {folder}")
    if any(stage.kind in TALKING for stage in recipe.stages.values()):
        model, sheet = shlex.quote(str(folder)), shlex.quote(str(folder / "sheet.png"))
        print(f"next:   {_program()} sample {model} {sheet}")
        print(f"        {_program()} chat {model} --image {sheet}")


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

    if args.image is None:
        raise UsageError(
            "chat needs --image FILE; to make a picture that the model can know: "
            f"{_program()} sample {args.model} sheet.png"
        )
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt is empty: ask something, or leave it out to ask by keyboard")
    picture = open_image(args.image)
    talking_folder(Path(args.model))  # seconds before torch is there to load it
    from aimv2_mllm.chat import answer, load_model
    from aimv2_mllm.data.conversations import turn
    from aimv2_mllm.terminal import talk

    bot = load_model(args.model)
    if args.prompt is None:
        talk(bot, picture, args.max_new_tokens)
    else:
        question = turn(args.prompt, "", image=True)[:1]
        print(answer(bot, question, [picture], max_new_tokens=args.max_new_tokens))


def sample(args: argparse.Namespace) -> None:
    """Write a held-out sheet of the world in which a model was trained; print its path."""
    import secrets

    from aimv2_mllm.folders import stages_of

    sources = [
        kind
        for stage in stages_of(Path(args.model)).values()
        for kind in _kinds_of_sources(stage.get("data", {}))
    ]
    if not sources or set(sources) != {"handwriting"}:
        known = f"were trained on {', '.join(map(str, sources))}" if sources else "are not known"
        raise UsageError(
            f"{args.model}: its stages {known}; sheets are for models trained on handwriting: "
            "show this one a picture of your own"
        )
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    from PIL import Image

    from aimv2_mllm.data import scenes

    scene = scenes.scene(seed, "heldout", 0)
    _write_picture(Path(args.out), lambda: Image.fromarray(scenes.render(scene, args.size)))
    _note(f"what is on it: {scenes.caption(scene)} (--seed {seed})")
    print(args.out)


def _kinds_of_sources(data: dict[str, Any]) -> list[str | None]:
    """Where a stage's samples came from; records hold one source, or a list of them."""
    return [source.get("kind") for source in data.get("sources", [])] or [data.get("source")]


def _write_picture(path: Path, make: "Callable[[], Image.Image]") -> None:
    """Write what `make` returns to `path`, whole or not at all; UsageError where that cannot be."""
    from PIL import Image

    formats = Image.registered_extensions()
    suffixes = {name for name, kind in formats.items() if kind in Image.SAVE and kind in Image.OPEN}
    if os.path.isdir(path):
        raise UsageError(f"{path}: is a folder; give a file, such as {path / 'sheet.png'}")
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: its ending is no picture's; give .png, .jpg, .webp or .tiff")
    if not os.path.isdir(path.parent):
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        make().save(unfinished, format=formats[path.suffix.lower()])
        unfinished.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if os.path.exists(unfinished):
            unfinished.unlink()


def convert(args: argparse.Namespace) -> None:
    """Write an encoder from a folder or the hub in another layout, size or precision."""
    from aimv2_mllm.convert import convert as write

    words = {"layout": args.layout, "image_size": args.image_size, "dtype": args.dtype}
    print(write(args.source, Path(args.destination), **words, narrate=_note))


VERBS = {"run": run, "chat": chat, "sample": sample, "convert": convert}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every verb; parsing raises UsageError in place of argparse's own exit."""
    parser = _Parser(
        prog=PROGRAM,
        description="Train an AIMv2 encoder and a multimodal LLM on it, and talk.",
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    words = verbs.add_parser("run", help="run a recipe, or go on with it where it stopped")
    words.add_argument("recipe", metavar="RECIPE", help="a YAML file, see recipes/")
    words.add_argument(
        "overrides",
        metavar="key.sub=value",
        nargs="*",
        help="replaces a value, as in stages.tune.train.steps=100 or output=FOLDER",
    )

    words = verbs.add_parser("chat", help="ask a trained model about a picture")
    words.add_argument("model", metavar="MODEL", help="a run folder, or a folder with a Llava")
    words.add_argument("--image", metavar="FILE", help="the picture to talk about")
    words.add_argument("--prompt", metavar="TEXT", help="ask only this, print the answer and exit")
    words.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=_whole(1, MOST_NEW_TOKENS),
        default=64,
        help="longest answer, tokens (64)",
    )

    words = verbs.add_parser("sample", help="write a picture that a model has never seen")
    words.add_argument("model", metavar="MODEL", help="a run folder, or a folder with a model")
    words.add_argument("out", metavar="OUT", help="the file to write, such as sheet.png")
    words.add_argument(
        "--seed", metavar="N", type=_whole(0, MOST_SEED), help="which sheet (another each time)"
    )
    words.add_argument(
        "--size",
        metavar="PIXELS",
        type=_whole(SMALLEST_SHEET, LARGEST_SHEET),
        default=336,
        help="its side (336)",
    )

    words = verbs.add_parser("convert", help="write an AIMv2 encoder in another layout or size")
    words.add_argument("source", metavar="SRC", help="a folder, or a hub id: org/name[@revision]")
    words.add_argument("destination", metavar="DST", help="the folder to write, which is new")
    words.add_argument(
        "--layout", choices=LAYOUTS, required=True, help=f"names and config: {', '.join(LAYOUTS)}"
    )
    words.add_argument(
        "--image-size",
        metavar="PIXELS",
        type=_whole(1, LARGEST_SHEET),
        help="resize learned positions to images of this side (the source's)",
    )
    words.add_argument("--dtype", choices=DTYPES, help="precision: fp32, bf16 (the source's)")
    for parsed in (parser, *verbs.choices.values()):
        parsed.allow_abbrev = False
    return parser


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        # Not int(text), which takes digits of other scripts, and underscores.
        if text.isascii() and text.isdecimal() and len(text) < 20 and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"is {text}, must be a whole number, {low} to {high}")

    return parse


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(text: str) -> None:
    _note("\n".join(f"{PROGRAM}: {line}" for line in text.splitlines()))


def _call(argv: Sequence[str]) -> None:
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        known = f"there is {', '.join(VERBS)}{nearest(verb, VERBS)}"
        raise UsageError(f"there is no verb {verb}; {known}")
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from importlib.metadata import version

        print(version(PROGRAM))
    elif args.verb is None:
        parser.error(f"a verb is missing: {', '.join(VERBS)}")
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
        if (error.name or "").partition(".")[0] in OPTIONAL or INSTALL in str(error):
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
