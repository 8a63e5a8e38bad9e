"""The command `aimv2-llava`: LLaVA's own programs with our towers and connectors in place.

0 done; 2 what was asked cannot be done, or the doctor found a fault; 130 interrupted. Several
devices: `torchrun --nproc_per_node 8 -m aimv2_mllm.towers.llava_command train ...`.
"""

import argparse
import importlib.util
import runpy
import sys
from collections.abc import Callable, Sequence

from ..errors import UsageError, nearest
from .llava import install

PROGRAM = "aimv2-llava"
HELP = """usage: aimv2-llava VERB FLAGS

  train          llava.train.train; also --unfreeze_mm_vision_tower True, --mm_vision_tower_lr
  doctor         the flags of train: everything that is checked before a run, in seconds
  chat           llava.serve.cli
  worker         llava.serve.model_worker
  eval SCRIPT    llava.eval.SCRIPT, such as model_vqa

FLAGS are LLaVA's own; with --help after the verb it lists them. Of ours are
  --vision_tower aimv2:FOLDER_OR_HUB_ID   with ?image_size=448 behind it for larger images
  --mm_projector_type pixel_shuffle, average_pool:factor=2, resampler:num_queries=64, ...
  --samples N    doctor: how many samples it reads (64)
"""


def train(words: Sequence[str]) -> None:
    """LLaVA's training, after its flags have been checked."""
    from .llava_flags import check_flags, read_flags
    from .llava_training import install as install_training

    module = install_training()
    flags = read_flags(module, words)
    check_flags(flags)
    sys.argv = [f"{PROGRAM} train", *words]
    module.train(attn_implementation=flags.training.attn_implementation)


def doctor(words: Sequence[str]) -> None:
    """What a run would be, looked at before it is one."""
    from .llava_doctor import examine

    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--samples", type=int, default=64)
    known, rest = own.parse_known_args(list(words))
    faults = examine(rest, num_samples=known.samples, say=print)
    if faults:
        raise UsageError(f"{faults} fault{'s' * (faults > 1)} found, see FAULT above")


def chat(words: Sequence[str]) -> None:
    """LLaVA's conversation at a keyboard."""
    _check_model(words)
    _program("llava.serve.cli", words)


def worker(words: Sequence[str]) -> None:
    """LLaVA's model worker, for its web server."""
    _check_model(words)
    _program("llava.serve.model_worker", words)


def evaluate(words: Sequence[str]) -> None:
    """One of LLaVA's scripts of evaluation."""
    if not words or words[0].startswith("-"):
        raise UsageError("eval needs the name of a script of llava.eval, such as model_vqa")
    name, *rest = words
    if importlib.util.find_spec(f"llava.eval.{name}") is None:
        raise UsageError(f"there is no script {name} in llava.eval")
    _check_model(rest)
    _program(f"llava.eval.{name}", rest)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "doctor": doctor,
    "chat": chat,
    "worker": worker,
    "eval": evaluate,
}


def _check_model(words: Sequence[str]) -> None:
    from .llava_flags import check_model

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path")
    parser.add_argument("--model-base")
    known, _ = parser.parse_known_args(list(words))
    if known.model_path is not None:
        check_model(known.model_path, known.model_base)


def _program(module: str, words: Sequence[str]) -> None:
    """Run a program of LLaVA as it runs itself."""
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        raise UsageError(f"{module} needs {error.name}: pip install {error.name}") from None


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code."""
    verb, *rest = list(sys.argv[1:] if words is None else words) or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP, end="")
        return 0
    try:
        if verb not in VERBS:
            raise UsageError(
                f"unknown verb {verb!r}; the verbs are {', '.join(VERBS)}{nearest(verb, VERBS)}"
            )
        install()
        VERBS[verb](rest)
    except UsageError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
