"""The verbs that show what was learned without a word of chat: probe and dream."""

import argparse
from pathlib import Path

from aimv2_mllm.errors import UsageError
from aimv2_mllm.verbs.talking import demand_handwriting


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
        demand_handwriting(Path(args.model))
    picture = None if args.sheet else open_image(args.image)
    from aimv2_mllm.seeing import dream as dream_of

    dream_of(args, picture)
