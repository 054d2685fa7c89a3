"""Linear layers with 8-bit weights: the numbers of LLM.int8(), multiplied in two ways that suit a CPU better than bitsandbytes' own.

    W[n, k] ≈ weight[n, k] · SCB[n] / 127      weight: whole numbers from -127 to 127, SCB: the largest magnitude of each row of W

These are the tensors that bitsandbytes stores, to the bit, so one file serves three kernels and which one runs is chosen at loading.

`WeightOnly` multiplies activations in bfloat16 by the whole numbers and scales afterwards. A token behind a cache reads every weight once
and does little with it, so reading a quarter of the bytes is what makes it faster; many tokens at once are bound by arithmetic, and for
them the weights are turned to float32 first, with the same roundings. Why bfloat16, and not float32: torch 2.13 has a vectorized kernel on
x86 for the one and a plain loop for the other, five to ten times slower.

`Dynamic` rounds the activations to 8 bits too, each token by its own largest one, and multiplies whole numbers only, which a processor
with VNNI does four at a time (without it, torch has a plain loop: right, and slow). Sums of whole numbers are exact, so a token's result
does not depend on those it is read with, as LLM.int8()'s does. What it lacks is LLM.int8()'s way around outliers: one huge activation
leaves the others of its token few steps to be told apart by.

In an engine, a few tokens of a Llama on a CPU go through neither: `kernels` multiplies float32 activations by the same whole numbers, for
`Dynamic` rounded first. Both are for inference: no gradient goes through them.

Shapes: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 127
"""Whole numbers on each side of zero; -128 is not used, so that the range is symmetric."""
FEW = 16
"""Up to so many tokens at once are bound by reading the weights (see benchmarks/quantization.py)."""
TINY = torch.tensor(torch.finfo(torch.float32).tiny)
"""So that a token of zeros is not divided by zero."""
LANES = 16
"""torch's packed kernel takes so many inputs at once, and for a row that ends in between it adds up what lies behind it."""


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) to whole numbers, int8 (N, K), and the largest magnitude of each row, float32 (N,): Dettmers et al. 2022, section 2.1.

    The weights pass through float16 on the way, as they do in bitsandbytes, so that both give the same bits.
    """
    narrow = weight.to(torch.float16)
    largest = narrow.abs().amax(1).float()
    scaled = narrow * (STEPS / largest[:, None])
    return torch.nan_to_num(scaled).round().to(torch.int8), largest  # a row of zeros is 0 / 0


def dequantize(weight: Tensor, largest: Tensor) -> Tensor:
    """float32 (N, K) of what `round_rows` gave, in the order of operations that bitsandbytes has."""
    return weight * largest[:, None] * (1 / STEPS)


class Int8Linear(nn.Module, ABC):
    """In place of a Linear: `weight` (N, K) int8, `SCB` (N,) float32, and `bias` (N,) or none; the names are bitsandbytes'.

    One that is not `stored` is made anew of what is: it leaves no tensors in a state.
    """

    weight: Tensor
    SCB: Tensor
    scale: Tensor
    ones: Tensor

    def __init__(self, weight: Tensor, largest: Tensor, bias: nn.Parameter | None, stored: bool = True) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.register_buffer("weight", weight, persistent=stored)
        self.register_buffer("SCB", largest, persistent=stored)
        self.register_buffer("weight_format", torch.tensor(0, dtype=torch.uint8), persistent=stored)  # bitsandbytes' word for row by row
        self.register_buffer("scale", largest / STEPS, persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """The layer that stands in for `linear`."""
        return cls(*round_rows(linear.weight.detach()), linear.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N), in float32."""
        product = self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x (M, K) times the weights, (M, N)."""


class WeightOnly(Int8Linear):
    """The kernel `int8_weight`: 8-bit weights, activations and unscaled sums in bfloat16."""

    def __init__(self, weight: Tensor, largest: Tensor, bias: nn.Parameter | None, stored: bool = True) -> None:
        super().__init__(weight, largest, bias, stored)
        self.register_buffer("ones", torch.ones_like(self.scale, dtype=torch.bfloat16), persistent=False)

    def product(self, x: Tensor) -> Tensor:
        narrow = x.bfloat16()
        if len(x) <= FEW and self.in_features % LANES == 0 and self.weight.device.type == "cpu":
            sums = torch._weight_int8pack_mm(narrow, self.weight, self.ones)  # its own scales would be bfloat16 too
        else:
            sums = F.linear(narrow.float(), self.weight.float()).bfloat16()
        return sums.mul(self.scale)


class Dynamic(Int8Linear):
    """The kernel `int8_dynamic`: 8-bit weights, and activations rounded to 8 bits as they come."""

    def product(self, x: Tensor) -> Tensor:
        step = torch.add(TINY, x.abs().amax(1, True), alpha=1 / STEPS)
        return torch._int_mm(x.div(step).round_().to(torch.int8), self.weight.t()).mul(step).mul(self.scale)


KERNELS: dict[str, type[Int8Linear]] = {"int8_weight": WeightOnly, "int8_dynamic": Dynamic}
"""Scheme to layer; `quantize.kernel_of` says which layer of a model has which. The scheme `int8` is bitsandbytes' own layer over the same
tensors."""
