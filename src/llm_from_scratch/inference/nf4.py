"""Four-bit weights back to numbers: what bitsandbytes' nf4 means, spelled out (Dettmers et al. 2023, QLoRA, sections 2 and 3).

A weight is one of 16 levels, the quantiles of a normal distribution, times the scale of its block of 64. A float32 scale for 64 weights
would cost half a bit a weight, so the scales are quantized themselves (double quantization): less their mean, each is one of 256 levels
times the scale of its 256 neighbours. That leaves 4 + 8 / 64 + 32 / (64 · 256) = 4.127 bits a weight.

This is for reading and checking; bitsandbytes' kernels do the work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

BLOCK = 64
"""Weights that share a scale."""
SCALES = 256
"""Scales that share a scale of their own."""


def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """float32 (out, in) of one layer's tensors, named as in a file without the layer's name: `weight`, `weight.absmax`, ...

    Two weights share a byte of `weight`, the first in its upper half. Raises KeyError where a tensor is missing.
    """
    state = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist()))
    outer = tensors["weight.nested_absmax"].repeat_interleave(SCALES)[: len(tensors["weight.absmax"])]
    scales = tensors["weight.nested_quant_map"][tensors["weight.absmax"].long()] * outer + state["nested_offset"]

    packed = tensors["weight"].flatten()
    halves = torch.stack((packed >> 4, packed & 15), 1).flatten()
    levels = tensors["weight.quant_map"][halves.long()].view(-1, BLOCK)
    weight: Tensor = (levels * scales[:, None]).view(state["shape"])
    return weight
