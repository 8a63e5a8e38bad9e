"""From a folder to answers: loads the model that talks strictly, and asks it.

Refuses folders that hold no Llava and weights that are not all there. Imports torch and
transformers only when a model is loaded.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aimv2_mllm.chat.chatbot import Chatbot, look, prompt_of
from aimv2_mllm.chat.session import ChatSession, Reply
from aimv2_mllm.data.talks.conversations import Message
from aimv2_mllm.errors import UsageError
from aimv2_mllm.folders import (
    CONFIG_FILE,
    GIVE,
    LLAVAS,
    model_type_of,
    stage_record,
    talking_folder,
)
from aimv2_mllm.model.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def load_model(folder: str | Path, device: str | None = None) -> Chatbot:
    """The model in a run folder or model folder (any stock Llava), on the `device`, by default the
    GPU where there is one.

    It decodes greedily whatever the folder says about sampling. Raises UsageError, with what to do,
    for a folder without such a model and for weights that are not whole: nothing goes on
    half-loaded.
    """
    from transformers import GenerationConfig

    import aimv2_mllm.model.llava  # noqa: F401  (transformers then knows ours)
    from aimv2_mllm.model.foreign import load_image_text

    found = talking_folder(Path(folder))
    kind = model_type_of(found)
    if kind not in LLAVAS:
        raise UsageError(
            f"{found / CONFIG_FILE}: its model_type is {kind!r}, must be 'llava'; {GIVE}"
        )
    model, processor = load_image_text(
        found, "cannot be loaded", device=device, local_files_only=True
    )
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
    return Chatbot(model, processor, stage_record(found).get("recipe", {}).get("data"))


def answer(
    bot: Chatbot,
    messages: Sequence[Message],
    images: Sequence["Image.Image"],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop: threading.Event | None = None,
) -> str:
    """What `bot` says next, without blanks around it.

    `messages` are questions and answers in turn, a question last, a system prompt first if any;
    `images` are RGB pictures, one per image part. Setting `stop` ends the answer where it is. Where
    the model cannot hold the whole conversation, the oldest turns without a picture are left out,
    and stderr says so; raises UsageError when the last question alone does not fit.
    """
    most = max_new_tokens
    reply = stream(bot, messages, images, max_new_tokens=most, sampling=sampling, stop=stop)
    return "".join(reply)


def stream(
    bot: Chatbot,
    messages: Sequence[Message],
    images: Sequence["Image.Image"],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    stop: threading.Event | None = None,
) -> Reply:
    """The same answer in pieces, as they are made; closing it stops the model, `counts` says what
    it took.

    Arguments and errors are `answer`'s; an error while the model talks comes out of the pieces.
    Who asks again in the same conversation keeps a `ChatSession`, which has the same `stream`.
    """
    return ChatSession(bot).stream(
        messages, images, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
    )


def answer_all(
    bot: Chatbot,
    conversations: Sequence[tuple[Sequence[Message], Sequence["Image.Image"]]],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    seen: "dict[str, Tensor] | None" = None,
) -> list[str]:
    """What `bot` says next in each of `conversations`, messages with their images, in their order.

    Each equals what `answer` would return; they are computed together. Whoever passes the same
    `seen` again has each picture looked at once: it keeps what the LLM gets to see of it. Errors
    are `answer`'s, with the conversation's number, from 0, before them.
    """
    from aimv2_mllm.model.batched import Row, answer_rows

    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}, must be 1 or more")
    seen, asked = {} if seen is None else seen, []
    for number, (messages, images) in enumerate(conversations):
        try:
            asked.append(prompt_of(bot, messages, images, max_new_tokens, seen))
        except UsageError as error:
            raise UsageError(f"conversation {number}: {error}") from None
    seen |= look(bot, [picture for one in asked for picture in one.pictures], seen)
    rows = [Row(one.ids, [seen[p.key] for p in one.pictures], one.room) for one in asked]
    return answer_rows(bot.model, bot.processor.tokenizer, rows, sampling=sampling) if rows else []
