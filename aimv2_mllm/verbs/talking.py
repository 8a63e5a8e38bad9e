"""The verbs that talk about pictures: chat, demo, and sample, which paints one.

Refuses to open the demo to others without a login, and to paint sheets for models of other worlds.
"""

import argparse
import os
import sys
from pathlib import Path

from aimv2_mllm.errors import UsageError
from aimv2_mllm.narration import note
from aimv2_mllm.verbs.telling import program

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def chat(args: argparse.Namespace) -> None:
    """Answer one question about a picture, or as many as are asked."""
    from aimv2_mllm.data.pictures.images import open_image
    from aimv2_mllm.folders import talking_folder
    from aimv2_mllm.model.sampling import Sampling

    if args.image is None:
        raise UsageError(
            "chat needs --image FILE; to make a picture that the model can know: "
            f"{program()} sample {args.model} sheet.png"
        )
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt is empty: ask something, or leave it out to ask by keyboard")
    if args.system is not None and not args.system.strip():
        raise UsageError("--system is empty: say something, or leave it out")
    pictures = [open_image(file) for file in args.image]
    sampling = Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    talking_folder(Path(args.model))  # seconds before torch is there to load it
    from aimv2_mllm.chat.chat import answer, load_model
    from aimv2_mllm.chat.terminal import talk
    from aimv2_mllm.data.talks.conversations import said

    bot = load_model(args.model)
    if args.prompt is None:
        talk(bot, pictures, args.max_tokens, system=args.system, sampling=sampling)
        return
    system = [] if args.system is None else [said("system", args.system)]
    asked = [*system, said("user", args.prompt, pictures=len(pictures))]
    print(answer(bot, asked, pictures, max_new_tokens=args.max_tokens, sampling=sampling))


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
    here = Path(__file__).resolve().parents[1]
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

    demand_handwriting(Path(args.model))
    demand_picture_place(Path(args.out), "sheet.png")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    from PIL import Image

    from aimv2_mllm.data.handwriting import scenes

    scene = scenes.scene(seed, "heldout", 0)
    write_picture(Path(args.out), Image.fromarray(scenes.render(scene, args.size)))
    note(f"what is on it: {scenes.caption(scene)} (--seed {seed})")
    print(args.out)


def demand_handwriting(model: Path) -> None:
    """UsageError for a model that was not trained on handwriting alone."""
    from aimv2_mllm.folders import stages_of

    sources = [
        source.get("kind")
        for stage in stages_of(model).values()
        for source in stage.get("data", {}).get("sources", [])
    ]
    if not sources or set(sources) != {"handwriting"}:
        known = f"were trained on {', '.join(map(str, sources))}" if sources else "are not known"
        raise UsageError(
            f"{model}: its stages {known}; sheets are for models trained on handwriting: "
            "show this one a picture of your own"
        )
