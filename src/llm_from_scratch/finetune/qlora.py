"""QLoRA: LoRA beside weights that stay packed in 4 bits (Dettmers et al. 2023, arXiv:2305.14314).

The base is an nf4 bundle. In every pass each packed weight is unpacked for its product and thrown away again; the gradient goes through it
into the adapter and leaves it as it is. So a model takes about a seventh of the memory while it learns, and more time: on a CPU unpacking
is most of a step. The paper's paged and 8-bit optimizers are `optimizer: paged_adamw_8bit` and `adamw_8bit` of any plan.

What was learned was learned beside the rounded weights. Merged into them in float32 it says the same (`merge`); to have 4 bits again it
must be rounded again, and that rounding nobody trained against (`merge_quantized` says how large it is).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from llm_from_scratch.finetune import lora
from llm_from_scratch.finetune.lora import LoraParams
from llm_from_scratch.finetune.sft import Examples, Finetune, Job
from llm_from_scratch.inference.packed import MARKS
from llm_from_scratch.inference.quantize import dequantized, quantize, quantized_layers
from llm_from_scratch.model.rung import Rung

if TYPE_CHECKING:
    from peft import PeftModel


class QloraFinetuneParams(Finetune):
    """Fine-tuning of an adapter over a base in 4 bits, which stays as it is."""

    method: Literal["qlora"]
    lora: LoraParams


@dataclass(frozen=True)
class Requantized:
    """A merged model in 4 bits. `learned` is the norm of what training changed in its weights, `rounding` of what packing them again did.

    Both are shares of the norm of the weights themselves.
    """

    model: Rung
    learned: float
    rounding: float

    def __str__(self) -> str:
        return (
            f"dequantized, merged and quantized again: training moved the weights by {self.learned:.2%}, rounding by {self.rounding:.2%}; "
            "serve the adapter beside its base, or merged in float32, to have what was trained"
        )


def job(model: Rung, examples: Examples, params: QloraFinetuneParams) -> Job:
    """The same as `lora`, beside packed weights. Its plain model is merged in float32, which says what the attached one says.

    Raises ValueError for a base that is not in 4 bits.
    """
    if not getattr(model, MARKS["nf4"], False):
        raise ValueError(
            "finetune: method qlora wants a base in 4 bits; name a quantize entry of scheme nf4 as its model, or use method lora"
        )
    return lora.adapter_job(model, examples, params, params.lora, merge)


def merge(model: PeftModel) -> Rung:
    """A plain copy of the base, its packed weights as the float32 numbers that they stand for, with the adapter added into them."""
    base, config, tensors = lora.detached(model)
    return lora.merge(lora.reattach(unpacked(base), config, tensors))


def unpacked(model: Rung) -> Rung:
    """A copy in plain layers of float32: the same outputs, sooner, and all its parameters to be counted."""
    plain = copy.deepcopy(model)
    for name, layer in quantized_layers(plain).items():
        plain.set_submodule(name, _linear(layer))
    setattr(plain, MARKS["nf4"], False)
    return plain


def merge_quantized(model: PeftModel) -> Requantized:
    """Merged and in 4 bits again, to be saved as a bundle by `save_quantized`; and how far that is from what was trained."""
    merged, (base, _, _) = merge(model), lora.detached(model)
    packed = quantize(merged, "nf4")
    whole = learned = rounding = 0.0
    for name, layer in quantized_layers(packed).items():
        before, wanted, rounded = dequantized(base.get_submodule(name)), merged.get_submodule(name).weight, dequantized(layer)
        assert isinstance(wanted, torch.Tensor)
        whole += float(before.square().sum())
        learned += float((wanted - before).square().sum())
        rounding += float((rounded - wanted).square().sum())
    assert isinstance(packed, Rung)
    return Requantized(packed, (learned / whole) ** 0.5, (rounding / whole) ** 0.5)


def _linear(layer: nn.Module) -> nn.Linear:
    """The plain layer that a packed one stands for, on its device."""
    weight = dequantized(layer)
    bias: Any = layer.bias  # or none
    with torch.device("meta"):
        linear = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None)
    linear.weight = nn.Parameter(weight)
    linear.bias = bias
    return linear
