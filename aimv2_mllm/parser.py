"""The words of the command line: verbs, flags, and what their values may be."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from aimv2_mllm.errors import UsageError
from aimv2_mllm.sampling import RANGES

PROGRAM = "aimv2-mllm"
SMALLEST_SHEET, LARGEST_SHEET = 28, 4096  # pixels, the sides of images that a recipe allows
MOST_NEW_TOKENS, MOST_SEED, MOST_PICTURES = 100_000, 2**63 - 1, 10**9
MOST_DEVICES = 100_000
ACCELERATORS = (
    "a100-40", "a100", "h100", "h100-pcie", "h200", "gh200", "b200", "l40s", "l4", "rtx4090",
    "rtx3090",
)  # fmt: skip
PROBES = ("knn", "linear", "attentive", "all", "zeroshot")
STATISTICS = ("true", "previous", "prefix")
METRICS = ("exact", "vqa", "choice", "yesno", "anls", "relaxed", "caption")
FORMATS = ("llava", "adapter", "original-llava", "encoder")
MANY = {"run": "overrides", "doctor": "overrides", "demo": "models"}  # what may be given many times
LAYOUTS, DTYPES = ("original", "transformers", "timm"), ("fp32", "bf16")


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
    _add_recipe(words)
    words.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: print sizes, memory, hours and every problem; exit code 2 if there is "
        "one",
    )
    words.add_argument(
        "--accelerator",
        metavar="NAME",
        help=f"for --dry-run: {', '.join(ACCELERATORS)} (the device at hand)",
    )
    words.add_argument(
        "--devices",
        metavar="N",
        type=_whole(1, MOST_DEVICES),
        help="for --dry-run: how many processes train together, one a device (1)",
    )
    words.add_argument(
        "--utilisation",
        metavar="PERCENT",
        type=_whole(1, 100),
        help="for --dry-run: share of the device's peak operations that is reached (40)",
    )

    words = verbs.add_parser(
        "doctor", help="look in seconds at what a run would start with; exit code 2 for a problem"
    )
    _add_recipe(words)

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
    _add_chat(verbs)
    _add_demo(verbs)
    _add_probe(verbs)
    _add_dream(verbs)
    _add_convert(verbs)
    _add_evaluate(verbs)
    _add_compare(verbs)
    _add_lmms_eval(verbs)
    _add_export(verbs)
    for parsed in (parser, *verbs.choices.values()):
        parsed.allow_abbrev = False
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What the words of a command say; UsageError for what they cannot.

    argparse takes words of which there may be many in one row alone: those that come after a flag
    are put to them here, so that `run RECIPE --dry-run key=value` is what it looks like.
    """
    parser = build_parser()
    args, left = parser.parse_known_args(argv)
    many = MANY.get(args.verb)
    while many is not None and left and not left[0].startswith("-"):
        getattr(args, many).append(left.pop(0))
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


def _add_recipe(words: argparse.ArgumentParser) -> None:
    words.add_argument("recipe", metavar="RECIPE", help="a YAML file, see recipes/")
    words.add_argument(
        "overrides",
        metavar="key.sub=value",
        nargs="*",
        help="replaces a value, as in stages.tune.train.steps=100 or output=FOLDER",
    )


def _add_chat(verbs: Any) -> None:
    words = verbs.add_parser("chat", help="ask a trained model about a picture")
    words.add_argument("model", metavar="MODEL", help="a run folder, or a folder with a Llava")
    words.add_argument(
        "--image", metavar="FILE", action="append", help="the picture to talk about; once for each"
    )
    words.add_argument("--prompt", metavar="TEXT", help="ask only this, print the answer and exit")
    words.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    counts = _whole(1, MOST_NEW_TOKENS)
    words.add_argument(
        "--max-tokens", metavar="N", type=counts, default=64, help="longest answer, tokens (64)"
    )
    settings = (
        ("--temperature", "T", float, 0.0, "how freely answers vary; 0: the likeliest (0)"),
        ("--top-p", "P", float, 1.0, "draw from the likeliest that make up this share (1, all)"),
        ("--top-k", "N", int, 0, "draw from so many likeliest tokens (0, all)"),
        ("--seed", "N", int, None, "makes drawn answers repeatable (another each time)"),
    )
    for name, metavar, kind, default, text in settings:
        parse = _setting(name, kind)
        words.add_argument(name, metavar=metavar, type=parse, default=default, help=text)
    words.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="an answer ends before this; once for each text",
    )


