"""Our chat against transformers' own `generate`, in the same conversation with the same model.

    OMP_NUM_THREADS=1 python tests/benchmarks/chat.py --tower base --llm 135m    # minutes on a CPU
    python tests/benchmarks/chat.py --device cuda --dtype bf16 --rounds 20       # large, 0.5b

A Llava with random weights of these sizes is asked about a picture, and twice again. `generate` is
called as its users do: the processor makes inputs of all turns, and the model runs them. Ours keeps
a session. What stands in the history as answers is the same fixed text for both, and not what the
model said, so that ours runs even that anew. Timed is from the messages to the first token, and the
tokens after it. On the CPU in seconds of the processor, which nobody else's work changes; on CUDA
with the clock. A round is a conversation with each, in turns, the order alternating; printed are
medians, and the median of the rounds' ratios: above 1 ours is ahead.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import transformers
from llava_shaped import LLMS, random_models
from measure import work_clock
from PIL import Image

from aimv2_mllm.chat.chatbot import Chatbot
from aimv2_mllm.chat.session import ChatSession
from aimv2_mllm.data.talks.conversations import Message, said
from aimv2_mllm.model import mllm

QUESTIONS = ("What is on the sheet?", "Where is the red one, and what is beside it?", "How many?")
ANSWER = "There is a red 7 at the top left and an orange 3 at the bottom right of the sheet."
TURNS = (1, 3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tower", choices=("nano", "base", "large", "huge"), default="large")
    parser.add_argument("--llm", choices=LLMS, default="0.5b")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    return parser.parse_args()


def build(args: argparse.Namespace) -> Chatbot:
    """The model, whose answers have no end of their own."""
    tower, llm, tokenizer = random_models(args.tower, args.image_size, LLMS[args.llm])
    model = mllm.assemble(tower, llm, tokenizer)
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    model = model.to(device=args.device, dtype=dtype).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=tokenizer.pad_token_id)
    return Chatbot(model, mllm.build_processor(model, tokenizer, tower.preprocessing))


class Timer:
    """When each token of an answer was there, by the LLM's head, and what it was."""

    def __init__(self, bot: Chatbot, device: torch.device) -> None:
        self._device, self.times, self.tokens = device, list[float](), list[int]()
        bot.model.lm_head.register_forward_hook(self._note)

    def _note(self, _: Any, __: Any, logits: torch.Tensor) -> None:
        self.tokens.append(int(logits.flatten(0, -2)[-1].argmax()))
        self.times.append(work_clock(self._device))

    def __call__(self, answer: Callable[[], object]) -> dict[str, Any]:
        """Milliseconds to the first token, and tokens a second after it."""
        self.times, self.tokens = [], []
        start = work_clock(self._device)
        answer()
        end = work_clock(self._device)
        first = self.times[0]
        speed = (len(self.times) - 1) / (end - first)
        return {"first": 1000 * (first - start), "speed": speed, "tokens": self.tokens}


def by_generate(bot: Chatbot, messages: list[Message], image: Image.Image, tokens: int) -> None:
    text = bot.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = bot.processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
    inputs = inputs.to(bot.model.device, dtype=bot.model.dtype)
    with torch.inference_mode():
        bot.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)


def converse(
    bot: Chatbot, timer: Timer, way: str, image: Image.Image, tokens: int
) -> dict[int, dict[str, Any]]:
    """A conversation of three turns; what was timed of those of `TURNS`."""
    session, messages = ChatSession(bot), list[Message]()
    told = {}
    for turn, question in enumerate(QUESTIONS, start=1):
        messages.append(said("user", question, pictures=int(turn == 1)))
        if way == "ours":
            words = {"max_new_tokens": tokens}
            told[turn] = timer(lambda: list(session.stream(messages, [image], **words)))  # noqa: B023
        elif turn in TURNS:
            told[turn] = timer(lambda: by_generate(bot, messages, image, tokens))
        messages.append(said("assistant", ANSWER))
    return {turn: told[turn] for turn in TURNS}


def main() -> None:
    args = parse()
    bot = build(args)
    timer = Timer(bot, torch.device(args.device))
    ways, rounds = ("generate", "ours"), []
    for number in range(args.rounds + 1):
        image = Image.effect_noise((args.image_size, args.image_size), 90).convert("RGB")
        order = ways[:: 1 if number % 2 else -1]
        done = {way: converse(bot, timer, way, image, args.tokens) for way in order}
        if number:  # the first is not counted
            rounds.append(done)
    print(f"aimv2_{args.tower} at {args.image_size} px, LLM {args.llm}, {args.device} {args.dtype}")
    for turn in TURNS:
        for name, unit in (("first", "ms to the first token"), ("speed", "tokens/s after it")):
            old, ours = ([done[way][turn][name] for done in rounds] for way in ways)
            ahead = [b / a if name == "speed" else a / b for a, b in zip(old, ours, strict=True)]
            middle = [statistics.median(values) for values in (old, ours, ahead)]
            print(
                f"turn {turn}: generate {middle[0]:8.1f}, ours {middle[1]:8.1f} {unit:21} "
                f"ratio {middle[2]:.2f}"
            )
    same = [
        done["generate"][turn]["tokens"] == done["ours"][turn]["tokens"]
        for done in rounds
        for turn in TURNS
    ]
    print(f"answers with the same tokens: {sum(same)} of {len(same)}")


if __name__ == "__main__":
    main()
