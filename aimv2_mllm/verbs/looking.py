"""The verbs that show what was learned without a word of chat: probe and dream."""

import argparse
import json
from pathlib import Path
from typing import Any

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
    from aimv2_mllm.verbs.seeing import as_table

    found = _zero_shot(args) if args.kind == "zeroshot" else _probed(args)
    results = {"encoder": args.encoder, "source": args.data} | found
    print(as_table(results))
    if args.out:
        text = json.dumps(results, indent=2, allow_nan=False) + "\n"
        files.write(Path(args.out), lambda file: file.write_text(text, encoding="utf-8"))


def _probed(args: argparse.Namespace) -> dict[str, Any]:
    """What the probe of that kind (or `all`) tells of the tower; its features are drawn."""
    from aimv2_mllm.data.questions.labelled import load_labelled
    from aimv2_mllm.evaluation.probes import KINDS
    from aimv2_mllm.evaluation.probes import probe as probe_tower
    from aimv2_mllm.files import write_picture
    from aimv2_mllm.model.towers import load_tower
    from aimv2_mllm.verbs.seeing import features_picture

    data = load_labelled(args.data, seed=args.seed, limit=args.limit)
    tower = load_tower(args.encoder, image_size=args.image_size).float()
    kinds = list(KINDS) if args.kind == "all" else [args.kind]
    results = probe_tower(tower, data, kinds, seed=args.seed, k=args.k, epochs=args.epochs)
    if args.pca:
        write_picture(Path(args.pca), features_picture(tower, data, args.seed))
    return results


def _zero_shot(args: argparse.Namespace) -> dict[str, Any]:
    """What a LiT model tells by the names of the classes in its prompts."""
    from aimv2_mllm.data.questions.labelled import load_labelled
    from aimv2_mllm.evaluation import zeroshot

    templates = zeroshot.read_templates(Path(args.templates))
    data = load_labelled(args.data, seed=args.seed, limit=args.limit)
    tower, encode = zeroshot.load_lit_tower(args.encoder)
    return zeroshot.zero_shot(tower, encode, data, templates)


def dream(args: argparse.Namespace) -> None:
    """Let a pre-training decoder paint and caption a picture; print the caption and the file."""
    from aimv2_mllm import files

    if (args.image is None) == (not args.sheet):
        raise UsageError("dream needs one picture: --image FILE, or --sheet for a held-out sheet")
    files.demand_picture_place(Path(args.out))
    from aimv2_mllm.data.pictures.images import open_image

    if args.sheet:
        demand_handwriting(Path(args.model))
    picture = None if args.sheet else open_image(args.image)
    from PIL import Image

    from aimv2_mllm.data.handwriting import scenes
    from aimv2_mllm.evaluation.painter import Painter
    from aimv2_mllm.folders import pretrained_folder
    from aimv2_mllm.verbs.seeing import UNPAINTED
    from aimv2_mllm.verbs.seeing import dream as dream_of

    painter = Painter(pretrained_folder(Path(args.model)))
    if picture is None:
        scene = scenes.scene(args.seed, "heldout", 0)
        picture = Image.fromarray(scenes.render(scene, painter.preprocessing.image_size))
    caption, made = dream_of(
        painter, picture, prefixes=args.prefix or (), statistics=args.statistics
    )
    files.write_picture(Path(args.out), made)
    if args.sheet:
        print(f"sheet:   {scenes.caption(scene)} (--seed {args.seed})")
    print(f"caption: {caption}")
    if not painter.paints:
        print(f"painted: {UNPAINTED}")
    print(f"picture: {args.out}")
