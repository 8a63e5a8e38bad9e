"""A whole run judged: every number of `summary.json`, and what the report shows beside them.

Owns which results are judged and by what; refuses to know how a report looks.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from aimv2_mllm.chat.chat import load_model
from aimv2_mllm.chat.chatbot import Chatbot
from aimv2_mllm.data.handwriting import held_out, scenes
from aimv2_mllm.data.handwriting.held_out import HeldOut
from aimv2_mllm.data.pairs.batches import picture_batch
from aimv2_mllm.data.questions import labelled
from aimv2_mllm.data.talks.conversations import DESCRIBE
from aimv2_mllm.evaluation import answers, dreams, zeroshot
from aimv2_mllm.evaluation.controls import majority_answers, other_picture
from aimv2_mllm.evaluation.features import see
from aimv2_mllm.evaluation.intervals import interval
from aimv2_mllm.evaluation.losses import held_out_losses
from aimv2_mllm.evaluation.probes import fresh_encoder, probe
from aimv2_mllm.model.llms import load_llm, load_tokenizer
from aimv2_mllm.model.mllm import pictures_of
from aimv2_mllm.model.towers import Tower
from aimv2_mllm.narration import Narrate
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.stages import Stage


@dataclass(frozen=True)
class Painting:
    """A held-out sheet as it is, as far as the prefix shows it, and as the decoder went on.

    Pictures are (H, W, 3) uint8; `features` shows what the encoder makes of the whole sheet, and
    `caption` is the decoder's own of it.
    """

    sheet: scenes.Scene
    original: np.ndarray
    shown: np.ndarray
    painted: np.ndarray
    features: np.ndarray
    caption: str


@dataclass
class Findings:
    """The numbers of `summary.json`, the questions with the answers given, and the paintings."""

    numbers: dict[str, Any]
    asked: list[HeldOut] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    paintings: list[Painting] = field(default_factory=list)


def evaluate(place: Place, narrate: Narrate) -> Findings:
    """What the run in `place` has learned, judged on held-out sheets as its recipe says.

    Equal results and settings give equal numbers, bit for bit, `seconds` aside.
    """
    config = place.recipe.evaluation
    assert config is not None, "a run without evaluation is not judged"
    begun = time.perf_counter()
    asked = held_out.held_out_questions(config.seed, config.questions)
    findings = Findings({"num_questions": 0}, asked)
    pretrained = last_stage(place, "pretrain")
    if pretrained is not None:
        narrate("evaluation: the encoder and its decoder, on held-out sheets")
        _judge_pretraining(findings, place.result(pretrained), place)
        _compare_pretraining(findings, place)
    contrasted = last_stage(place, "lit")
    if contrasted is not None and is_of_handwriting(place.recipe.stages[contrasted]):
        narrate("evaluation: held-out digits by the words for them")
        _judge_by_words(findings, place.result(contrasted), config.seed)
    assembled = last_stage(place, "align", "tune")
    if assembled is not None:
        narrate(f"evaluation: {config.questions:,} questions about held-out pictures, and controls")
        _judge_seeing(findings, load_model(place.result(assembled)), config.seed)
    elif last_stage(place, "language") == list(place.recipe.stages)[-1]:
        narrate(f"evaluation: {config.questions:,} questions about held-out sheets in words")
        folder = str(place.result(list(place.recipe.stages)[-1]))
        words = SimpleNamespace(tokenizer=load_tokenizer(folder))
        _judge_reading(findings, Chatbot(load_llm(folder).eval(), words, {}), config.seed)
    findings.numbers["seconds"] = {"evaluation": round(time.perf_counter() - begun, 1)}
    return findings


def last_stage(place: Place, *kinds: str) -> str | None:
    """The name of the recipe's last stage of one of these kinds, or None."""
    names = [name for name, stage in place.recipe.stages.items() if stage.kind in kinds]
    return names[-1] if names else None


def _judge_pretraining(findings: Findings, folder: Path, place: Place) -> None:
    config = place.recipe.evaluation
    assert config is not None
    model, tokenizer, preprocessing = dreams.load_pretrainer(folder)
    encoder, seed = model.encoder, config.seed
    sheets = _sheets(findings.asked, seed)
    findings.numbers |= held_out_losses(model, tokenizer, preprocessing, sheets, seed=seed)
    findings.numbers |= _digits(Tower("aimv2", encoder, preprocessing), seed)
    findings.numbers["parameters"] = {
        "encoder": _count(encoder),
        "decoder": _count(model) - _count(encoder),
    }
    shown = [held_out.held_out_sheet(seed, index) for index in range(config.sheets)]
    pixels = picture_batch(shown, preprocessing)
    half = encoder.config.num_patches // 2
    pictures = preprocessing.restore(pixels)
    columns = (
        shown,
        pictures,
        dreams.only_prefix(pictures, half, encoder.config.patch_size),
        preprocessing.restore(dreams.paint(model, pixels, half)),
        see(encoder, pixels),
        dreams.write_caption(model, pixels, tokenizer),
    )
    findings.paintings = [Painting(*row) for row in zip(*columns, strict=True)]


def _compare_pretraining(findings: Findings, place: Place) -> None:
    """Put the numbers of every pretrain stage side by side where a recipe has several.

    `caption_loss` is that of a decoder which sees the whole sheet, whatever it was trained under.
    """
    config, stages = place.recipe.evaluation, place.recipe.stages
    assert config is not None
    names = [name for name, stage in stages.items() if stage.kind == "pretrain"]
    if len(names) < 2:
        return
    compared, seed = {}, config.seed
    for name in names:
        model, tokenizer, preprocessing = dreams.load_pretrainer(place.result(name))
        sheets = _sheets(findings.asked, seed)
        told = held_out_losses(model, tokenizer, preprocessing, sheets, seed=seed, whole=True)
        digits = _digits(Tower("aimv2", model.encoder, preprocessing), seed)
        told |= {key: digits[key] for key in ("digit_knn_accuracy", "digit_linear_accuracy")}
        compared[name] = told
    findings.numbers["pretrain_stages"] = compared


