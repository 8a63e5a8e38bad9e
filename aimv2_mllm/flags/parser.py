"""The words of the command line: every verb, and how its words are read."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from aimv2_mllm.errors import UsageError
from aimv2_mllm.flags.judging import add_compare, add_evaluate, add_lmms_eval
from aimv2_mllm.flags.looking import add_dream, add_probe
from aimv2_mllm.flags.values import (
    LARGEST_SHEET,
    MOST_DEVICES,
    MOST_NEW_TOKENS,
    PRECISIONS,
    SMALLEST_SHEET,
    add_recipe,
    setting,
    whole,
)
from aimv2_mllm.model.sampling import MOST_SEED
from aimv2_mllm.narration import PROGRAM

ACCELERATORS = (
    "a100-40", "a100", "h100", "h100-pcie", "h200", "gh200", "b200", "l40s", "l4", "rtx4090",
    "rtx3090",
)  # fmt: skip
FORMATS = ("llava", "adapter", "original-llava", "encoder")
LAYOUTS = ("original", "transformers", "timm")


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
    _add_run(verbs)
    _add_sample(verbs)
    _add_chat(verbs)
    _add_demo(verbs)
    add_probe(verbs)
    add_dream(verbs)
    _add_convert(verbs)
    add_evaluate(verbs)
    add_compare(verbs)
    add_lmms_eval(verbs)
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
    many = getattr(args, "many", None)
    while many is not None and left and not left[0].startswith("-"):
        getattr(args, many).append(left.pop(0))
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


def _add_run(verbs: Any) -> None:
    words = verbs.add_parser("run", help="run a recipe, or go on with it where it stopped")
    add_recipe(words)
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
        type=whole(1, MOST_DEVICES),
        help="for --dry-run: how many processes train together, one per device (1)",
    )
    words.add_argument(
        "--utilisation",
        metavar="PERCENT",
        type=whole(1, 100),
        help="for --dry-run: share of the device's peak operations that is reached (40)",
    )

    words = verbs.add_parser(
        "doctor", help="look in seconds at what a run would start with; exit code 2 for a problem"
    )
    add_recipe(words)


def _add_sample(verbs: Any) -> None:
    words = verbs.add_parser("sample", help="write a picture that a model has never seen")
    words.add_argument("model", metavar="MODEL", help="a run folder, or a folder with a model")
    words.add_argument("out", metavar="OUT", help="the file to write, such as sheet.png")
    words.add_argument(
        "--seed", metavar="N", type=whole(0, MOST_SEED), help="which sheet (another each time)"
    )
    words.add_argument(
        "--size",
        metavar="PIXELS",
        type=whole(SMALLEST_SHEET, LARGEST_SHEET),
        default=336,
        help="its side (336)",
    )


def _add_chat(verbs: Any) -> None:
    words = verbs.add_parser("chat", help="ask a trained model about a picture")
    words.add_argument("model", metavar="MODEL", help="a run folder, or a folder with a Llava")
    words.add_argument(
        "--image", metavar="FILE", action="append", help="the picture to talk about; once for each"
    )
    words.add_argument("--prompt", metavar="TEXT", help="ask only this, print the answer and exit")
    words.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    counts = whole(1, MOST_NEW_TOKENS)
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
        parse = setting(name, kind)
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
    words.set_defaults(many="models")
    words.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="where to listen (127.0.0.1)"
    )
    words.add_argument(
        "--port", metavar="N", type=whole(1, 65535), default=7860, help="where to listen (7860)"
    )
    doors = words.add_mutually_exclusive_group()
    doors.add_argument(
        "--login", metavar="FILE", help="file with one NAME:PASSWORD a line; only these may log in"
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
        type=whole(1, LARGEST_SHEET),
        help="resize learned positions to images of this side (the source's)",
    )
    words.add_argument("--dtype", choices=PRECISIONS, help="precision: fp32, bf16 (the source's)")


def _add_export(verbs: Any) -> None:
    words = verbs.add_parser("export", help="write a result as a folder that other tools load")
    words.add_argument("run", metavar="RUN", help="a run folder, or a stage's model folder")
    words.add_argument("destination", metavar="DST", help="the folder to write, which is new")
    words.add_argument(
        "--format", choices=FORMATS, default="llava", help=f"{', '.join(FORMATS)} (llava)"
    )
    words.add_argument("--dtype", choices=PRECISIONS, help="precision: fp32, bf16 (the source's)")
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
