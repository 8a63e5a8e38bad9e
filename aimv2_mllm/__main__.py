"""The command line: which verb is called, and the exit code.

0 done; 1 a run could not go on; 2 what was asked cannot be done; 130 interrupted; 141 nobody reads
the output any more. Nothing heavy is imported before a verb needs it: `--help` answers at once.
"""

import os
import sys
from collections.abc import Sequence

from aimv2_mllm.errors import RunFailed, UsageError, nearest
from aimv2_mllm.flags.parser import parse
from aimv2_mllm.narration import PROGRAM, warn
from aimv2_mllm.verbs import judging, looking, talking, training, writing

# Modules that `pip install aimv2-mllm` alone does not bring.
OPTIONAL = {
    "accelerate", "jinja2", "matplotlib", "peft", "pydantic", "sklearn", "tokenizers", "tqdm",
    "transformers", "yaml",
}  # fmt: skip
INSTALL = "pip install 'aimv2-mllm[train]'"
EXTRA = {"gradio": "demo"}  # those of other extras
# Their progress bars, warnings and reports of use are not what was asked for.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


VERBS = {
    "run": training.run,
    "doctor": training.doctor,
    "chat": talking.chat,
    "demo": talking.demo,
    "sample": talking.sample,
    "probe": looking.probe,
    "dream": looking.dream,
    "convert": writing.convert,
    "evaluate": judging.evaluate,
    "compare": judging.compare,
    "lmms-eval": judging.lmms_eval,
    "export": writing.export,
    "verify-export": writing.verify_export,
}


def _call(argv: Sequence[str]) -> None:
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        known = f"the verbs are {', '.join(VERBS)}{nearest(verb, VERBS)}"
        raise UsageError(f"unknown verb {verb}; {known}")
    args = parse(argv)
    if args.version:
        from importlib.metadata import version

        print(version(PROGRAM))
    elif args.verb is None:
        raise UsageError(f"a verb is missing: {', '.join(VERBS)}; see {PROGRAM} --help")
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
        warn(str(error))
        return 2
    except RunFailed as error:
        warn(str(error))
        return 1
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in EXTRA:
            warn(f"{error}: pip install 'aimv2-mllm[{EXTRA[missing]}]'")
            return 2
        if missing in OPTIONAL or INSTALL in str(error):
            warn(f"{error}: {INSTALL}" if INSTALL not in str(error) else str(error))
            return 2
        raise
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            warn("interrupted")
        return 130
    except BrokenPipeError:
        # The interpreter flushes once more on its way out, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
