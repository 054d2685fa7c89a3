"""Causal attention, fused: what the attention rung spells out, in one call, and right behind a cache as well.

Shapes: B batch, H query heads, K key-value heads (K divides H), T queries, S keys (the queries are the last T of them), D head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """q (B, H, T, D), k and v (B, K, S, D) to (B, H, T, D): each query sees the keys up to its own place.

    Where rows differ in length, `mask` (B, 1, T, S) says it instead: it is added to the scores, 0 or -inf.

    `is_causal` puts its triangle at the upper left corner, which is wrong once S > T: there the mask is built by hand.
    """
    T, S = q.size(-2), k.size(-2)
    causal = mask is None and T == S
    if mask is None and 1 < T < S:
        mask = _visible(T, S, q.device)
    grouped = q.size(1) != k.size(1)
    answers: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped)
    return answers


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """The weights (B, H, T, S) that `attend` uses and never shows: the slow way, for pictures and tests."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    return scores.masked_fill(~_visible(q.size(-2), k.size(-2), q.device), float("-inf")).softmax(-1)


def _visible(T: int, S: int, device: torch.device) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