def _add_demo(verbs: Any) -> None:
    words = verbs.add_parser("demo", help="talk to models in a browser, look inside, compare them")
    words.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="run folders, or folders with a Llava (runs/quickstart)",
    )
    words.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="where to listen (127.0.0.1)"
    )
    words.add_argument(
        "--port", metavar="N", type=_whole(1, 65535), default=7860, help="where to listen (7860)"
    )
    doors = words.add_mutually_exclusive_group()
    doors.add_argument(
        "--login", metavar="FILE", help="only those may visit who know a line NAME:PASSWORD of it"
    )
    doors.add_argument(
        "--no-login", action="store_true", help="with --share, or another --host: let everybody in"
    )
    words.add_argument(
        "--share", action="store_true", help="open it to the internet by Gradio's own servers"
    )


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


def _add_export(verbs: Any) -> None:
    words = verbs.add_parser("export", help="write a result as a folder that other tools load")
    words.add_argument("run", metavar="RUN", help="a run folder, or a stage's model folder")
    words.add_argument("destination", metavar="DST", help="the folder to write, which is new")
    words.add_argument(
        "--format", choices=FORMATS, default="llava", help=f"{', '.join(FORMATS)} (llava)"
    )
    words.add_argument("--dtype", choices=DTYPES, help="precision: fp32, bf16 (the source's)")
    words.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a file of weights, such as 2GB or 500MB (5GB)"
    )
    words.add_argument(
        "--layout", choices=LAYOUTS, help=f"of an encoder: {', '.join(LAYOUTS)} (original)"
    )
    words = verbs.add_parser(
        "verify-export", help="load an export without this package and compare what it says"
    )
    words.add_argument("folder", metavar="DST", help="what export wrote")
    words.add_argument(
        "run", metavar="RUN", nargs="?", help="what it was made of: compare with its model too"
    )


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


def _add_evaluate(verbs: Any) -> None:
    words = verbs.add_parser("evaluate", help="ask a model the questions of a data set, and judge")
    words.add_argument(
        "model",
        metavar="MODEL",
        help="a run folder, or the folder or hub id of an image-text model",
    )
    words.add_argument(
        "data",
        metavar="DATA",
        help="JSON lines with image, question and answers, a folder with questions.csv, or a "
        "dataset of the datasets library, by folder or hub id",
    )
    words.add_argument(
        "--out", metavar="FOLDER", default="evaluation", help="answers and report (evaluation)"
    )
    _add_judging(words)


def _add_judging(words: argparse.ArgumentParser) -> None:
    """What `evaluate` and `compare` are told about the questions."""
    words.add_argument(
        "--metric", choices=METRICS, default="exact", help=f"{', '.join(METRICS)} (exact)"
    )
    words.add_argument(
        "--prompt",
        metavar="TEXT",
        help="what is asked, with {question} and, where there are any, {choices} in it",
    )
    words.add_argument("--root", metavar="FOLDER", help="where pictures lie (the file's folder)")
    words.add_argument(
        "--column",
        metavar="FIELD=NAME",
        action="append",
        help="what image, question, answers, type, id or choices is called in the data; may be "
        "given several times",
    )
    words.add_argument("--split", metavar="NAME", default="test", help="of a dataset (test)")
    counts = (
        ("--limit", MOST_PICTURES, None, "first so many questions (all)"),
        ("--batch-size", 10_000, 8, "questions at once (8)"),
        ("--max-new-tokens", MOST_NEW_TOKENS, 64, "longest answer, tokens (64)"),
    )
    for name, high, default, text in counts:
        words.add_argument(name, metavar="N", type=_whole(1, high), default=default, help=text)
    words.add_argument(
        "--no-controls",
        dest="controls",
        action="store_false",
        help="do not ask again without a picture and with another question's",
    )


