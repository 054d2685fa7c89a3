"""What a model asks of a key-value cache, so that the model knows nothing of how one is kept.

Shapes: B batch, K key-value heads, T new tokens, S tokens stored so far with the new ones, D head width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Cache(Protocol):
    """Keys and values of the tokens already read, layer by layer. One forward updates every layer, then advances once."""

    @property
    def length(self) -> int:
        """Tokens stored before this forward; it stays the same until `advance`."""
        ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new (B, K, T, D) keys and values of a layer; return all of them, (B, K, S, D)."""
        ...

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as stored. The model calls this at the end of its forward; nobody else does."""
        ...
