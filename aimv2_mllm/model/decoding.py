"""Token after token of an LLM, from embedded prompts, with a cache that can be cut back.

Owns the cache, what the model is given, and the choice of the next token. Refuses nothing.

Letters in shapes: B prompts, P tokens held and L new ones, V vocabulary, M tokens of a picture,
E the LLM's width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimv2_mllm.model.sampling import Sampling


def fresh_cache(model: Any) -> Any:
    """An empty cache for `model`, which can be cut back wherever the model's layers allow it.

    Layers that attend through a sliding window get a whole cache too: their mask is the model's
    own, and a cache of the window alone cannot be cut back once it is full.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [
        DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache


def cut_back(cache: Any, length: int) -> bool:
    """Whether `cache` now holds its first `length` tokens alone; recurrent layers forget nothing,
    and so it is left as it is where there are any."""
    from transformers.cache_utils import DynamicLayer

    surplus = cache.get_seq_length() - length
    assert surplus >= 0, (cache.get_seq_length(), length)
    if surplus and not all(type(layer) is DynamicLayer for layer in cache.layers):
        return False
    if surplus:
        cache.crop(-surplus)
    return True


@torch.inference_mode()
def embedded(model: Any, ids: Tensor, pictures: Sequence[Tensor], *, skipped: int = 0) -> Tensor:
    """Tokens `ids` (B, L) as the LLM takes them, (B, L, E), the image tokens of all rows in order
    being those of `pictures` (M, E) each, but for the first `skipped`."""
    tokens: Tensor = model.get_input_embeddings()(ids)
    if pictures:
        seen = torch.cat([*pictures])[skipped:].to(tokens)
        mark = model.config.image_token_id
        if len(seen):
            tokens[ids == mark] = seen
    return tokens


class Decoding:
    """A model at work on one batch: each call runs new tokens behind those that `cache` holds.

    `mask` (B, L) is 0 where a prompt of the first call is padded, on the left; None: nowhere.
    """

    def __init__(self, model: Any, cache: Any, mask: Tensor | None = None) -> None:
        # Past a Llava's own forward, which costs a small model a third of its time.
        self._body, self._head = model.get_decoder(), model.get_output_embeddings()
        self.cache, self._mask = cache, mask

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Scores of the tokens that come next, (B, V) in float32, after embedded ones (B, L, E)."""
        places: dict[str, Any] = {}
        if self._mask is not None:
            new = self.cache.get_seq_length() + tokens.shape[1] - self._mask.shape[1]
            self._mask = torch.nn.functional.pad(self._mask, (0, new), value=1)  # (B, P + L)
            # The first token of a row is number 0 wherever it lies.
            numbers = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            places = {"attention_mask": self._mask, "position_ids": numbers}
        made = self._body(
            inputs_embeds=tokens, past_key_values=self.cache, use_cache=True, **places
        )
        scores: Tensor = self._head(made.last_hidden_state[:, -1]).float()
        return scores

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows of the batch alone."""
        chosen = torch.tensor(rows, device=self.cache.layers[0].keys.device)
        self.cache.batch_select_indices(chosen)
        if self._mask is not None:
            self._mask = self._mask[chosen]


class Chooser:
    """The next token of one answer, as `sampling` says; the global generators are left alone."""

    def __init__(self, sampling: Sampling, device: Any) -> None:
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._draws, self._generator = sampling.temperature > 0, torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._looks_back = sampling.repetition_penalty != 1
        self._process = LogitsProcessorList()
        if self._looks_back:
            penalty = float(sampling.repetition_penalty)
            self._process.append(RepetitionPenaltyLogitsProcessor(penalty))
        if self._draws:
            self._process.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._process.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._process.append(TopPLogitsWarper(float(sampling.top_p)))

    @torch.inference_mode()
    def __call__(self, before: Sequence[int] | np.ndarray, scores: Tensor) -> int:
        """The token after those `before`, prompt included, by the `scores` (V,)."""
        past = np.asarray(before if self._looks_back else (), dtype=np.int64)
        ids = torch.from_numpy(past)[None].to(scores.device)
        scores = self._process(ids, scores[None])  # (1, V)
        if not self._draws:
            return int(scores.argmax(-1))
        shares = scores.softmax(-1)
        return int(torch.multinomial(shares, 1, generator=self._generator))


def ends_of(model: Any) -> frozenset[int]:
    """The tokens any of which ends an answer of `model`."""
    end = model.generation_config.eos_token_id
    return frozenset() if end is None else frozenset(end if isinstance(end, list) else [end])
