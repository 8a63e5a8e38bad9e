"""The stages that train on pictures and captions: pre-training, from random weights or others, and
LiT.

Refuses weights of another size than the recipe says.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from aimv2_mllm.data.pairs.batches import CaptionBatches, caption_batches
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model import llms
from aimv2_mllm.model.decoder_weights import load_decoder, read_decoder, save_decoder
from aimv2_mllm.model.encoder import SIZES, AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.hub import locate
from aimv2_mllm.model.lit import AIMv2LiT, LiTConfig, TextConfig
from aimv2_mllm.model.lit_weights import save_lit
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig
from aimv2_mllm.model.weights import load_encoder, read_encoder, save_encoder
from aimv2_mllm.objective import ContrastiveObjective, PreTrainingObjective
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.stages import LitStage, PretrainStage
from aimv2_mllm.stages.job import DataFacts, Job, named_parts

DECODER_PIECES = (
    "projection.",
    "text_embedding.",
    "start",
    "text_positions",
    "blocks.",
    "norm.",
    "patch_head.",
    "word_head.",
)


def build_pretrain(stage: PretrainStage, place: Place) -> Job:
    """The encoder under prefix attention and its multimodal decoder, both trained."""
    tokenizer = llms.load_tokenizer(place.source(stage.tokenizer), talks=False)
    encoder, preprocessing, notes = _encoder(stage, place)
    sizes = DecoderConfig(**stage.decoder.model_dump(), vocab_size=len(tokenizer))
    model = AIMv2ForPreTraining(encoder.float(), sizes)
    if stage.start.decoder is not None:
        load_decoder(model, Path(place.source(stage.start.decoder)))

    def save(folder: Path) -> None:
        save_encoder(model.encoder, folder)
        save_decoder(model, folder)
        preprocessing.save(folder)
        tokenizer.save_pretrained(folder)

    batches = caption_batches(
        stage.data,
        stage.train,
        seed=place.recipe.seed,
        tokenizer=tokenizer,
        preprocessing=preprocessing,
        max_text_tokens=sizes.max_text_tokens,
        full_prefix=stage.prefix == "full",
        areas=stage.encoder.areas if stage.encoder.native else None,
        share=place.share,
    )
    objective = PreTrainingObjective(
        encoder.config.patch_size, tokenizer.eos_token_id, stage.alpha, stage.text_weight
    )
    parts = named_parts(model, {"encoder": ("encoder.",), "decoder": DECODER_PIECES})
    return Job(model, parts, objective, batches, save, _facts(stage, batches, notes))


def check_pretrain(stage: PretrainStage, place: Place) -> None:
    """UsageError for weights or a tokenizer from outside that the stage cannot begin with."""
    stages, start = place.recipe.stages, stage.start
    if start.encoder is not None and start.encoder not in stages:
        _encoder(stage, place)
    num_words = None
    if stage.tokenizer not in stages:
        num_words = len(llms.load_tokenizer(stage.tokenizer, talks=False))
    if start.decoder is not None and start.decoder not in stages:
        folder = Path(start.decoder)
        # A tokenizer that is not made yet may have as many words.
        num_words = num_words or read_decoder(folder)[0].vocab_size
        sizes = DecoderConfig(**stage.decoder.model_dump(), vocab_size=num_words)
        with torch.device("meta"):
            model = AIMv2ForPreTraining(AIMv2Encoder(_config(stage)), sizes)
        load_decoder(model, folder)


def _config(stage: PretrainStage) -> EncoderConfig:
    choice = stage.encoder
    return EncoderConfig(**SIZES[choice.size], image_size=choice.image_size, native=choice.native)


def _encoder(
    stage: PretrainStage, place: Place
) -> tuple[AIMv2Encoder, Preprocessing, Sequence[str]]:
    """The stage's encoder, new or with the weights it is to start from, how it takes pixels, and
    what of those weights was changed or left aside."""
    choice, config = stage.encoder, _config(stage)
    if stage.start.encoder is None:
        return AIMv2Encoder(config), Preprocessing(choice.image_size, native=choice.native), ()
    folder = locate(place.source(stage.start.encoder))
    encoder, notes = read_encoder(folder, None if choice.native else choice.image_size)
    # A native encoder takes any size: the one it was meant for is no difference.
    found = encoder.config
    if choice.native:
        if not found.native:
            encoder = _without_learned_positions(encoder)
            notes.append("its learned positions, for one size, are left aside: they are computed")
        found = replace(encoder.config, image_size=config.image_size)
    if found != config:
        was, now = asdict(found), asdict(config)
        odd = [f"{key} {was[key]} instead of {now[key]}" for key in was if was[key] != now[key]]
        raise UsageError(
            f"start.encoder: {folder} is another encoder than {choice.size}: {', '.join(odd)};"
            " give other weights, or the stage's encoder these numbers"
        )
    encoder.config = config
    given = Preprocessing.load(folder, image_size=choice.image_size)
    said = [f"{stage.start.encoder}: {note}" for note in notes]
    return encoder, replace(given, native=choice.native), said


def _without_learned_positions(encoder: AIMv2Encoder) -> AIMv2Encoder:
    """`encoder` with computed positions, for any grid, in place of those that it has learned.

    How the authors came from one to the other is not published: this is ours.
    """
    with torch.device("meta"):
        native = AIMv2Encoder(replace(encoder.config, native=True))
    state = encoder.state_dict()
    del state["preprocessor.pos_embed"]
    native.load_state_dict(state, strict=True, assign=True)
    return native


def build_lit(stage: LitStage, place: Place) -> Job:
    """A frozen encoder with a pooling head and a text tower, which are trained."""
    tokenizer = llms.load_tokenizer(place.source(stage.tokenizer), talks=False)
    encoder, preprocessing = _tower(stage, place)
    text = TextConfig(
        **stage.text.model_dump(), vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
    )
    model = AIMv2LiT(LiTConfig(encoder.config, text, stage.projection_dim))
    state = model.image_encoder.state_dict() | encoder.float().state_dict()
    model.image_encoder.load_state_dict(state, strict=True)
    for frozen in (model.image_encoder.preprocessor, model.image_encoder.trunk):
        frozen.requires_grad_(False)

    def save(folder: Path) -> None:
        save_lit(model, folder)
        preprocessing.save(folder)
        tokenizer.save_pretrained(folder)

    batches = caption_batches(
        stage.data,
        stage.train,
        seed=place.recipe.seed,
        tokenizer=tokenizer,
        preprocessing=preprocessing,
        max_text_tokens=text.max_position_embeddings - 1,  # and the end token
        full_prefix=True,  # it is not looked at
        share=place.share,
    )
    parts = named_parts(
        model,
        {
            "head": ("image_encoder.head.", "image_projector."),
            "text": ("text_encoder.", "text_projector.", "log_logit_scale"),
        },
    )
    objective: Any = ContrastiveObjective(tokenizer.eos_token_id)
    return Job(model, parts, objective, batches, save, _facts(stage, batches))


def check_lit(stage: LitStage, place: Place) -> None:
    """UsageError for a tower or a tokenizer from outside that the stage cannot begin with."""
    if stage.tower not in place.recipe.stages:
        _tower(stage, place)
    if stage.tokenizer not in place.recipe.stages:
        llms.load_tokenizer(stage.tokenizer, talks=False)


def _tower(stage: LitStage, place: Place) -> tuple[AIMv2Encoder, Preprocessing]:
    """The encoder that the stage leaves frozen, as it is stored, and how it takes pixels."""
    folder = locate(place.source(stage.tower))
    return load_encoder(folder), Preprocessing.load(folder)


def _facts(
    stage: PretrainStage | LitStage, batches: CaptionBatches, notes: Sequence[str] = ()
) -> DataFacts:
    data, corpus = stage.data, batches.corpus
    return DataFacts(
        data.workers, data.max_skipped, corpus.digest, [*notes, *corpus.notes], corpus.num_rows
    )