def _digits(tower: Tower, seed: int) -> dict[str, float]:
    """How many single held-out digits the tower's features tell, and those of a fresh tower."""
    data = labelled.handwriting(seed)
    fresh = Tower("aimv2", fresh_encoder(tower.config, seed), tower.preprocessing)
    found, untrained = (probe(one, data, ("knn", "linear"), seed=seed) for one in (tower, fresh))
    shares = {
        "digit_knn_accuracy": found["probes"]["knn"],
        "digit_knn_accuracy_untrained": untrained["probes"]["knn"],
        "digit_knn_accuracy_pixels": found["controls"]["pixels"],
        "digit_linear_accuracy": found["probes"]["linear"],
        "digit_linear_accuracy_untrained": untrained["probes"]["linear"],
    }
    return {name: score["accuracy"] for name, score in shares.items()}


def is_of_handwriting(stage: Stage) -> bool:
    """Whether the stage learned from the embedded world: others know no such digits."""
    return any(source.kind == "handwriting" for source in stage.data.sources)


def _judge_by_words(findings: Findings, folder: Path, seed: int) -> None:
    """How many single held-out digits lie nearest to the captions that name them."""
    tower, encode = zeroshot.load_lit_tower(str(folder))
    data, templates = labelled.handwriting(seed), zeroshot.handwriting_templates()
    found = zeroshot.zero_shot(tower, encode, data, templates)
    told, controls = found["probes"]["zeroshot"], found["controls"]
    findings.numbers |= {
        "digit_zeroshot_accuracy": told["accuracy"],
        "digit_zeroshot_accuracy_interval": told["interval"],
        "digit_zeroshot_accuracy_shuffled": controls["shuffled"]["accuracy"],
        "digit_zeroshot_accuracy_majority": controls["majority"]["accuracy"],
    }


def _judge_seeing(findings: Findings, bot: Chatbot, seed: int) -> None:
    asked, sheets = findings.asked, _sheets(findings.asked, seed)
    if len(sheets) == 1:  # the blind control needs another one
        sheets = [*sheets, held_out.held_out_sheet(seed, 1)]
    side, seen = pictures_of(bot.processor)[0].image_size, dict[str, Tensor]()
    pictures = [Image.fromarray(scenes.render(sheet, side)) for sheet in sheets]
    # First, so that every sheet is prepared and looked at once, many of them together.
    wanted, most = [(DESCRIBE[0], picture) for picture in pictures], answers.CAPTION_TOKENS
    captions = answers.ask(bot, wanted, seen, max_new_tokens=most)
    elsewhere = [other_picture(q.sheet, len(sheets)) for q in asked]
    findings.given = answers.ask(bot, [(q.text, pictures[q.sheet]) for q in asked], seen)
    shown = zip(asked, elsewhere, strict=True)
    blind = answers.ask(bot, [(q.text, pictures[other]) for q, other in shown], seen)
    alone = answers.ask(bot, [(q.text, None) for q in asked], seen)
    exact = [answers.is_exact_caption(c, s) for c, s in zip(captions, sheets, strict=True)]
    findings.numbers |= {
        **_scores("vqa", asked, findings.given),
        "vqa_accuracy_blind": answers.accuracy(asked, blind),
        "vqa_blind_by_kind": answers.by_kind(asked, blind),
        "vqa_accuracy_text_only": answers.accuracy(asked, alone),
        "vqa_text_only_by_kind": answers.by_kind(asked, alone),
        "caption_exact": sum(exact) / len(exact),
        "parameters": _parameters(bot),
    }


def _judge_reading(findings: Findings, bot: Chatbot, seed: int) -> None:
    asked = findings.asked
    findings.given = answers.ask(bot, [(held_out.in_words(seed, q), None) for q in asked], {})
    findings.numbers |= _scores("text", asked, findings.given)
    findings.numbers["parameters"] = _parameters(bot)


def _scores(name: str, asked: list[HeldOut], given: list[str]) -> dict[str, Any]:
    """Accuracy with its interval, by kind, and that of always giving a kind's commonest answer."""
    majority = majority_answers([q.kind for q in asked], [(q.truth,) for q in asked])
    pairs = zip(asked, given, strict=True)
    right = [float(answers.is_right(text, question.truth)) for question, text in pairs]
    return {
        "num_questions": len(asked),
        f"{name}_accuracy": sum(right) / len(asked),
        f"{name}_accuracy_interval": list(interval(right, groups=[q.sheet for q in asked])),
        f"{name}_accuracy_by_kind": answers.by_kind(asked, given),
        f"{name}_accuracy_majority": answers.accuracy(asked, majority),
        f"{name}_majority_by_kind": answers.by_kind(asked, majority),
    }


def _sheets(asked: list[HeldOut], seed: int) -> list[scenes.Scene]:
    return [held_out.held_out_sheet(seed, index) for index in range(asked[-1].sheet + 1)]


def _parameters(bot: Chatbot) -> dict[str, int]:
    parts = {"vision_tower": "tower", "multi_modal_projector": "connector"}
    counts: dict[str, int] = {}
    for name, parameter in bot.model.named_parameters():
        part = next((part for word, part in parts.items() if word in name.split(".")), "LLM")
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts | {"total": sum(counts.values())}


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
