"""The model card of an export: where it comes from, how it was made, what it is good for, and under
what licence; the same for a reader as for the hub.
"""

import json
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path, PurePath
from typing import Any

import yaml

from aimv2_mllm.export.source import ExportSource
from aimv2_mllm.export.usage import TITLES, usage
from aimv2_mllm.folders import (
    CARD_FILE,
    RECIPE_FILE,
    TALKING,
    UNKNOWN,
    digest_of,
    result_of,
    stage_record,
)
from aimv2_mllm.model.hub import HUB_ID

# Licences that the hub knows by these words; any other is written out as license_name.
HUB_LICENCES = (
    "apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "gemma", "apple-amlr", "apple-ascl",
)  # fmt: skip
APPLE = "apple-amlr"
WARNING = (
    "**Apple's AIMv2 weights are in it, under apple-amlr**: for research only, never commercially, "
    "and so is all that is derived from them, this model included. A copy of that licence and its "
    "attribution must go along."
)


def write_card(folder: Path, source: ExportSource, told: Mapping[str, Any], *, name: str) -> None:
    """Write README.md for the export `told` of in the sidecar, called `name`, to `folder`."""
    front = yaml.safe_dump(front_matter(source, told), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---\n\n# {name}",
        f"{TITLES[told['format']]} Made by {told['made_by']}.",
        "\n\n".join(_stages(source, told["format"])) or "How it was trained is not known here.",
        f"## How to use it\n\n{usage(name, told)}",
        f"## Licences\n\n{_licences(source)}",
    ]
    (folder / CARD_FILE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def front_matter(source: ExportSource, told: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads of a model card."""
    licence = source.licence
    known = licence.lower() in HUB_LICENCES
    named = {"license": licence.lower()} if known else {"license": "other", "license_name": licence}
    base = [one["source"] for one in source.origins if HUB_ID.fullmatch(one["source"])]
    library = {"adapter": "peft", "llava": "transformers"}.get(told["format"])
    if told["format"] == "encoder" and told.get("layout") != "original":
        library = told["layout"]
    sees = "image-feature-extraction" if told["format"] == "encoder" else "image-text-to-text"
    return {
        **named,
        **({"library_name": library} if library else {}),
        "pipeline_tag": sees,
        **({"base_model": base} if base else {}),
        "tags": ["aimv2", "vision", "aimv2-mllm"],
    }


def _stages(source: ExportSource, format_: str) -> list[str]:
    """A chapter for each stage of the run that what is exported was made by: data, figures, recipe;
    and one for its evaluation."""
    found = []
    for record in _records(source):
        recipe, last = record["recipe"], record.get("last") or {}
        lines = [f"## Stage {record['stage']} ({record['kind']})", _data(record)]
        told = {key: last[key] for key in ("step", "samples", "tokens") if key in last}
        losses = {k: round(last[k], 4) for k in ("total", "text", "image") if k in last}
        figures = ", ".join(f"{key} {value:,}" for key, value in told.items())
        if losses:
            figures += "; last losses " + ", ".join(f"{k} {v}" for k, v in losses.items())
        lines.append(f"Figures: {figures}; {record.get('seconds', '?')} s.")
        lines.append(f"```yaml\n{yaml.safe_dump(_nameless(recipe), sort_keys=False)}```")
        found.append("\n\n".join(lines))
    summary = _summary(source, format_)
    if summary:
        rows = "\n".join(f"| {key} | {value} |" for key, value in summary.items())
        found.append(f"## Evaluation of the run\n\n| measure | value |\n|---|---|\n{rows}")
    return found


def _records(source: ExportSource) -> list[dict[str, Any]]:
    """The records of the run's stages that the exported one was made from, and its own."""
    if source.run is None or not source.record:
        return [source.record] if "recipe" in source.record else []
    raw = yaml.safe_load((source.run / RECIPE_FILE).read_text(encoding="utf-8"))
    made_by = {*source.record.get("parents", []), source.record["stage"]}
    names = [name for name in raw["stages"] if name in made_by]
    records = [stage_record(result_of(source.run, name)) for name in names]
    return [record for record in records if "recipe" in record]


def _data(record: Mapping[str, Any]) -> str:
    """The stage's sources, a line each."""
    rows = dict(enumerate(record.get("rows") or []))
    lines = []
    for number, one in enumerate(record["recipe"].get("data", {}).get("sources", [])):
        named = [str(one[key]) for key in ("file", "dataset", "folder", "urls") if one.get(key)]
        name = ", ".join(PurePath(text).name if text[0] in "/~" else text for text in named)
        count = rows.get(number)
        counted = f", {count:,} rows" if count else ""
        lines.append(f"- {one.get('kind')} {name}".rstrip() + f"{counted}, weight {one['weight']}")
    return "Data:\n\n" + "\n".join(lines) if lines else "Data: not recorded."


def _nameless(value: Any) -> Any:
    """`value` with the last piece alone of each path of this machine."""
    if isinstance(value, dict):
        return {key: _nameless(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_nameless(one) for one in value]
    is_path = isinstance(value, str) and value[:1] in ("/", "~")
    return PurePath(value).name if is_path else value


def _summary(source: ExportSource, format_: str) -> dict[str, Any]:
    """The plain numbers of the run's evaluation, if there is one and it is of what is exported: the
    result of the run's last stage, and no encoder out of a model that talks."""
    path = None if source.run is None else source.run / "summary.json"
    if path is None or not isfile(path) or "files" not in source.record:
        return {}
    record = source.record
    if format_ == "encoder" and record["kind"] in TALKING:
        return {}
    numbers = json.loads(path.read_text(encoding="utf-8"))
    judged = list(numbers.get("made_from", {}).get("results", {}).items())
    if judged[-1:] != [(record["stage"], digest_of(record))]:
        return {}
    return {
        key: round(value, 4)
        for key, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "seconds"
    }


def _licences(source: ExportSource) -> str:
    lines = [f"- this model: {source.licence}"]
    lines += [
        f"- {one['source']} (revision {one['revision']}): {one['licence']}"
        for one in source.origins
    ]
    if any(one["licence"] == UNKNOWN for one in source.origins):
        lines.append("\nWhat is unknown must be looked up where the model came from.")
    if any(APPLE in one["licence"].lower() for one in source.origins):
        lines.append(f"\n{WARNING}")
    return "\n".join(lines)
