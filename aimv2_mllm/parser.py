"""The words of the command line: verbs, flags, and what their values may be."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from aimv2_mllm.errors import UsageError

PROGRAM = "aimv2-mllm"
SMALLEST_SHEET, LARGEST_SHEET = 28, 4096  # pixels, the sides of images that a recipe allows
MOST_NEW_TOKENS, MOST_SEED, MOST_PICTURES = 100_000, 2**63 - 1, 10**9
MOST_DEVICES = 100_000
ACCELERATORS = (
    "a100-40", "a100", "h100", "h100-pcie", "h200", "gh200", "b200", "l40s", "l4",
)  # fmt: skip
PROBES = ("knn", "linear", "attentive", "all", "zeroshot")
STATISTICS = ("true", "previous", "prefix")
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
    _add_demo(verbs)
    _add_probe(verbs)
    _add_dream(verbs)
    _add_convert(verbs)
    for parsed in (parser, *verbs.choices.values()):
        parsed.allow_abbrev = False
    return parser


def _add_recipe(words: argparse.ArgumentParser) -> None:
    words.add_argument("recipe", metavar="RECIPE", help="a YAML file, see recipes/")
    words.add_argument(
        "overrides",
        metavar="key.sub=value",
        nargs="*",
        help="replaces a value, as in stages.tune.train.steps=100 or output=FOLDER",
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
    words.add_argument(
        "--login", metavar="FILE", help="only those may visit who know a line NAME:PASSWORD of it"
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
