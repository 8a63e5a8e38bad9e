"""The verbs that write models for other tools, and hold them against ours: convert, export and
verify-export."""

import argparse
import shlex
from pathlib import Path

from aimv2_mllm.narration import note
from aimv2_mllm.verbs.telling import program


def convert(args: argparse.Namespace) -> None:
    """Write an encoder from a folder or the hub in another layout, size or precision."""
    from aimv2_mllm.export.convert import convert as write

    said = write(
        args.source,
        Path(args.destination),
        layout=args.layout,
        image_size=args.image_size,
        dtype=args.dtype,
        narrate=note,
    )
    print(said)


def export(args: argparse.Namespace) -> None:
    """Write a finished result as a folder that other tools load."""
    from aimv2_mllm.export.formats import export as write

    chosen = {"dtype": args.dtype, "max-shard-size": args.max_shard_size, "layout": args.layout}
    destination = Path(args.destination)
    said = write(args.run, destination, format_=args.format, narrate=note, chosen=chosen)
    check = shlex.join(["verify-export", args.destination, args.run])
    print(f"{said}\nto check it: {program()} {check}")


def verify_export(args: argparse.Namespace) -> None:
    """Load an export in a process of its own and print a line for each check."""
    from aimv2_mllm.export.verify import verify

    verify(Path(args.folder), args.run, print)
