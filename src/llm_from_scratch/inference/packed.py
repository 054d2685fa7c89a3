"""bitsandbytes' layers: made from a plain Linear, saved as transformers saves them, and made again from what was saved.

int8 (Dettmers et al. 2022, LLM.int8()): each output row of a weight has one scale, and activations are rounded to 8 bits on the way in,
except the columns with an outlier of 6 or more. Those are chosen for all tokens that are read together, so a token's logits depend a
little on its company: a cached step and a whole read may differ. nf4 (Dettmers et al. 2023, QLoRA) is explained in `nf4`; activations stay
as they are. On a CPU neither promises speed: the weights are unpacked, or the activations rounded, again at every step.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm_from_scratch.inference.nf4 import BLOCK

Packing = Literal["int8", "nf4"]
OUTLIER = 6.0
"""Activations of this size and more are multiplied in full precision (LLM.int8(), section 3.2)."""
MARKS = {"int8": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}
"""What transformers sets on a model, and peft asks for."""

# On import, peft's too, bitsandbytes warns where a CPU multiplies bfloat16 that it found no kernel for that. No layer of ours wants one.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


def pack(linear: nn.Linear, packing: Packing) -> nn.Module:
    """The layer in place of `linear`. Raises ValueError for rows that nf4 cannot cut into its blocks."""
    bnb = _bitsandbytes()
    layer = _empty_layer(linear, packing)
    weight = linear.weight.detach()
    if packing == "int8":  # a fresh parameter is quantized when it is moved, to the CPU too
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
    else:
        layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, module=layer).to(weight.device)
    made: nn.Module = layer
    return made


def unpack(linear: nn.Linear, packing: Packing, tensors: dict[str, Tensor]) -> nn.Module:
    """The layer that was saved as `tensors`, in place of `linear`, whose bias it keeps.

    Raises KeyError or ValueError where some are missing.
    """
    bnb = _bitsandbytes()
    layer = _empty_layer(linear, packing)
    weight = tensors.pop("weight")
    if packing == "int8":
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False, SCB=tensors["SCB"]).to("cpu")
    else:
        layer.weight = bnb.nn.Params4bit.from_prequantized(weight, tensors, device="cpu", module=layer)
    made: nn.Module = layer
    return made


def packing_of(layer: nn.Module) -> Packing | None:
    """Which of bitsandbytes' layers this is, if it is one. Where bitsandbytes was never imported, none can be."""
    if (bnb := sys.modules.get("bitsandbytes")) is None:
        return None
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return "int8"
    return "nf4" if isinstance(layer, bnb.nn.Linear4bit) else None


def section(packing: Packing) -> dict[str, Any]:
    """`quantization_config` of config.json, as transformers writes it. The head is skipped: tied, it is the embedding."""
    eight_bits = packing == "int8"
    general: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": eight_bits, "load_in_4bit": not eight_bits}
    general["llm_int8_skip_modules"] = ["lm_head"]
    if eight_bits:
        return general | {"llm_int8_threshold": OUTLIER, "llm_int8_has_fp16_weight": False}
    four_bits = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": "float32", "quant_storage": "uint8"}
    return general | {f"bnb_4bit_{key}": value for key, value in four_bits.items()}


def _empty_layer(linear: nn.Linear, packing: Packing) -> Any:
    """bitsandbytes' layer in place of `linear`: the same bias, and a weight that is still to come (on no device, so it costs nothing)."""
    bnb = _bitsandbytes()
    # bitsandbytes 0.50 packs a row that ends inside a block, and on the CPU unpacks it with the wrong scales, without a word.
    if packing == "nf4" and linear.in_features % BLOCK:
        raise ValueError(
            f"quantize: nf4 works on blocks of {BLOCK} weights and found {linear.in_features} inputs; choose int8 or a multiple of {BLOCK}"
        )
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    with torch.device("meta"):
        if packing == "int8":
            layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=OUTLIER)
        else:
            layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4")
            # Where a CPU multiplies bfloat16, bitsandbytes would round activations and scales to it, and save the scales rounded:
            # another model there, and other bytes, than on a CPU that cannot.
            layer.support_avx512bf16_for_cpu = False
    layer.bias = linear.bias
    return layer


def _bitsandbytes() -> Any:
    """Imported late, because it takes seconds and only these layers need it. Raises ValueError naming the extra that is missing."""
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("int8 and nf4 layers need bitsandbytes; pip install 'llm-from-scratch[quantize]'") from None
    # It warns at every int8 product that float32 becomes float16 on the way to int8: once a layer and token, and nothing can be done.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes
