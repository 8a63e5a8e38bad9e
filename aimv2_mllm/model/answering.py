"""What is trained where a model talks: conversations in, the cross-entropy of the answers out.

Owns how a packed batch goes through a Llava, or a causal LLM, and that nobody ever holds the scores
of all words for all tokens.

Letters in shapes: B conversations, T tokens of all of them, S of these supervised, K pictures,
V words, E width of the LLM.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aimv2_mllm.marks import UNSUPERVISED
from aimv2_mllm.model import rows

# Tokens whose scores are held at once. Measured on a CPU with 32,000 and 151,936 words: 128 take no
# more time than all at once, 32 take a third more.
CHUNKS, CHUNK = {"cpu": 128}, 512


class Answering(nn.Module):
    """`llava`, or a causal LLM, as it is trained on conversations.

    Its LLM's attention is `rows.PACKED` from then on where that is what it computes; others see
    conversations as padded rows.
    """

    def __init__(self, llava: nn.Module) -> None:
        super().__init__()
        self.llava: Any = llava
        # Tokens scored at once; None: as many as where it computes. A plan says for which device.
        self.chunk: int | None = None
        llm: Any = getattr(self.llava.base_model, "language_model", self.llava.base_model)
        self.is_packed = rows.understands(llm.config)
        if self.is_packed:
            # For good: what activation checkpointing computes again asks for it in backward.
            llm.set_attn_implementation(rows.PACKED)

    def forward(
        self,
        lengths: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        **pictures: Tensor,
    ) -> Tensor:
        """The sum over the S supervised tokens of their cross-entropy, a scalar.

        `lengths` (B,) add up to T; `input_ids`, `position_ids` and `labels` are (1, T), and
        `pictures` what the Llava's body takes for the image tokens in their order, such as
        `pixel_values` (K, 3, H, W).
        """
        hidden = self.hidden(lengths, input_ids, position_ids, **pictures)  # (T, E)
        # Token t is predicted from the one before it; the first of a conversation never is.
        scored = (labels[0] != UNSUPERVISED).nonzero()[:, 0]  # (S,)
        before, targets = hidden.index_select(0, scored - 1), labels[0].index_select(0, scored)
        return cross_entropy(before, self.llava.lm_head, targets, self.chunk)

    def hidden(
        self, lengths: Tensor, input_ids: Tensor, position_ids: Tensor, **pictures: Tensor
    ) -> Tensor:
        """What the LLM's body makes of each token: (T, E)."""
        body = self._packed if self.is_packed else self._padded
        return body(lengths.tolist(), input_ids, position_ids, pictures)

    def _packed(
        self, lengths: list[int], ids: Tensor, places: Tensor, pictures: dict[str, Tensor]
    ) -> Tensor:
        packing = rows.Rows(lengths, ids.device)
        hidden: Tensor = self.llava.base_model(
            ids, position_ids=places, packing=packing, use_cache=False, **pictures
        ).last_hidden_state
        return hidden[0]

    def _padded(
        self, lengths: list[int], ids: Tensor, places: Tensor, pictures: dict[str, Tensor]
    ) -> Tensor:
        """As `_packed`, by rows padded on the right: what follows a token changes nothing of it."""
        longest, own = max(lengths), torch.tensor(lengths)
        row = torch.arange(len(lengths)).repeat_interleave(own).to(ids.device)  # (T,)
        at = row * longest + places[0]
        padding = 1 if getattr(self.llava.config, "image_token_id", None) == 0 else 0
        laid = ids.new_full((len(lengths) * longest,), padding).index_copy(0, at, ids[0])
        hidden: Tensor = self.llava.base_model(
            laid.view(len(lengths), longest), use_cache=False, **pictures
        ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, at)


def cross_entropy(
    hidden: Tensor, head: nn.Linear, targets: Tensor, chunk: int | None = None
) -> Tensor:
    """The cross-entropy of `targets` (S,) under the scores that `head` gives of `hidden` (S, E),
    summed in float32, with the scores of a few tokens at a time: `chunk`, or as many as suit the
    device."""
    weight, bias = head.weight, head.bias
    size = chunk or CHUNKS.get(hidden.device.type, CHUNK)
    if _is_fused(hidden, weight):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)
        return F.linear_cross_entropy(
            hidden, weight, targets, linear_bias=bias, reduction="sum", options=options
        )
    chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    return torch.stack([_recomputed(own, weight, bias, few) for own, few in chunks]).sum()


def _is_fused(hidden: Tensor, weight: Tensor) -> bool:
    """Whether torch (2.13 or newer) does it, in one pass; in half precision it would also add the
    losses in that."""
    kind = hidden.device.type
    half = not hidden.is_meta and torch.is_autocast_enabled(kind)
    whole = hidden.dtype == weight.dtype == torch.float32
    return whole and not half and hasattr(F, "linear_cross_entropy")


def _recomputed(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The same of one chunk, whose scores are computed again in backward."""

    def loss(hidden: Tensor) -> Tensor:
        scores = F.linear(hidden, weight, bias).float()  # (CHUNK, V)
        return F.cross_entropy(scores, targets, reduction="sum")

    summed: Tensor = checkpoint(loss, hidden, use_reentrant=False)
    return summed
