"""How far a model is from another that it should equal: the damage done by quantizing it, seen at every token.

Perplexity can hide damage, because some tokens get likelier by luck; the KL divergence cannot be below zero anywhere.

Shapes: B windows, T places in a window, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Agreement:
    """`kl`: mean of KL(reference ‖ other), nats a token. `top1`: share of places where both think the same token likeliest."""

    kl: float
    top1: float
    tokens: int


def compare(reference: nn.Module, other: nn.Module, ids: np.ndarray, context: int, batch: int) -> Agreement:
    """Over whole windows of `context` tokens of `ids`, side by side, `batch` of them at a time.

    Raises ValueError when `ids` do not fill one window.
    """
    count = len(ids) // context
    if not count:
        raise ValueError(f"comparing models: {len(ids)} held-out tokens, wanted at least one window of {context}")
    windows = torch.from_numpy(ids[: count * context].astype(np.int64)).view(count, context)
    kl = same = 0.0
    for first in range(0, count, batch):
        divergence, agree = _divergence(reference, other, windows[first : first + batch])
        kl += divergence
        same += agree
    return Agreement(kl / windows.numel(), same / windows.numel(), windows.numel())


@torch.inference_mode()
def _divergence(reference: nn.Module, other: nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Over ids (B, T): the sum of the divergences in nats, in float64 because they are small, and how often the likeliest tokens agree."""
    p = reference(ids).double().log_softmax(-1)
    q = other(ids).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum()), float((p.argmax(-1) == q.argmax(-1)).sum())
