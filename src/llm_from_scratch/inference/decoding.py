"""Logits of the next token given all tokens so far, for any rung, each in the cheapest way that it knows.

gpt and llama read every token once and remember it (`KVCache`); the other neural rungs read their whole window again for each token;
the n-gram looks it up. A text longer than the model's context goes on from its newest part. A cache cannot forget its oldest tokens one
by one (their successors have seen them), so it starts again from the newest half of the context, and that costs one long step in many.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_from_scratch.inference.kv_cache import KVCache
from llm_from_scratch.model.cache import Cache
from llm_from_scratch.model.ngram import NGram

Decoder = Callable[[Sequence[int]], Tensor]
"""All ids so far (T,) to logits (V,). Each call gets the ids of the last one and at least one more."""


def decoder(model: nn.Module | NGram, capacity: int) -> Decoder:
    """The decoder of one text of at most `capacity` tokens. A new text needs a new one, for it may remember."""
    if isinstance(model, NGram):
        return lambda ids: torch.from_numpy(np.log(model.next_probs(ids)))
    if getattr(model, "supports_cache", False):
        return CachedDecoder(model, capacity)
    context = context_of(model)
    return lambda ids: last_logits(model, ids[-context:])


class CachedDecoder:
    """Reads only what is new. `start` is the first token that it still knows of."""

    def __init__(self, model: nn.Module, capacity: int) -> None:
        self.model = model
        self.context = context_of(model)
        self.cache = KVCache.of(model, min(capacity, self.context))
        self.start = 0

    def __call__(self, ids: Sequence[int]) -> Tensor:
        if len(ids) - self.start > self.context:
            self.start = len(ids) - max(1, self.context // 2)
            self.cache.clear()
        return last_logits(self.model, ids[self.start + self.cache.length :], self.cache)


def context_of(model: nn.Module) -> int:
    """How many tokens the model can look at."""
    context = model.context
    assert isinstance(context, int)
    return context


def prompt_limit(model: nn.Module | NGram) -> int | None:
    """How long a prompt may be, in tokens; None for an n-gram, which looks at its end only."""
    return None if isinstance(model, NGram) else context_of(model)


@torch.inference_mode()
def last_logits(model: nn.Module, ids: Sequence[int], cache: Cache | None = None) -> Tensor:
    """Logits (V,) after the last of `ids` (T,), without dropout."""
    device = next(model.parameters()).device
    with evaluating(model):
        logits: Tensor = model(torch.tensor([ids], device=device), cache)
    return logits[0, -1]


def number_of_threads(model: nn.Module, tokens: int) -> AbstractContextManager[None]:
    """One thread inside, where a forward over `tokens` is made of products so small that another would not have woken up before they are
    done; as many as there were otherwise, and outside.
    """
    return threads(1 if _is_small(model, tokens) else torch.get_num_threads())


def choosing(logits: Tensor) -> AbstractContextManager[None]:
    """To choose tokens in: torch's other threads are left alone, that would look out for more of such work, on the cores that the next
    forward wants, for longer than it takes.
    """
    return threads(1 if logits.numel() >= GRAIN else torch.get_num_threads())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many of torch's inside, and outside as many as there were."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and outside what it was: a model may be asked for a sample in the middle of its training."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


GRAIN = 2**15
"""Numbers from which on torch shares a small operation among threads."""
SMALL_WEIGHT, SMALL_PRODUCT = 2**17, 2**20
"""Numbers in a matrix, and multiplications with it, up to which one core is faster than two; half a megabyte is in its cache."""


def _is_small(model: nn.Module, tokens: int) -> bool:
    """By the mean size of the matrices in the blocks: tied or not, the head is one of many."""
    shape: Any = model.shape
    weight: int = shape.width * max(shape.width, shape.hidden)
    return weight <= SMALL_WEIGHT and weight * tokens <= SMALL_PRODUCT
