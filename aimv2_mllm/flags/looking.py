"""The flags of the verbs that show what was learned without a word of chat: probe and dream."""

from typing import Any

from aimv2_mllm.flags.values import LARGEST_SHEET, MOST_PICTURES, whole
from aimv2_mllm.model.sampling import MOST_SEED

PROBES = ("knn", "linear", "attentive", "all", "zeroshot")
STATISTICS = ("true", "previous", "prefix")


def add_probe(verbs: Any) -> None:
    """Add `probe` with its flags to the `verbs`."""
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
        ("--seed", "N", 0, MOST_SEED, 0, "of splits and of the attentive probe (0)"),
    )
    for name, metavar, low, high, default, text in counts:
        kind = whole(low, high)
        words.add_argument(name, metavar=metavar, type=kind, default=default, help=text)


def add_dream(verbs: Any) -> None:
    """Add `dream` with its flags to the `verbs`."""
    words = verbs.add_parser("dream", help="let a pre-training decoder go on with a picture")
    words.add_argument(
        "model", metavar="MODEL", help="a run folder with a pretrain stage, or its model folder"
    )
    words.add_argument("--image", metavar="FILE", help="the picture to go on with")
    words.add_argument("--sheet", action="store_true", help="a held-out sheet in its place")
    words.add_argument(
        "--seed", metavar="N", type=whole(0, MOST_SEED), default=0, help="which sheet (0)"
    )
    words.add_argument(
        "--prefix",
        metavar="N",
        type=whole(1, LARGEST_SHEET),
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
