"""Keys and values of what was read, so that a new token costs one step instead of reading everything again.

All memory is taken at the start and never grows: a request that cannot fit fails at once, not in the middle. What it cannot do is
drop its oldest tokens, because the positions are already rotated into the keys; `decoding` starts a new one instead.

`KVCache` holds texts of one length, side by side. `SlotCache` holds texts of any lengths, each in a slot of its own that the next text
takes over, and a forward reads some of its rows (`SlotRows`). A model's own attention runs over whole blocks of BLOCK tokens there: what is
masked adds exact zeros, and no sum is cut at another place because a neighbour is longer, so a row's answer has the same bits whoever is
beside it.

Shapes: L layers, B batch, G key/value heads, T tokens, S places (whole blocks), D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm_from_scratch.model.gpt import GptShape
from llm_from_scratch.model.llama import LlamaShape

Array = NDArray[Any]
BLOCK = 64
"""Tokens that attention over slots is rounded up to."""


class CacheFull(ValueError):
    """More tokens than the cache was made for."""


class KVCache:
    """A `model.cache.Cache` of fixed capacity. `length` tokens are stored; all layers write at `length` until `advance`."""

    lengths: None = None
    mask: None = None

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
        layers, kv_heads, head_dim, dtype, device = _shape_of(model)
        return cls(layers, batch, kv_heads, capacity, head_dim, dtype, device)

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


class SlotCache:
    """`slots` texts of up to `capacity` tokens each. `lengths` says how many tokens of each are stored: setting one to 0 frees its slot.

    Keys and values of each layer are of one `shape`, (slots, S, G, D), so that a token's are side by side and are written in one piece, and
    at `addresses` (L, 2).
    """

    def __init__(self, model: nn.Module, slots: int, capacity: int) -> None:
        layers, kv_heads, head_dim, dtype, device = _shape_of(model)
        self.slots, self.capacity = slots, capacity
        self.lengths = [0] * slots
        self.room = BLOCK * math.ceil(capacity / BLOCK)
        self.shape = (slots, self.room, kv_heads, head_dim)
        self.keys = torch.zeros((layers, *self.shape), dtype=dtype, device=device).unbind()
        self.values = torch.zeros((layers, *self.shape), dtype=dtype, device=device).unbind()
        self.addresses = np.array([(k.data_ptr(), v.data_ptr()) for k, v in zip(self.keys, self.values, strict=True)])
        self.device, self.dtype = device, dtype

    def rows(self, first: int, count: int, tokens: int, reading: Collection[int]) -> SlotRows:
        """For one forward of `tokens` new tokens in each of `count` slots from `first` on. Those in `reading` keep them, the others only
        fill up the batch: they stay as long as they were. Raises CacheFull.
        """
        if reading and (end := max(self.lengths[slot] for slot in reading) + tokens) > self.capacity:
            raise CacheFull(f"KV cache: {end} tokens, but a slot was made for {self.capacity}; give slots more room or start again")
        return SlotRows(self, first, count, tokens, reading)

    def move(self, source: int, target: int) -> None:
        """The text in slot `source` goes on in slot `target`, and `source` is free."""
        length = self.lengths[source]
        for stored in (*self.keys, *self.values):
            stored[target, :length] = stored[source, :length]
        self.lengths[target], self.lengths[source] = length, 0


class SlotRows:
    """Some slots of a SlotCache as a `model.cache.Cache`, for one forward. Index tensors and mask are made once for all layers."""

    def __init__(self, cache: SlotCache, first: int, count: int, tokens: int, reading: Collection[int]) -> None:
        self.cache, self._first, self._count, self._tokens, self._reading = cache, first, count, tokens, reading
        # A row that only fills up writes where its next token will overwrite it; near the end of its slot it must not write beyond.
        self._starts = [min(length, cache.capacity - tokens) for length in cache.lengths[first : first + count]]
        self.length = max(self._starts)

    @cached_property
    def lengths(self) -> Tensor | None:
        return torch.tensor(self._starts, device=self.cache.device)[:, None] if self._count > 1 else None

    @cached_property
    def mask(self) -> Tensor | None:
        if self._alone:
            return None
        cache, positions = self.cache, self._positions
        later = torch.arange(self._places, device=cache.device) > positions[:, None, :, None]
        return torch.zeros(later.shape, dtype=cache.dtype, device=cache.device).masked_fill_(later, -math.inf)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k, v (B, G, T, D); all of that layer's, each (B, G, S, D)."""
        return self._put(self.cache.keys[layer], k.transpose(1, 2)), self._put(self.cache.values[layer], v.transpose(1, 2))

    def advance(self, tokens: int) -> None:
        """Count `tokens` more in the rows that were read."""
        for slot in self._reading:
            self.cache.lengths[slot] += tokens

    def targets(self) -> tuple[int, Array]:
        """The first slot, and where each row's new tokens begin, (B,), for code that is not torch's; keys and values are at `addresses`."""
        return self._first, np.array(self._starts)

    @property
    def _alone(self) -> bool:
        """In its cache, for good and with one token, so no block has to be filled up."""
        return self.cache.slots == 1 and self._tokens == 1

    @property
    def _places(self) -> int:
        return self.length + 1 if self._alone else BLOCK * math.ceil((self.length + self._tokens) / BLOCK)

    @cached_property
    def _positions(self) -> Tensor:
        """(B, T)"""
        starts = torch.tensor(self._starts, device=self.cache.device)[:, None]
        return starts + torch.arange(self._tokens, device=self.cache.device)

    @cached_property
    def _targets(self) -> Tensor:
        offsets = torch.arange(self._first, self._first + self._count, device=self.cache.device)[:, None] * self.cache.room
        return (self._positions + offsets).flatten()

    def _put(self, stored: Tensor, new: Tensor) -> Tensor:
        if self._count == 1:
            stored[self._first, self.length : self.length + new.size(1)] = new[0]
        else:
            stored.flatten(0, 1).index_copy_(0, self._targets, new.flatten(0, 1))
        return stored[self._first : self._first + self._count, : self._places].transpose(1, 2)


def _shape_of(model: nn.Module) -> tuple[int, int, int, torch.dtype, torch.device]:
    """Layers, key/value heads, head dimension, and where and in what they are computed. Only `shape` is asked, so wrapped models fit."""
    shape: Any = model.shape
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if isinstance(shape, LlamaShape):
        return shape.layers, shape.kv_heads, shape.head_dim, weight.dtype, weight.device
    assert isinstance(shape, GptShape)
    return shape.layers, shape.heads, shape.width // shape.heads, weight.dtype, weight.device
