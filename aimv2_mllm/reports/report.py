"""The report of a finished run: `summary.json`, `report.html`, `report.md` and their pictures.

Owns when a run is judged again and that its report is whole or not there.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from aimv2_mllm.disk import write_synced
from aimv2_mllm.errors import RunFailed
from aimv2_mllm.evaluation.summary import Findings, evaluate
from aimv2_mllm.folders import digest_of, versions
from aimv2_mllm.narration import Narrate
from aimv2_mllm.place import Place
from aimv2_mllm.reports.charts import Picture
from aimv2_mllm.reports.page import describe, pictures

TEMPLATES = Path(__file__).parents[1] / "assets"
SUMMARY, HTML, MARKDOWN = "summary.json", "report.html", "report.md"
UNFINISHED = ".report.part"


def write_report(place: Place, narrate: Narrate) -> None:
    """Judge the finished run in `place` and write its report, unless that was done already.

    Done is a summary of the same results under the same `evaluation`, with its report beside it.
    Raises RunFailed when the report cannot be written; an earlier one is then as it was.
    """
    made_from = _made_from(place)
    if _is_current(place.folder, made_from):
        narrate(f"report: finished, see {place.folder / MARKDOWN}")
        return
    findings = evaluate(place, narrate)
    _complete(findings, place, made_from)
    page = describe(place, findings)
    write_files(place.folder, files_of("report", page, findings.numbers, pictures(page)))
    for line in _told(findings.numbers):
        narrate(line)
    narrate(f"report: {place.folder / HTML}")


def _made_from(place: Place) -> dict[str, Any]:
    """What decides the numbers: how they are taken, and the hashes of every stage's files."""
    assert place.recipe.evaluation is not None
    results = {name: digest_of(place.record(name)) for name in place.recipe.stages}
    return {"evaluation": place.recipe.evaluation.model_dump(mode="json"), "results": results}


def _is_current(folder: Path, made_from: dict[str, Any]) -> bool:
    if not all((folder / name).is_file() for name in (SUMMARY, HTML, MARKDOWN)):
        return False
    try:
        summary = json.loads((folder / SUMMARY).read_text())
    except ValueError:
        return False
    return isinstance(summary, dict) and summary.get("made_from") == made_from


def _complete(findings: Findings, place: Place, made_from: dict[str, Any]) -> None:
    """Add to the numbers what is not measured: times of the stages, versions, what was judged."""
    stages = {name: place.record(name) for name in place.recipe.stages}
    findings.numbers["seconds"] |= {name: record["seconds"] for name, record in stages.items()}
    findings.numbers["stage_parameters"] = {
        name: {part: count for part, count, _ in record["parts"]} for name, record in stages.items()
    }
    findings.numbers["versions"] = versions()
    findings.numbers["made_from"] = made_from


def files_of(
    template: str, page: dict[str, Any], numbers: dict[str, Any], shown: Iterable[Picture]
) -> dict[str, bytes]:
    """The files of a report by name: what `page` says as HTML and Markdown, by the templates of
    that name, the numbers, and the pictures shown."""
    texts = {
        HTML: _filled(f"{template}.html.jinja", page),
        MARKDOWN: _filled(f"{template}.md.jinja", page),
        SUMMARY: json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    files = {name: text.encode() for name, text in texts.items()}
    return {picture.name: picture.png for picture in shown} | files


def _filled(template: str, page: dict[str, Any]) -> str:
    """A template of `assets` with what `page` says; HTML where its name says so."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=".html" in template,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = _markdown
    return environment.get_template(template).render(page=page)


def _markdown(text: str) -> str:
    """`text` on one line, with everything escaped that Markdown or HTML would read as a mark."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files aside, then put them in place; the summary, which says done, goes last.

    Raises RunFailed where that cannot be; earlier ones are then as they were.
    """
    unfinished = folder / UNFINISHED
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for name, content in files.items():
            write_synced(unfinished / name, content)
        (folder / SUMMARY).unlink(missing_ok=True)
        for name in sorted(files, key=lambda name: name == SUMMARY):
            (unfinished / name).rename(folder / name)
    except OSError as error:
        raise RunFailed(
            f"the report could not be written to {folder} ({error.strerror}); what came before "
            "is whole: make room and run the same command again"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _told(numbers: dict[str, Any]) -> list[str]:
    """The headline numbers as lines for a terminal."""
    seeing = [f"vqa_accuracy{end}" for end in ("", "_blind", "_text_only")]
    names = (*seeing, "text_accuracy", "caption_exact")
    probes = [f"digit_{probe}_accuracy" for probe in ("knn", "linear")]
    shares = [*names, *(f"{name}{end}" for name in probes for end in ("", "_untrained"))]
    shares += [f"digit_zeroshot_accuracy{end}" for end in ("", "_shuffled")]
    lines = [f"  {name:<30}{100 * numbers[name]:6.1f} %" for name in shares if name in numbers]
    losses = [name for name in ("caption_loss", "pixel_loss") if name in numbers]
    return lines + [f"  {name:<30}{numbers[name]:6.3f}" for name in losses]
