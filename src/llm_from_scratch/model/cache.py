"""What a model asks of a key-value cache, so that the model knows nothing of how one is kept.

Shapes: B batch, K key-value heads, T new tokens, S places for tokens (at least those stored so far and the new ones), D head width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Cache(Protocol):
    """Keys and values of the tokens already read, layer by layer. One forward updates every layer, then advances once."""

    @property
    def length(self) -> int:
        """Tokens stored before this forward, in the longest row; it stays the same until `advance`."""
        ...

    @property
    def lengths(self) -> Tensor | None:
        """The same of each row, (B, 1) int64, where rows differ; None where all have `length`."""
        ...

    @property
    def mask(self) -> Tensor | None:
        """(B, 1, T, S): 0 where a query may look and -inf elsewhere; None where each sees the stored tokens, and the new up to its own."""
        ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new (B, K, T, D) keys and values of a layer; return all of them, (B, K, S, D)."""
        ...

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as stored. The model calls this at the end of its forward; nobody else does."""
        ...
