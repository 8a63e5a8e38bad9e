"""The chat template with which a model is trained and saved: its LLM's own, made to write the same
for everybody, here and in other tools, whatever they leave unsaid.

Owns what is put around the own one for that, where it needs it: parts become text, the start token
is written, no day is today, and every answer stands behind the empty thought with which a model
that thinks is told not to. Refuses nothing: what cannot be settled so is for `Chat` to refuse.
"""

import json
from typing import Any

import jinja2

from aimv2_mllm.data.talks.chat_template import PARTS, PROBE, Chat
from aimv2_mllm.errors import UsageError

OWN = "{#- What aimv2_mllm trained with is the LLM's own chat template, which follows. #}\n"
START = "{{- bos_token -}}\n"
# The day that templates of Llama 3 fall back to; they and others write the day of the rendering.
DAY = {"d": "26", "m": "07", "y": "24", "Y": "2024", "b": "Jul", "B": "July", "a": "Fri"}
DAY |= {"A": "Friday", "H": "00", "M": "00", "S": "00"}
DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace('%{letter}', '{said}')" for letter, said in DAY.items())
    + " -}}{%- endmacro -%}\n"
)
UNTHINKING = "{%- set enable_thinking = enable_thinking | default(false) -%}\n"
FIXED = {"strftime_now": DATE, "enable_thinking": UNTHINKING}  # by the name that asks for it
ANSWER = "\ue000answer\ue000"  # where one stands, while the own template writes
SPLIT = (
    "{%- set talk = namespace(messages=[], answers=[]) -%}\n"
    "{%- for message in messages -%}\n"
    "{%- if message.role == 'assistant' and message.content is string"
    " and not message.tool_calls -%}\n"
    "{%- set talk.answers = talk.answers + [message.content] -%}\n"
    f"{{%- set message = {{'role': message.role, 'content': '{ANSWER}'}} -%}}\n"
    "{%- endif -%}\n"
    "{%- set talk.messages = talk.messages + [message] -%}\n"
    "{%- endfor -%}\n"
    "{%- set messages = talk.messages -%}\n"
    "{%- set written -%}\n"
)
JOIN = (
    "{% endset -%}\n"
    f"{{%- for piece in written.split('{ANSWER}') -%}}\n"
    "{{- piece -}}\n"
    "{%- if not loop.last -%}\n"
    "{{- '' if piece.endswith(thought) else thought -}}\n"
    "{{- talk.answers[loop.index0] -}}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
)


def settled(tokenizer: Any) -> str:
    """The chat template to train with and to save, for the tokenizer's own: that one itself where
    it needs nothing, or where nothing helps."""
    own: str = tokenizer.get_chat_template()
    if OWN in own:
        return own
    fixed = "".join(text for name, text in FIXED.items() if name in own)
    plain = f"{fixed}{OWN}{own}"
    chat = _told(tokenizer, plain) or _told(tokenizer, _behind_thoughts(tokenizer, fixed, own))
    if chat is None:
        return own
    starts = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    if starts and not chat.asked(PROBE[:1]).startswith(tokenizer.bos_token):
        return f"{START}{chat.template}"
    return own if chat.template == f"{OWN}{own}" else chat.template


def _told(tokenizer: Any, template: str) -> Chat | None:
    try:
        return Chat(tokenizer, template)
    except UsageError:
        return None


def _behind_thoughts(tokenizer: Any, fixed: str, own: str) -> str:
    """A template that opens every answer as the own one opens the last: with the thought, an empty
    one, that it writes when asked for the next and takes out of those before."""

    def write(count: int, *, ask: bool) -> str:
        words = {"tokenize": False, "chat_template": f"{fixed}{PARTS}{own}"}
        return str(tokenizer.apply_chat_template(PROBE[:count], add_generation_prompt=ask, **words))

    try:
        whole, asked = write(6, ask=False), write(1, ask=True)
    except (jinja2.TemplateError, TypeError, ValueError):
        return own
    before = whole.partition("a0z.")[0]
    thought = asked.removeprefix(before)
    if not thought.strip() or not whole.partition("a2z.")[0].endswith(thought):
        return own
    opened = f"{{%- set thought = {json.dumps(thought)} -%}}\n"
    # Jinja leaves out a new line at the very end.
    return f"{fixed}{opened}{PARTS}{SPLIT}{OWN}{own.removesuffix(chr(10))}{JOIN}"
