"""In which numbers a step is computed. Weights, gradients and optimizer state are fp32 whatever the choice.

fp32   everything in full precision; the default, and on a CPU without bf16 units the only fast one
tf32   matrix products drop to a 10-bit mantissa, on NVIDIA cards since Ampere
bf16   matrix products in bfloat16: 8 bits of mantissa, the range of fp32
fp16   matrix products in half precision, whose small range needs the loss scaled up before the gradients underflow
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Arithmetic:
    """`autocast()` goes around a forward pass; `scaler` scales the loss for fp16 and passes it through for the others."""

    autocast: Callable[[], AbstractContextManager[Any]]
    scaler: torch.amp.GradScaler


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[Arithmetic]:
    """The arithmetic of a run, for as long as the block lasts. Raises ValueError where `device` cannot do `precision`."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision tf32 needs an NVIDIA card, and this run is on {device.type}; set precision to fp32")
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    autocast = partial(torch.autocast, device.type, dtype=lower) if lower else nullcontext
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield Arithmetic(autocast, torch.amp.GradScaler(device.type, enabled=precision == "fp16"))
    finally:
        torch.set_float32_matmul_precision(before)
