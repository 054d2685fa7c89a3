"""How fast a model learns, held against what the device could do at most (the share is its MFU), and how much room it takes.

Shapes: T context, C the width of attention, all its heads together.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import torch
from torch import nn

from llm_from_scratch.model.gpt import Gpt
from llm_from_scratch.model.llama import Llama

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "A100": 312.0,
    "A40": 150.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "RTX A6000": 154.8,
}
"""Dense bf16 with fp32 sums, in 10**12 FLOP/s, from NVIDIA's data sheets; the words are those of the device's name."""
PROBE_SIDE, PROBES = 1024, 8


def resident_mb(model: nn.Module) -> float:
    """Megabytes of the tensors that a model holds while it serves: weights, scales and tables, shared ones once.

    Not in it: the cache of each request, what a step makes and drops again, Python and its libraries.
    """
    held: dict[int, int] = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.state_dict().values(), *model.buffers())}
    return sum(held.values()) / 1e6


def size_mb(folder: Path) -> float:
    """Megabytes (10**6 bytes) of the weights of a bundle."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def flops_per_token(model: nn.Module, context: int) -> float:
    """Floating-point operations that a training step spends on one token: 6·N + 12·L·T·C (Chowdhery et al. 2022, appendix B).

    N counts the parameters that are multiplied, so neither a table of positions nor a token table apart from the head; a tied one is the
    head. L layers. Attention counts as if it were not causal, as is the custom, and what checkpointing computes again does not count.
    Raises ValueError for a model that is neither gpt nor llama.
    """
    if isinstance(model, Gpt):
        looked_up, width = model.transformer.wpe.weight.numel(), model.shape.width
    elif isinstance(model, Llama):
        looked_up = 0 if model.lm_head is None else model.model.embed_tokens.weight.numel()
        width = model.shape.heads * model.shape.head_dim
    else:
        raise ValueError(f"the operations of a {type(model).__name__} are not counted; give a gpt or a llama")
    multiplied = sum(weight.numel() for weight in model.parameters()) - looked_up
    return 6.0 * multiplied + 12.0 * model.shape.layers * context * width


def mfu(tok_per_s: float, flops: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of `peak` FLOP/s that `tok_per_s` tokens at `flops` each come to; None without a peak."""
    return tok_per_s * flops / peak if peak else None


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that `device` can do at most: a card's dense bf16 by its data sheet, a CPU's fp32 as its fastest matrix product shows.

    None for a card whose sheet is not in PEAK_TFLOPS.
    """
    return card_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else _probed()


def card_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a card by its name: the entry of PEAK_TFLOPS with the most words, all of them in the name."""
    words = set(re.findall(r"\w+", name))
    known = [entry for entry in PEAK_TFLOPS if set(entry.split()) <= words]
    return PEAK_TFLOPS[max(known, key=lambda entry: len(entry.split()))] * 1e12 if known else None


def peak_memory_mb(device: torch.device) -> float:
    """Megabytes (10**6 bytes) at the highest: of tensors on a card since its statistics were reset, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource  # Windows has none

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / 1e6 if sys.platform == "darwin" else highest * 1024 / 1e6


def _probed() -> float:
    """The fastest of some products of two square matrices, after one that sets the library up."""
    square = torch.randn(PROBE_SIDE, PROBE_SIDE, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(PROBES + 1):
        started = time.perf_counter()
        square @ square
        seconds.append(time.perf_counter() - started)
    return 2.0 * PROBE_SIDE**3 / min(seconds[1:])
