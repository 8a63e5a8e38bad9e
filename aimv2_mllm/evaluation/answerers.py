"""Models that can be asked about pictures, ours and others', behind one call.

Owns how a model is found and how a batch of questions is put to it: a Llava of ours as in its
training (see `chat`), any other image-text model of transformers by its own processor and chat
template. Refuses models that cannot see.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os.path import exists, isdir
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from aimv2_mllm.errors import UsageError
from aimv2_mllm.folders import LLAVAS, model_type_of, talking_folder
from aimv2_mllm.model.hub import HUB_ID
from aimv2_mllm.model.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from PIL import Image

    from aimv2_mllm.data.talks.conversations import Message

SMALL = 2**20  # bytes; a larger file is known by its size and time
GIVE = (
    "give a run folder, the folder of a model, or a hub id (org/name or org/name@revision) of an "
    "image-text model"
)
Asking = tuple[str, "Image.Image | None"]  # a question, and the picture that it is about
Conversation = tuple["Sequence[Message]", "Sequence[Image.Image]"]  # a picture for each image part


class Answerer(Protocol):
    """A model that answers questions."""

    identity: str  # changes with its weights or its processor

    @property
    def model(self) -> Any:
        """The network, which may be moved to another device or precision."""

    def __call__(self, asked: Sequence[Asking], max_new_tokens: int) -> list[str]:
        """The greedy answers, each to a conversation of its own, without blanks around them."""

    def reply(
        self, talks: Sequence[Conversation], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[str]:
        """What it says next in each of `talks`, computed together, without blanks around it."""


def load_answerer(source: str) -> Answerer:
    """The model called `source`: a run, a model's folder, or a hub id; on the GPU where there is
    one. UsageError where there is none that sees and talks, or not all of it."""
    folder = found(source)
    if folder is None:
        return Foreign(source)
    is_ours = model_type_of(folder, GIVE) in LLAVAS
    return Ours(folder) if is_ours else Foreign(str(folder))


def found(source: str) -> Path | None:
    """The folder of the model called `source`; None: it is a hub id. UsageError as above."""
    if isdir(source):
        return talking_folder(Path(source))
    if exists(source):
        raise UsageError(f"{source}: is a file; {GIVE}")
    if not HUB_ID.fullmatch(source):
        raise UsageError(f"{source}: there is no such folder; {GIVE}")
    return None


def digest(folder: Path) -> str:
    """What tells the model in `folder` from another: its small files, the size and time of others.

    The report and the records that do not change what it says count too.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        facts = file.stat()
        small = file.read_bytes() if facts.st_size <= SMALL else str(facts.st_mtime_ns).encode()
        digest.update(f"{file.name} {facts.st_size} {hashlib.sha256(small).hexdigest()}\n".encode())
    return digest.hexdigest()


class _Asked:
    """What can hold conversations, asked single questions."""

    def __call__(self, asked: Sequence[Asking], max_new_tokens: int) -> list[str]:
        return self.reply([talk_of(*one) for one in asked], max_new_tokens)

    def reply(
        self, talks: Sequence[Conversation], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[str]:
        raise NotImplementedError


class Ours(_Asked):
    """A Llava, which gets pictures and tokens as in its training."""

    def __init__(self, folder: Path) -> None:
        from aimv2_mllm.chat.chat import load_model

        self.bot, self.identity = load_model(folder), digest(folder)

    @property
    def model(self) -> Any:
        return self.bot.model

    def reply(
        self, talks: Sequence[Conversation], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[str]:
        from aimv2_mllm.chat.chat import answer_all

        return answer_all(self.bot, talks, max_new_tokens=max_new_tokens, sampling=sampling)


class Foreign(_Asked):
    """Any image-text model of transformers, asked through its own processor and chat template."""

    def __init__(self, source: str) -> None:
        from transformers import GenerationConfig

        import aimv2_mllm.model.llava  # noqa: F401  (transformers then knows ours, on the hub too)
        from aimv2_mllm.model.foreign import load_image_text

        where = "there" if isdir(source) else "the hub, and there is no such folder"
        refusal = f"no image-text model can be loaded from {where}"
        self._source = source
        self.model, self._processor = load_image_text(source, refusal)
        # It decodes greedily whatever its folder says of sampling.
        end = self.model.generation_config.eos_token_id
        self.model.generation_config = GenerationConfig(eos_token_id=end, do_sample=False)
        if getattr(self._processor, "chat_template", None) is None:
            raise UsageError(f"{source}: has no chat template, so nobody knows how to ask it")
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._tokenizer.padding_side = "left"  # all answers begin at one column
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        commit = getattr(self.model.config, "_commit_hash", None)
        self.identity = digest(Path(source)) if isdir(source) else f"{source} {commit}"

    def reply(
        self, talks: Sequence[Conversation], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[str]:
        answers = [""] * len(talks)
        # Processors take a batch of which each has a picture, or none has.
        for sees in (True, False):
            rows = [row for row, (_, pictures) in enumerate(talks) if bool(pictures) == sees]
            if rows:
                given = self._answers([talks[row] for row in rows], max_new_tokens, sampling)
                for row, text in zip(rows, given, strict=True):
                    answers[row] = text
        return answers

    def _answers(
        self, talks: Sequence[Conversation], max_new_tokens: int, sampling: Sampling
    ) -> list[str]:
        import torch

        sees = bool(talks[0][1])
        try:
            inputs = self._processor.apply_chat_template(
                [_shown(messages, pictures) for messages, pictures in talks],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(self.model.device, dtype=self.model.dtype)
            with torch.inference_mode(), _seeded(sampling.seed):
                written = self.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=int(self._tokenizer.pad_token_id),
                    **_chosen(sampling),
                )
        # Each family's processor and template refuses in words of its own.
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            what = "a picture" if sees else "a question without a picture"
            remedy = "" if sees else "; give --no-controls"
            raise UsageError(
                f"{self._source}: refuses {what} ({' '.join(str(error).split())[:200]}){remedy}"
            ) from None
        new = written[:, inputs["input_ids"].shape[1] :]  # (B, tokens of the longest answer)
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return [_until(text, sampling.stop).strip() for text in texts]


def talk_of(text: str, picture: "Image.Image | None") -> Conversation:
    """The conversation that begins with one question, about a picture or none."""
    from aimv2_mllm.data.talks.conversations import said

    pictures = [] if picture is None else [picture]
    return [said("user", text, pictures=len(pictures))], pictures


def _shown(messages: "Sequence[Message]", pictures: "Sequence[Image.Image]") -> list[Any]:
    """The messages with the pictures in them, as processors take them."""
    rest = iter(pictures)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(rest)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _chosen(sampling: Sampling) -> dict[str, Any]:
    """What `generate` is told of how tokens are chosen."""
    names = ["repetition_penalty"]
    if sampling.temperature:
        names += ["temperature", "top_p", "top_k"]
    told = {name: getattr(sampling, name) for name in names}
    return {"do_sample": sampling.temperature > 0, **told}


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """What `generate` draws is told by `seed`, if there is one, and changes no other's draws."""
    import torch

    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)]
