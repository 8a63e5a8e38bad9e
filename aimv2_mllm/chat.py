"""From a folder to answers: loads the model that talks strictly, and asks it.

Refuses folders that hold no Llava and weights that are not all there. Imports torch and
transformers only when a model is loaded.
"""

import json
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimv2_mllm.errors import UsageError
from aimv2_mllm.folders import CONFIG_FILE, GIVE, stage_record, talking_folder
from aimv2_mllm.prompts import Message, fitting_inputs

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class Chatbot:
    """A Llava with its processor, as `load_model` returns them."""

    model: Any
    processor: Any
    data: Mapping[str, Any] | None = None  # as the stage's record has it; None: not ours

    @property
    def limit(self) -> int:
        """The most tokens, pictures and answer included, that the model can hold."""
        return int(getattr(self.model.config.text_config, "max_position_embeddings", sys.maxsize))


def load_model(folder: str | Path) -> Chatbot:
    """The model in a run folder or model folder (any stock Llava), on the GPU where there is one.

    It decodes greedily whatever the folder says about sampling. Raises UsageError, with what to do,
    for a folder without such a model and for weights that are not whole: nothing goes on
    half-loaded.
    """
    import torch
    from transformers import GenerationConfig

    from aimv2_mllm.model.foreign import silent_transformers

    found = talking_folder(Path(folder))
    with silent_transformers():
        model, processor = _load(found)
    if processor.chat_template is None:
        raise UsageError(f"{found}: has no chat template, so nobody knows how to talk to it")
    old, tokenizer = model.generation_config, processor.tokenizer
    end = tokenizer.eos_token_id if old.eos_token_id is None else old.eos_token_id
    pad = tokenizer.pad_token_id if old.pad_token_id is None else old.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    # Older folders have the template with the processor alone.
    processor.tokenizer.chat_template = processor.chat_template
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Chatbot(model, processor, stage_record(found).get("recipe", {}).get("data"))


def _load(folder: Path) -> tuple[Any, Any]:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import aimv2_mllm.model.llava  # noqa: F401  (transformers then knows ours)
    from aimv2_mllm.model.foreign import demand_whole

    path = folder / CONFIG_FILE
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read ({error!r}); {GIVE}") from None
    if kind not in ("llava", "aimv2_mllm_llava"):
        raise UsageError(f"{path}: its model_type is {kind!r}, must be 'llava'; {GIVE}")
    ours: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        processor = AutoProcessor.from_pretrained(folder, **ours)
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, which we refuse below
            **ours,
        )
    except SafetensorError as error:
        raise UsageError(f"{folder}: its weights are damaged or cut off ({error})") from None
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{folder}: cannot be loaded: {said[:300]}") from None
    demand_whole(report, str(folder))
    return model, processor


def answer(
    bot: Chatbot,
    messages: Sequence[Message],
    images: Sequence["Image.Image"],
    *,
    max_new_tokens: int = 64,
    stop: threading.Event | None = None,
) -> str:
    """What `bot` says next, greedily, without blanks around it.

    `messages` are questions and answers in turn, a question last; `images` are RGB pictures, one
    per image part. Setting `stop` ends the answer where it is. Where the model cannot hold the
    whole conversation, the oldest turns without a picture are left out, and stderr says so; raises
    UsageError when the last question alone does not fit.
    """
    inputs, room = _prepare(bot, messages, images, max_new_tokens)
    tokens = _generate(bot, inputs, room, [stop] if stop else [])[0]  # (L + answer,)
    said = bot.processor.tokenizer.decode(
        tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return str(said).strip()


def stream(
    bot: Chatbot,
    messages: Sequence[Message],
    images: Sequence["Image.Image"],
    *,
    max_new_tokens: int = 64,
    stop: threading.Event | None = None,
) -> Generator[str, None, None]:
    """The same answer in pieces, as they are made; closing the generator stops the model.

    Arguments and errors are `answer`'s; an error while the model talks comes out of the generator.
    """
    inputs, room = _prepare(bot, messages, images, max_new_tokens)
    return _stripped(_pieces(bot, inputs, room, [stop] if stop else []))


def _pieces(
    bot: Chatbot, inputs: dict[str, "Tensor"], room: int, stops: list[threading.Event]
) -> Generator[str, None, None]:
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(
        bot.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    closed, failures = threading.Event(), list[Exception]()

    def talk() -> None:
        try:
            _generate(bot, inputs, room, [closed, *stops], streamer)
        except Exception as error:  # raised again below, where the caller sees it
            failures.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        closed.set()
        thread.join()
    if failures:
        raise failures[0]


def _stripped(pieces: Generator[str, None, None]) -> Generator[str, None, None]:
    """The pieces without the blanks at the very start and the very end of the whole."""
    held, begun = "", False
    with closing(pieces):
        for piece in pieces:
            text = held + piece if begun else piece.lstrip()
            body = text.rstrip()
            held = text[len(body) :]  # it belongs to the answer only if more follows
            if body:
                begun = True
                yield body


def _generate(
    bot: Chatbot,
    inputs: dict[str, "Tensor"],
    room: int,
    stops: list[threading.Event],
    streamer: Any = None,
) -> "Tensor":
    import torch
    from transformers import StoppingCriteriaList

    def asked_to_stop(ids: "Tensor", scores: Any, **_: Any) -> "Tensor":
        halt = any(stop.is_set() for stop in stops)
        return torch.full((len(ids),), halt, device=ids.device)

    tokens: Tensor = bot.model.generate(
        **inputs,
        do_sample=False,
        use_cache=True,
        max_new_tokens=room,
        stopping_criteria=StoppingCriteriaList([asked_to_stop]),
        streamer=streamer,
    )
    return tokens


def _prepare(
    bot: Chatbot,
    messages: Sequence[Message],
    images: Sequence["Image.Image"],
    max_new_tokens: int,
) -> tuple[dict[str, "Tensor"], int]:
    inputs, room = fitting_inputs(
        bot.processor,
        messages,
        images,
        limit=bot.limit,
        max_new_tokens=max_new_tokens,
        data=bot.data,
    )
    return dict(inputs.to(bot.model.device, dtype=bot.model.dtype)), room
