"""The command line: parse, call, exit code.

0 done; 1 a run could not go on; 2 what was asked cannot be done; 130 interrupted; 141 nobody reads
the output any more. Nothing heavy is imported before a verb needs it: `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from aimv2_mllm.errors import RunFailed, UsageError, nearest

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
MOST_NEW_TOKENS, MOST_SEED, MOST_PICTURES = 100_000, 2**63 - 1, 10**9
PROBES = ("knn", "linear", "attentive", "all", "zeroshot")
STATISTICS = ("true", "previous", "prefix")
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


VERBS = {
    "run": run,
    "chat": chat,
    "sample": sample,
    "probe": probe,
    "dream": dream,
    "convert": convert,
}


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
    _add_probe(verbs)
    _add_dream(verbs)
    _add_convert(verbs)
    for parsed in (parser, *verbs.choices.values()):
        parsed.allow_abbrev = False
    return parser


def _add_convert(verbs: Any) -> None:
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


def _add_probe(verbs: Any) -> None:
    words = verbs.add_parser("probe", help="judge an encoder's features by labelled pictures")
    words.add_argument(
        "encoder", metavar="ENCODER", help="a run folder, or the folder or hub id of an encoder"
    )
    words.add_argument(
        "data",
        metavar="DATA",
        help="handwriting, a folder of class folders (or with train/ and test/ of such), or a "
        "dataset of the datasets library, by folder or hub id",
    )
    words.add_argument("--kind", choices=PROBES, default="all", help="which probe (all)")
    words.add_argument("--out", metavar="FILE", help="write the results as JSON")
    words.add_argument("--pca", metavar="FILE", help="write a picture of features as colours")
    words.add_argument("--templates", metavar="FILE", help="for zeroshot: a prompt a line, with {}")
    counts = (
        ("--image-size", "PIXELS", 1, LARGEST_SHEET, None, "side of the pictures (the encoder's)"),
        ("--limit", "N", 2, MOST_PICTURES, None, "most pictures of each split (all)"),
        ("--k", "N", 1, MOST_PICTURES, 20, "number of neighbours (20)"),
        ("--epochs", "N", 1, 10_000, 100, "of the attentive probe (100)"),
        ("--seed", "N", 0, 2**63 - 1, 0, "of splits and of the attentive probe (0)"),
    )
    for name, metavar, low, high, default, text in counts:
        kind = _whole(low, high)
        words.add_argument(name, metavar=metavar, type=kind, default=default, help=text)


def _add_dream(verbs: Any) -> None:
    words = verbs.add_parser("dream", help="let a pre-training decoder go on with a picture")
    words.add_argument(
        "model", metavar="MODEL", help="a run folder with a pretrain stage, or its model folder"
    )
    words.add_argument("--image", metavar="FILE", help="the picture to go on with")
    words.add_argument("--sheet", action="store_true", help="a held-out sheet in its place")
    words.add_argument(
        "--seed", metavar="N", type=_whole(0, MOST_SEED), default=0, help="which sheet (0)"
    )
    words.add_argument(
        "--prefix",
        metavar="N",
        type=_whole(1, LARGEST_SHEET),
        action="append",
        help="how many patches to show (half of them); once for each column of the picture",
    )
    words.add_argument(
        "--statistics",
        choices=STATISTICS,
        default="true",
        help="whose mean and variance painted patches get back: the true patch's, those of the "
        "last patch shown, or the mean ones of the prefix (true)",
    )
    words.add_argument(
        "--out", metavar="FILE", default="dream.png", help="the picture to write (dream.png)"
    )


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
