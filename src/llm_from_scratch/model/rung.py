"""The skeleton of every neural rung: embed, mix, unembed. A rung fills in the three and adds nothing else.

Shapes: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_from_scratch.model.cache import Cache

ANY_LENGTH = 2**20
"""The `context` of a rung that has no positions to run out of."""


class Rung(nn.Module, ABC):
    """ids (B, T) int64 to logits (B, T, V) of the token after each.

    `context` is the longest T it accepts, counting what a cache already holds. It says how long a text may be, not how far
    the rung looks: a bigram accepts any length and looks at one token.
    """

    supports_cache: ClassVar[bool] = False

    def __init__(self, vocab_size: int, context: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.context = context
        self.checkpointing = False
        """Recompute each layer in the backward pass instead of keeping what is inside it: a third more time, far less memory."""

    @abstractmethod
    def embed(self, ids: Tensor, past: int | Tensor) -> Tensor:
        """ids (B, T), the first of them at position `past`, one for all rows or (B, 1), to vectors (B, T, C)."""

    @abstractmethod
    def mix(self, x: Tensor, cache: Cache | None) -> Tensor:
        """Let the tokens look back at each other: (B, T, C) to (B, T, C)."""

    @abstractmethod
    def unembed(self, x: Tensor) -> Tensor:
        """(B, T, C) to logits (B, T, V)."""

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V). With a cache, `ids` are only the tokens it does not hold yet. Raises ValueError past the context."""
        past = 0 if cache is None else cache.length
        self._check(ids, past, cache)
        logits = self.unembed(self.mix(self.embed(ids, past_of(cache)), cache))
        if cache is not None:
            cache.advance(ids.size(1))
        return logits

    def run(self, layer: nn.Module, *inputs: object) -> Tensor:
        """One layer, recomputed in the backward pass when `checkpointing` is on."""
        result = checkpoint(layer, *inputs, use_reentrant=False) if self.checkpointing and self.training else layer(*inputs)
        assert isinstance(result, Tensor)
        return result

    def _check(self, ids: Tensor, past: int, cache: Cache | None) -> None:
        if cache is not None and not self.supports_cache:
            raise ValueError(f"{type(self).__name__} has no keys and values to cache; call it with the whole past and no cache")
        if past + ids.size(1) > self.context:
            raise ValueError(f"found {past + ids.size(1)} tokens, the context holds {self.context}; give the last {self.context} only")


def past_of(cache: Cache | None) -> int | Tensor:
    """Where the next tokens stand: one position for all rows, or one of each, (B, 1)."""
    if cache is None:
        return 0
    return cache.length if cache.lengths is None else cache.lengths


def places(past: int | Tensor, T: int) -> slice | Tensor:
    """The positions of T tokens from `past` on, to index a table with: a slice, or (B, T) where each row has its own."""
    if isinstance(past, int):
        return slice(past, past + T)
    return past + torch.arange(T, device=past.device)
