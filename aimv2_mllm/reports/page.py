"""What the report says, as plain data for its two templates.

Owns every sentence and number that depends on the run; refuses to compute: see `evaluation`.
"""

import json
import shlex
from collections.abc import Iterable
from typing import Any

from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.engine.metrics import METRICS_FILE
from aimv2_mllm.evaluation import answers
from aimv2_mllm.evaluation.summary import Findings, Painting, is_of_handwriting, last_stage
from aimv2_mllm.formats import percent, percents
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.stages import PretrainStage
from aimv2_mllm.reports import charts, picture_grids
from aimv2_mllm.reports.charts import Picture
from aimv2_mllm.reports.gallery import sheet_gallery

# what was looked at -> its numbers: told by neighbours, told by a linear classifier
PROBES = {
    "this encoder, pre-trained": ("digit_knn_accuracy", "digit_linear_accuracy"),
    "the same encoder, freshly drawn": (
        "digit_knn_accuracy_untrained",
        "digit_linear_accuracy_untrained",
    ),
    "raw pixels, no encoder": ("digit_knn_accuracy_pixels", None),
}
SERIES = {
    "accuracy": "model",
    "blind": "blind",
    "text_only": "text only",
    "majority": "majority",
}


def describe(place: Place, findings: Findings) -> dict[str, Any]:
    """Everything that the templates of the report say of a run, by the names they use."""
    numbers, config = findings.numbers, place.recipe.evaluation
    assert config is not None
    first = place.record(next(iter(place.recipe.stages)))
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    return {
        "title": f"{place.recipe.name}: what was learned",
        "about": _about(place),
        "headline": _headline(numbers),
        "stages": [_stage(name, place) for name in place.recipe.stages],
        "curves": [curve for name in place.recipe.stages for curve in _curves(name, place)],
        "has_pixels": last_stage(place, "pretrain") is not None,
        "paintings": [_painting(painting) for painting in findings.paintings],
        "sheets": Picture(
            "sheets.png",
            "Held-out sheets: as they are, their features as colours, the half that was shown, the"
            " rest as painted",
            picture_grids.sheet_grid(findings.paintings) if findings.paintings else b"",
        ),
        **_questions(numbers),
        "gallery": sheet_gallery(findings, config.seed),
        "probe": [
            {
                "name": text,
                "shares": [percent(numbers[key]) if key else "–" for key in keys],
            }
            for text, keys in PROBES.items()
            if keys[0] in numbers
        ],
        "compared": [
            {
                "name": name,
                "shares": [percent(told[f"digit_{probe}_accuracy"]) for probe in ("knn", "linear")],
                "caption": f"{told['caption_loss']:.3f}",
            }
            for name, told in numbers.get("pretrain_stages", {}).items()
        ],
        "next": _next(place),
        "reproduce": "aimv2-mllm run recipe.yaml output=again",
        "made_with": f"Seed {place.recipe.seed}, evaluation seed {config.seed}. {versions}.",
    }


def pictures(page: dict[str, Any]) -> Iterable[Picture]:
    """The pictures that `report.md` shows, to lie as files beside it."""
    yield from (curve["picture"] for curve in page["curves"])
    if page["paintings"]:
        yield page["sheets"]
    if page["bars"]:
        yield page["bars"]
    yield from (item["picture"] for part in page["gallery"] for item in part["entries"])


def _about(place: Place) -> str:
    if last_stage(place, "align", "tune"):
        what = _eyes(place)
    elif last_stage(place, "lit"):
        what = (
            "A text tower learned here which caption belongs to what a frozen AIMv2 vision encoder"
            " sees."
        )
    elif name := last_stage(place, "pretrain"):
        stage = place.recipe.stages[name]
        assert isinstance(stage, PretrainStage)
        begun = f"from {stage.start.encoder}" if stage.start.encoder else "from random weights"
        what = (
            f"An AIMv2 vision encoder was pre-trained here {begun}: predict the next patch, then"
            " the caption."
        )
    else:
        what = "A small language model learned here to answer questions about sheets in words."
    return (
        f"{what} All results are from held-out sheets, whose handwriting no training step has seen."
    )


def _eyes(place: Place) -> str:
    """What became of the tower, or of the model that was tuned, in a sentence."""
    stages = place.recipe.stages
    stage: Any = stages[last_stage(place, "align", "tune") or ""]
    while stage.tower is None and stage.start in stages:
        stage = stages[stage.start]
    if stage.tower is None:
        return f"{stage.start}, which sees and talks already, was tuned."
    if stage.tower not in stages:
        return f"The vision tower {stage.tower} became the eyes of a language model."
    return (
        "An AIMv2 vision encoder, pre-trained by predicting the next patch and then the caption,"
        " became the eyes of a language model."
    )


