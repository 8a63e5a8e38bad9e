"""The classes that lmms-eval asks: its requests in, the answers of `evaluate`'s own code out.

Owns the device of a process and what happens to a question that cannot be asked: it counts as
answered with nothing, stderr says so, and more than `MOST_LEFT_OUT` of them end the run. Refuses
rounds that follow from answers, and likelihoods of models that are not ours.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from aimv2_mllm.chat.scoring import likelihood
from aimv2_mllm.data.questions.asked import MOST_LEFT_OUT
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.answerers import Conversation, Ours, load_answerer
from aimv2_mllm.lmms.reading import KNOWN, Settings, settings_of, talk_of_messages, talk_of_text
from aimv2_mllm.model.foreign import best_device
from aimv2_mllm.narration import warn

TYPE_NAMES = ("float32", "bfloat16", "float16")


class _Model(lmms):
    """What both ways of asking have in common."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        """`pretrained` is what `evaluate` takes as MODEL; `dtype` is the folder's own if None."""
        super().__init__()
        if dtype not in (None, *TYPE_NAMES):
            raise UsageError(f"dtype is {dtype}, must be one of {', '.join(TYPE_NAMES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UsageError(f"batch_size is {batch_size}, must be a whole number from 1 on")
        self.batch_size, self.device = int(batch_size), _device(device)
        self._answerer = load_answerer(str(pretrained))
        network = self._answerer.model
        if network.device != self.device:
            network.to(self.device)
        if dtype is not None:
            network.to(getattr(torch, dtype))
        self._refused = 0

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each of `requests`."""
        settings = [settings_of(self._generation(request)) for request in requests]
        unknown = {key for request in requests for key in self._generation(request)} - KNOWN
        if unknown and self.rank == 0:
            warn(f"settings that change nothing here: {', '.join(sorted(unknown))}")
        answers, self._refused = list[str](), 0
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            for first, last in _batches(settings, self.batch_size):
                batch = requests[first:last]
                answers += self._ask(batch, settings[first], most=MOST_LEFT_OUT * len(requests))
                bar.update(len(batch))
        return answers

    def _ask(self, batch: Sequence[Instance], settings: Settings, most: float) -> list[str]:
        try:
            talks = [self._talk(request) for request in batch]
            return self._answerer.reply(talks, settings.max_new_tokens, _seeded(settings))
        except UsageError as error:
            if len(batch) == 1:
                self._refuse(batch[0], error, most)
                return [""]
        return [text for one in batch for text in self._ask([one], settings, most)]

    def _refuse(self, request: Instance, error: UsageError, most: float) -> None:
        self._refused += 1
        name = f"{request.task_name}, question {request.doc_id}"
        if self._refused > most:
            raise UsageError(f"{name}: {error} ({self._refused} questions cannot be asked)")
        warn(f"{name} counts as not answered: {error}")

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each (question, answer), the mean cross-entropy of the answer's tokens and whether
        they are the likeliest; lmms-eval takes the least, and not the greatest, for the best.

        It makes text of a bare pair (0.7.3), so each comes as what it takes for a whole answer.
        """
        if not isinstance(self._answerer, Ours):
            raise UsageError("the task compares likelihoods, which only models of ours tell here")
        found = []
        for request in tqdm(requests, desc="likelihoods", disable=self.rank != 0):
            (messages, pictures), answer = self._talk(request), request.args[1]
            if callable(answer):
                answer = answer(self._document(request))
            told = likelihood(self._answerer.bot, messages, pictures, answer.strip())
            found.append(GenerationResult((told.loss, told.is_greedy)))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused."""
        task = requests[0].task_name
        raise UsageError(f"{task} asks in rounds that follow from answers, which is not here")

    def _document(self, request: Instance) -> Any:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _talk(self, request: Instance) -> Conversation:
        raise NotImplementedError

    def _generation(self, request: Instance) -> dict[str, Any]:
        raise NotImplementedError


class MessagesModel(_Model):
    """Asked by messages: (context, what makes them of a document, settings, document's place)."""

    is_simple = False

    def _talk(self, request: Instance) -> Conversation:
        return talk_of_messages(request.args[1](self._document(request)))

    def _generation(self, request: Instance) -> dict[str, Any]:
        settings: dict[str, Any] = request.args[2]
        return settings


class TextModel(_Model):
    """Asked by a text and pictures: (text, settings or answer, what finds the pictures, place)."""

    is_simple = True

    def _talk(self, request: Instance) -> Conversation:
        visuals = request.args[2](self._document(request))
        return talk_of_text(request.args[0], visuals or [])

    def _generation(self, request: Instance) -> dict[str, Any]:
        settings: dict[str, Any] = request.args[1]
        return settings


def _device(name: str | None) -> torch.device:
    """The device of this process, its own GPU where a launcher started several of them; models are
    loaded to it."""
    if name is None:
        name = best_device().type
    device = torch.device(name)
    if device.type == "cuda":
        number = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device


def _batches(settings: Sequence[Settings], size: int) -> Iterator[tuple[int, int]]:
    """From and to which request, of equal settings; those that are drawn are asked one by one, for
    equal ones must not get equal answers."""
    first = 0
    while first < len(settings):
        last = first + 1
        while (
            last < len(settings)
            and last - first < size
            and settings[last] == settings[first]
            and not settings[first].draws
        ):
            last += 1
        yield first, last
        first = last


def _seeded(settings: Settings) -> Any:
    """Its sampling; where tokens are drawn, by the next of the seeds that lmms-eval's own makes."""
    from dataclasses import replace

    if not settings.draws:
        return settings.sampling
    return replace(settings.sampling, seed=int(torch.randint(2**31, ()).item()))
