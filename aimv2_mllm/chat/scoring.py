"""How likely a model finds a given answer, for questions whose answers are chosen and not written.

Refuses what `chatbot` refuses, and an empty answer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from aimv2_mllm.chat.chatbot import Chatbot, look, prompt_of
from aimv2_mllm.data.talks.conversations import Message
from aimv2_mllm.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image


class Likelihood(NamedTuple):
    """The mean cross-entropy of an answer's tokens, in nats, and whether each of them is the
    likeliest where it stands."""

    loss: float
    is_greedy: bool


def likelihood(
    bot: Chatbot, messages: Sequence[Message], images: Sequence["Image.Image"], answer: str
) -> Likelihood:
    """How likely `bot` finds it that `answer` is what it says next; its end token is not scored."""
    import torch
    from torch.nn.functional import cross_entropy

    from aimv2_mllm.model.decoding import embedded

    if not answer.strip():
        raise UsageError("the answer is empty")
    tokenizer = bot.processor.tokenizer
    said = tokenizer(_behind(bot, messages, answer), add_special_tokens=False).input_ids
    prompt = prompt_of(bot, messages, images, len(said), {})
    if len(said) > prompt.room:
        raise UsageError(f"the answer has {len(said)} tokens, and there is room for {prompt.room}")
    seen = look(bot, prompt.pictures, {})
    ids = torch.tensor([[*prompt.ids, *said]], device=bot.model.device)  # (1, L)
    pictures = [seen[picture.key] for picture in prompt.pictures]
    with torch.inference_mode():
        body, head = bot.model.get_decoder(), bot.model.get_output_embeddings()
        hidden = body(inputs_embeds=embedded(bot.model, ids, pictures), use_cache=False)
        # Token t is predicted from the one before it.
        scores = head(hidden.last_hidden_state[0, len(prompt.ids) - 1 : -1]).float()  # (S, V)
    targets = ids[0, len(prompt.ids) :]  # (S,)
    return Likelihood(
        float(cross_entropy(scores, targets)), bool((scores.argmax(-1) == targets).all())
    )


def _behind(bot: Chatbot, messages: Sequence[Message], answer: str) -> str:
    """`answer` with what the template puts between it and the question: a blank, in LLaVA's."""
    template = bot.processor.tokenizer.apply_chat_template
    asked = template(messages, tokenize=False, add_generation_prompt=True)
    spoken = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole = template([*messages, spoken], tokenize=False)
    end = whole.rfind(answer) + len(answer)
    return str(whole[len(asked) : end]) if whole.startswith(asked) else answer