def _headline(numbers: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    asked = {"vqa": "questions answered correctly", "text": "questions, sheet in words"}
    for key, name in asked.items():
        if f"{key}_accuracy" in numbers:
            interval = percents(numbers[f"{key}_accuracy_interval"])
            more = f"of {numbers['num_questions']:,}; 95 % interval {interval} %"
            rows.append((name, f"{percent(numbers[f'{key}_accuracy'])} %", more))
    for key, name, more in (
        ("vqa_accuracy_blind", "the same with another picture", "what needs no eyes"),
        ("vqa_accuracy_text_only", "the same without a picture", "what the words alone tell"),
        ("caption_exact", "sheets described exactly", "every digit, its ink and its place"),
        ("digit_linear_accuracy", "single digits told", "a linear classifier on frozen features"),
    ):
        if key in numbers:
            rows.append((name, f"{percent(numbers[key])} %", more))
    if "digit_zeroshot_accuracy" in numbers:
        others = [numbers[f"digit_zeroshot_accuracy_{end}"] for end in ("shuffled", "majority")]
        more = (
            f"95 % interval {percents(numbers['digit_zeroshot_accuracy_interval'])} %; by the words"
            f" for the next digit {percent(others[0])} %, always the commonest"
            f" {percent(others[1])} %"
        )
        value = f"{percent(numbers['digit_zeroshot_accuracy'])} %"
        rows.append(("single digits told by their words alone", value, more))
    if "caption_loss" in numbers and "vqa_accuracy" not in numbers:
        flat = f"one tone per patch: {numbers['pixel_loss_flat']:.3f}"
        rows.append(("caption loss", f"{numbers['caption_loss']:.3f}", "nats per token"))
        rows.append(("pixel loss", f"{numbers['pixel_loss']:.3f}", flat))
    return [{"name": name, "value": value, "more": more} for name, value, more in rows]


def _stage(name: str, place: Place) -> dict[str, Any]:
    record = place.record(name)
    parts = [
        {"name": part, "parameters": f"{count:,}", "trained": trained}
        for part, count, trained in record["parts"]
    ]
    steps = record["recipe"]["train"]["steps"]
    return {"name": name, "parts": parts, "steps": f"{steps:,}", "time": _time(record["seconds"])}


def _curves(name: str, place: Place) -> list[dict[str, Any]]:
    path = place.folder / name / METRICS_FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not lines:
        return []
    light, dark = (charts.loss_curves(lines, p) for p in (charts.LIGHT, charts.DARK))
    last = lines[-1]["samples"]
    alt = f"Training loss of stage {name} over {last:,} samples"
    return [{"stage": name, "picture": Picture(f"loss-{name}.png", alt, light, dark)}]


def _painting(painting: Painting) -> dict[str, Any]:
    named = ("original", "features", "shown", "painted")
    return {
        **{name: Picture(name, "", charts.picture(getattr(painting, name))) for name in named},
        "truth": scenes.caption(painting.sheet),
        "right": answers.is_exact_caption(painting.caption, painting.sheet),
        "words": answers.marked_caption(painting.caption, painting.sheet),
        "missing": "; ".join(answers.missing_phrases(painting.caption, painting.sheet)),
    }


def _questions(numbers: dict[str, Any]) -> dict[str, Any]:
    """The model and its controls for each kind of question, as a table and as bars."""
    name = "vqa" if "vqa_accuracy" in numbers else "text"
    series, overall = {}, {}
    for key, label in SERIES.items():
        kinds = "accuracy_by_kind" if key == "accuracy" else f"{key}_by_kind"
        if f"{name}_{kinds}" in numbers:
            series[label] = numbers[f"{name}_{kinds}"]
            total = "accuracy" if key == "accuracy" else f"accuracy_{key}"
            overall[label] = numbers[f"{name}_{total}"]
    if not series:
        return {"kinds": [], "series": [], "bars": None, "controls": "", "num_questions": "0"}
    rows = [("all", [*overall.values()])]
    rows += [(kind, [shares[kind] for shares in series.values()]) for kind in series["model"]]
    controls = {
        "blind": "Blind: the same model asked the same question with another sheet's picture.",
        "text only": "Text only: the same model asked the same question without a picture.",
        "majority": "Majority: no model, always the most frequent right answer of that kind.",
    }
    light, dark = (charts.accuracy_bars(series, p) for p in (charts.LIGHT, charts.DARK))
    return {
        "series": list(series),
        "controls": " ".join(text for key, text in controls.items() if key in series),
        "num_questions": f"{numbers['num_questions']:,}",
        "kinds": [
            {
                "name": kind.replace("_", " "),
                "shares": [percent(share) for share in shares],
                "is_sum": kind == "all",
            }
            for kind, shares in rows
        ],
        "bars": Picture("accuracy.png", "Right answers by kind of question", light, dark),
    }


def _next(place: Place) -> list[dict[str, str]]:
    folder = shlex.quote(place.folder.as_posix())
    if (name := last_stage(place, "lit")) and not last_stage(place, "align", "tune"):
        line = f"aimv2-mllm probe {folder}/{name}/model IMAGES --kind zeroshot --templates FILE"
        return [{"what": "Tell pictures of your own by words", "line": line}]
    if not (name := last_stage(place, "align", "tune")):
        line = "aimv2-mllm run recipes/own_pictures.yaml"
        for key, kind in (("tower", "pretrain"), ("llm", "language")):
            if made := last_stage(place, kind):
                line += f" stages.align.{key}={folder}/{made}/model"
        return [{"what": "Train what comes after it, on pictures of your own", "line": line}]
    chat = f"aimv2-mllm chat {folder} --image"
    if not is_of_handwriting(place.recipe.stages[name]):
        return [{"what": "Talk with the model about a picture", "line": f"{chat} PICTURE"}]
    return [
        {"what": "Make a picture to ask about", "line": f"aimv2-mllm sample {folder} sheet.png"},
        {"what": "Talk with the model about it", "line": f"{chat} sheet.png"},
    ]


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
