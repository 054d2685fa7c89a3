"""Keys and values of what was read, so that a new token costs one step instead of reading everything again.

All memory is taken at the start and never grows: a request that cannot fit fails at once, not in the middle. What it cannot do is
drop its oldest tokens, because the positions are already rotated into the keys; `decoding` starts a new one instead.

Shapes: L layers, B batch, G key/value heads, T tokens, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.model.gpt import GptShape
from llm_from_scratch.model.llama import LlamaShape


class CacheFull(ValueError):
    """More tokens than the cache was made for."""


class KVCache:
    """A `model.cache.Cache` of fixed capacity. `length` tokens are stored; all layers write at `length` until `advance`."""

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = capacity
        self.length = 0
        shape = (layers, batch, kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @classmethod
    def of(cls, model: nn.Module, capacity: int, batch: int = 1) -> KVCache:
        """An empty one that fits `model`, a gpt or llama. Wrapped ones (peft's) fit too, because only `shape` is asked."""
        shape: Any = model.shape
        weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        if isinstance(shape, LlamaShape):
            return cls(shape.layers, batch, shape.kv_heads, capacity, shape.head_dim, weight.dtype, weight.device)
        assert isinstance(shape, GptShape)
        return cls(shape.layers, batch, shape.heads, capacity, shape.width // shape.heads, weight.dtype, weight.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, D) after the tokens so far; all of that layer's, each (B, G, length + T, D). Raises CacheFull."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise CacheFull(f"KV cache: {end} tokens, but it was made for {self.capacity}; make it larger or start a new one")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Every layer has stored its part: the next `update` goes behind these `tokens`."""
        self.length += tokens

    def clear(self) -> None:
        """Forget everything; the memory stays."""
        self.length = 0
