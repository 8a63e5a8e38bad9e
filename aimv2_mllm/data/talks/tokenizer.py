"""A small byte-level BPE tokenizer with a chat template, for a language model trained here from
nothing."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>"}
EXTRA_TOKENS = ("<image>", "<|user|>", "<|assistant|>")
# Text follows its role mark after a space, so that " 7" is one token wherever it stands.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set parts = message.content %}"
    "{% if parts is string %}{% set parts = [{'type': 'text', 'text': parts}] %}{% endif %}"
    "{% if message.role == 'assistant' %}<|assistant|>"
    "{% generation %}{% for part in parts %} {{ part.text }}{% endfor %}<|end|>{% endgeneration %}"
    "{% else %}<|user|>"
    "{% for part in parts %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, longest: int = 512
) -> "PreTrainedTokenizerFast":
    """A tokenizer of at most `vocab_size` tokens learned from `texts`; it can write any text (all
    256 bytes are in it). `longest` is how many tokens its LLM has room for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL_TOKENS.values(), *EXTRA_TOKENS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=list(EXTRA_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=longest,
        **SPECIAL_TOKENS,
    )
