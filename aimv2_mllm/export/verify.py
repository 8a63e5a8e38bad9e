"""An export, loaded in a process of its own and held against what its run said.

Each check is a line, see `checks`. Nothing of ours is imported in that process, but for the formats
that need it, which say so.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.export import adapter, answers, encoder, llava_answers
from aimv2_mllm.export.answers import SIDECAR
from aimv2_mllm.export.checks import (
    ROUNDED,
    TOLERANCE,
    Check,
    compared,
    loaded,
    recent_enough,
    seen_alike,
)
from aimv2_mllm.export.options import Options
from aimv2_mllm.export.writing import digests

# What a reference must have: of an encoder, and of what talks.
SEEN = {"picture", "pixels", "shape", "features"}
SAID = {"picture", "pixels", "input_ids", "tokens", "columns", "logits"}


def verify(folder: Path, run: str | None, say: Callable[[str], None]) -> None:
    """Say a line for each check of the export in `folder`, and of `run` where it is given.

    Raises RunFailed with the number of failed checks, UsageError for what is no export.
    """
    told = read_sidecar(folder)
    checks = [*_files(folder, told), *CHECKS[told["format"]](folder, told, run)]
    for is_right, text in checks:
        say(f"{'ok  ' if is_right else 'FAIL'}  {text}")
    failed = sum(not is_right for is_right, _ in checks)
    if failed:
        raise RunFailed(f"{folder}: {failed} of {len(checks)} checks failed, see FAIL above")
    say(f"{folder}: all {len(checks)} checks passed")


def read_sidecar(folder: Path) -> dict[str, Any]:
    """What the sidecar of an export says; UsageError where there is none."""
    path = folder / SIDECAR
    if not path.is_file():
        raise UsageError(f"{folder}: is no export, for it has no {SIDECAR}; make one by export")
    try:
        told = dict(json.loads(path.read_text(encoding="utf-8")))
        known, said = told["format"] in CHECKS, {*dict(told["reference"])}
        needed = SEEN if told["format"] == "encoder" else SAID
        if not dict(told["files"]) or (known and needed - said):
            raise ValueError(f"it lacks {', '.join(sorted(needed - said)) or 'files'}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is damaged ({error!r}); export again") from None
    if not known:
        raise UsageError(f"{path}: is of a format {told['format']!r}, which is not known here")
    return told


def _files(folder: Path, told: Mapping[str, Any]) -> list[Check]:
    """Whether every file is as it was written."""
    there, written = digests(folder), told["files"]
    absent = [name for name in written if name not in there]
    changed = [name for name in written if name in there and there[name] != written[name]]
    strange = [name for name in there if name not in written and name.endswith(".safetensors")]
    faults = [f"{n} is gone" for n in absent] + [f"{n} was changed" for n in changed]
    faults += [f"{n} was added" for n in strange]
    return [(not faults, f"files: {'; '.join(faults) or f'{len(written)} as written'}")]


def _llava(folder: Path, told: Mapping[str, Any], run: str | None) -> list[Check]:
    found = alone("llava", folder)
    checks = [recent_enough(found["transformers"], told["min_transformers"])]
    if "error" in found:
        return [*checks, (False, f"loads without aimv2_mllm: {found['error']}")]
    checks += loaded(found, "LlavaForConditionalGeneration")
    checks += compared(found, told["reference"], "the reference")
    if run is not None:
        checks += compared(found, _of_run(run, told), run)
    return checks


def _of_run(run: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What the model in `run` says itself, in the precision in which the export was written."""
    import torch

    from aimv2_mllm.chat.chat import load_model
    from aimv2_mllm.export.llava import as_trained

    bot = load_model(run, device="cpu")
    return answers.reference(
        bot.model,
        bot.processor,
        told["reference"]["tokens"],
        dtype=None if told["dtype"] is None else getattr(torch, told["dtype"]),
        ids=as_trained(bot) if told["format"] == "original-llava" else None,
    )


def alone(kind: str, folder: Path, base: str = "") -> dict[str, Any]:
    """What a fresh process finds in which `aimv2_mllm` cannot be imported; see `answers.main`."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "found.json"
        words = [kind, str(folder), str(out), base]
        return ended([sys.executable, "-P", answers.__file__, *words], out)


def ended(command: Sequence[str], out: Path) -> dict[str, Any]:
    """What `command` wrote to `out`; RunFailed where it wrote nothing."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if not out.is_file():
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise RunFailed(f"the process that should load the export did not end well: {said}")
    return dict(json.loads(out.read_text(encoding="utf-8")))


def _encoder(folder: Path, told: Mapping[str, Any], run: str | None) -> list[Check]:
    """Of the layout `transformers` by transformers alone; the others by our own loader."""
    if told["layout"] == "transformers":
        found = alone("encoder", folder)
        checks = [recent_enough(found["transformers"], told["min_transformers"])]
        if "error" in found:
            return [*checks, (False, f"loads without aimv2_mllm: {found['error']}")]
        checks += loaded(found, "Aimv2VisionModel")
    else:
        loads = f"loads with aimv2_mllm, which layout {told['layout']} needs here"
        try:
            found, checks = encoder.reference(folder), [(True, loads)]
        except UsageError as error:
            return [(False, f"{loads}: {error}")]
    checks += seen_alike(found, told["reference"], "the reference")
    if run is not None:
        with tempfile.TemporaryDirectory() as place:
            options = Options(Path(place), lambda text: None, told["dtype"])
            _, own = encoder.write_encoder(run, Path(place), options)
        checks += seen_alike(found, own["reference"], run)
    return checks


def _adapter(folder: Path, told: Mapping[str, Any], run: str | None) -> list[Check]:
    """On its base, loaded by transformers and peft alone."""
    with tempfile.TemporaryDirectory() as place:
        base, what = adapter.base_of(told, run, Path(place))
        found = alone("adapter", folder, base)
    checks = [recent_enough(found["transformers"], told["min_transformers"])]
    if "error" in found:
        return [*checks, (False, f"loads without aimv2_mllm, on its {what}: {found['error']}")]
    checks += [(True, what), *loaded(found, "LlavaForConditionalGeneration")]
    # The run's own model is the adapters merged, and then rounded to what it was trained in.
    tolerance = TOLERANCE if told["merged_in"] == "float32" else ROUNDED
    checks += compared(found, told["reference"], "the reference", tolerance)
    if run is not None:
        checks += compared(found, _of_run(run, told), run, tolerance)
    return checks


def _original(folder: Path, told: Mapping[str, Any], run: str | None) -> list[Check]:
    """By LLaVA's own loader, which needs our towers."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "found.json"
        module = "aimv2_mllm.export.llava_answers"
        found = ended([sys.executable, "-m", module, str(folder), str(out)], out)
    loads = "loads by LLaVA with the towers of aimv2_mllm, which this format needs"
    if "error" in found:
        return [(False, f"{loads}: {found['error']}")]
    checks = [(True, f"{loads}: as {found['class']} on transformers {found['transformers']}")]
    others = [(told["reference"], "the reference")]
    others += [] if run is None else [(_of_run(run, told), run)]
    for other, whose in others:
        ids = llava_answers.collapsed(other["input_ids"], told["image_token"])
        checks += compared(found, {**other, "input_ids": ids}, whose)
        if told["template"] == "v1":
            checks.append((found["asked"] == ids, f"LLaVA's own prompt: the tokens of {whose}"))
    return checks


CHECKS: dict[str, Callable[[Path, Mapping[str, Any], str | None], list[Check]]] = {
    "llava": _llava,
    "adapter": _adapter,
    "original-llava": _original,
    "encoder": _encoder,
}