def _add_compare(verbs: Any) -> None:
    words = verbs.add_parser(
        "compare", help="train variants of a recipe, towers or connectors, and judge them alike"
    )
    _add_recipe(words)
    words.add_argument(
        "--vary",
        metavar="KEY=A,B",
        action="append",
        required=True,
        help="what varies, once for each: tower, connector, llm, image_size of the tower, or a key "
        "of the recipe such as stages.tune.lora.r",
    )
    words.add_argument(
        "--seeds", metavar="N", type=_whole(1, 100), default=1, help="repeat every run so often (1)"
    )
    words.add_argument(
        "--jobs", metavar="N", type=_whole(1, 256), default=1, help="runs at a time (1)"
    )
    words.add_argument(
        "--launcher",
        metavar="WORDS",
        help='what starts each run, such as "torchrun --nproc_per_node 8"',
    )
    words.add_argument(
        "--data",
        metavar="DATA",
        help="the questions, as evaluate takes them (held-out sheets, where a recipe knows nothing "
        "but handwriting)",
    )
    words.add_argument(
        "--out", metavar="FOLDER", default="comparison", help="runs and report (comparison)"
    )
    _add_judging(words)


def _add_lmms_eval(verbs: Any) -> None:
    words = verbs.add_parser(
        "lmms-eval", help="let lmms-eval ask a model and judge, in an environment of its own"
    )
    words.add_argument(
        "model",
        metavar="MODEL",
        help="a run folder, or the folder or hub id of an image-text model",
    )
    words.add_argument(
        "tasks",
        metavar="TASKS",
        help="names of lmms-eval's tasks, as in mme,gqa, or a file of benchmarks such as "
        "recipes/benchmarks/paper.yaml",
    )
    words.add_argument(
        "--out", metavar="FOLDER", default="lmms-eval", help="answers and table (lmms-eval)"
    )
    words.add_argument(
        "--environment",
        metavar="FOLDER",
        default=".venv-lmms-eval",
        help="its virtual environment, made where there is none (.venv-lmms-eval)",
    )
    words.add_argument("--include-path", metavar="FOLDER", help="where more tasks are")
    counts = (
        ("--limit", MOST_PICTURES, None, "first so many questions of each task (all)"),
        ("--batch-size", 10_000, 8, "questions at once (8)"),
        ("--processes", MOST_DEVICES, 1, "how many ask together, one a device (1)"),
    )
    for name, high, default, text in counts:
        words.add_argument(name, metavar="N", type=_whole(1, high), default=default, help=text)
    words.add_argument("--dtype", choices=DTYPES, help="precision: fp32, bf16 (the model's)")
    words.add_argument(
        "--simple",
        action="store_true",
        help="ask by text and pictures instead of messages, as tasks that compare likelihoods want",
    )
    words.add_argument(
        "--print", action="store_true", help="only print the commands that would be run"
    )


def _setting(flag: str, kind: type[int] | type[float]) -> Callable[[str], Any]:
    """What reads the flag of one of the `RANGES` of sampling."""
    name = flag.removeprefix("--").replace("-", "_")
    low, high, allowed = RANGES[name]

    def parse(text: str) -> Any:
        value: float | None = None
        if text.isascii() and "_" not in text:  # which Python's own numbers may have
            with suppress(ValueError):
                value = kind(text)
        is_off = value == 0 and allowed.startswith("0 (")
        if value is None or not (is_off or low <= value <= high):
            raise argparse.ArgumentTypeError(f"is {text}, must be {allowed}")
        return value

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        # Not int(text), which takes digits of other scripts, and underscores.
        if text.isascii() and text.isdecimal() and len(text) < 20 and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"is {text}, must be a whole number, {low} to {high}")

    return parse
