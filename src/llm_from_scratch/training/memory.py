"""A large batch in a small memory: it goes through the model in parts, whose gradients add up to those of the whole.

A loss is a mean over scored targets, so a part counts by its share of them; where padding is uneven, equal weights would learn
something else. How small the parts must be, the loop finds out: it halves them where memory runs out.

Shapes: B batch, T context.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNSCORED = -100  # what torch's cross-entropy ignores
COMPLAINTS = ("out of memory", "can't allocate memory", "alloc_failed")  # CUDA's and MPS's, the CPU allocator's, cuBLAS's


def parts(batch: tuple[Tensor, ...], rows: int) -> list[tuple[tuple[Tensor, ...], float]]:
    """(inputs, targets, …), each of B rows, in slices of at most `rows` rows, 0 for all; beside each, its share of the scored targets.

    A slice in which nothing is scored has no mean, and is left out.
    """
    count = len(batch[0])
    if not 0 < rows < count:
        return [(batch, 1.0)]
    slices = [tuple(tensor[start : start + rows] for tensor in batch) for start in range(0, count, rows)]
    scored = [int((part[1] != UNSCORED).sum()) for part in slices]
    return [(part, own / sum(scored)) for part, own in zip(slices, scored, strict=True) if own] or [(batch, 1.0)]


def ran_out(error: Exception) -> bool:
    """Whether `error` says that memory could not be had. On a card it has a type of its own, on a CPU only words.

    A CPU mostly does not say it at all: Linux promises more memory than there is, and ends the process that takes it at its word.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error).lower() for words in COMPLAINTS)


def release(device: torch.device) -> None:
    """Give back what the failed try left in the allocator's hands: in pieces of its sizes, it is of no use to smaller ones."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
