"""Smaller weights: the linear layers inside the blocks in 8 or 4 bits, everything else as it was.

int8 (Dettmers et al. 2022, LLM.int8()): each output row of a weight has one scale, and activations are rounded to 8 bits on the way in,
except the columns with an outlier of 6 or more. Those are chosen for all tokens that are read together, so a token's logits depend a
little on its company: a cached step and a whole read may differ. nf4 (Dettmers et al. 2023, QLoRA): 16 levels at the quantiles of a normal
distribution, one scale for 64 weights, and the scales quantized themselves (double quantization); activations stay as they are.

The embedding and the head are left alone on purpose: tied they are one matrix, which the embedding reads by row, and a packed one cannot
be. In a small model they are a good part of the weights, so the file shrinks by less than the layers do. What it cannot do is promise
speed on a CPU: bitsandbytes unpacks the weights, or rounds the activations, again at every step.

The tensors are named and packed as transformers does it, so `AutoModelForCausalLM.from_pretrained` opens a saved folder.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llm_from_scratch.bundle import MANIFEST, BundleError, save_tensors
from llm_from_scratch.model.gpt import Gpt
from llm_from_scratch.model.huggingface import INDEX, WEIGHTS
from llm_from_scratch.model.llama import Llama
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.model.registry import CONFIG, from_config, load_model, read_config, read_tensors
from llm_from_scratch.section import Section

Scheme = Literal["int8", "nf4"]
KINDS = ("model", "ngram", "quantized")
"""Bundles that `load_bundle` opens."""
OUTLIER = 6.0
"""Activations of this size and more are multiplied in full precision (LLM.int8(), section 3.2)."""
BLOCK = 64
"""Weights that share a scale in nf4."""
PACKED = {"int8": (".weight", ".SCB", ".weight_format"), "nf4": (".weight", ".weight.")}
"""How the names of a quantized weight's tensors go on, or begin, after the name of its layer."""


class QuantizeParams(Section):
    """One entry of the section `quantize`: which model, how, and how many held-out `tokens` it is scored on (`evaluate_tokens`; 0: all)."""

    model: str
    scheme: Scheme
    tokens: str
    evaluate_tokens: int = Field(ge=0)


def quantize(model: nn.Module, scheme: Scheme) -> nn.Module:
    """A copy of `model` in evaluation mode, its linear layers inside the blocks quantized. Raises ValueError where there are none."""
    names = linear_names(model)
    if not names:
        raise ValueError(f"quantize: no linear layer inside the blocks of {type(model).__name__}; only a plain gpt or llama has them")
    quantized = copy.deepcopy(model)
    for name in names:
        linear = quantized.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = _empty_layer(linear, scheme)
        layer.weight = _pack(linear.weight.detach(), layer, scheme)
        quantized.set_submodule(name, layer)
    return _ready(quantized, scheme)


def linear_names(model: nn.Module) -> list[str]:
    """The plain linear layers inside the blocks of a gpt or llama; none of anything else."""
    if not isinstance(model, Gpt | Llama):
        return []
    blocks = "transformer.h." if isinstance(model, Gpt) else "model.layers."
    return [name for name, part in model.named_modules() if type(part) is nn.Linear and name.startswith(blocks)]


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that `quantize` replaced, by name."""
    bnb = _bitsandbytes()
    return {name: part for name, part in model.named_modules() if isinstance(part, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)}


def linear_mb(model: nn.Module) -> tuple[float, float]:
    """Megabytes of the replaced weights with all that unpacking them needs, and of the same weights in float32."""
    layers = [layer for layer in quantized_layers(model).values() if isinstance(layer, nn.Linear)]
    packed = sum(tensor.nbytes for layer in layers for name, tensor in layer.state_dict().items() if name != "bias")
    plain = sum(4 * layer.in_features * layer.out_features for layer in layers)
    return packed / 1e6, plain / 1e6


def save_quantized(model: nn.Module, source: Path, folder: Path) -> None:
    """Write a quantized model beside what goes with it: tokenizer, chat template and generation settings are those of `source`."""
    config = read_config(source) | {"dtype": "float32", "quantization_config": _config_section(model)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(folder / WEIGHTS, model.state_dict())  # ours are Hugging Face's names; a quantized Conv1D is not turned there
    own = {CONFIG, INDEX, MANIFEST, "README.md"}
    for path in source.iterdir():
        if path.is_file() and path.name not in own and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)


def load_bundle(folder: Path) -> nn.Module | NGram:
    """The model in a folder, plain or quantized, in evaluation mode.

    Raises BundleError for a damaged one and ValueError for what is no whole model, as an adapter is.
    """
    if (folder / "adapter_config.json").exists() and not (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds an adapter, and its base is elsewhere; open it with finetune, or serve a merged one")
    config = read_config(folder)
    if "quantization_config" not in config:
        return load_model(folder)
    scheme = _scheme_of(config["quantization_config"], folder / CONFIG)
    model = from_config(config)
    tensors = read_tensors(folder)
    names = linear_names(model)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = _empty_layer(linear, scheme)
        try:
            layer.weight = _unpack(_take(tensors, name, scheme), layer, scheme)
        except (KeyError, ValueError) as error:
            raise BundleError(f"{folder / WEIGHTS}: {name} cannot be unpacked ({error}); it and {CONFIG} are not of one model") from None
        model.set_submodule(name, layer)
    missing, odd = model.load_state_dict(tensors, strict=False)
    if wrong := odd + sorted(set(missing) - {f"{name}.weight" for name in names}):
        raise BundleError(f"{folder / WEIGHTS}: {wrong[0]} {'has no place' if odd else 'is missing'}; it and {CONFIG} are not of one model")
    return _ready(model, scheme)


def _empty_layer(linear: nn.Linear, scheme: Scheme) -> Any:
    """bitsandbytes' layer in place of `linear`: the same bias, and a weight that is still to come (on no device, so it costs nothing)."""
    bnb = _bitsandbytes()
    # bitsandbytes 0.50 packs a row that ends inside a block, and on the CPU unpacks it with the wrong scales, without a word.
    if scheme == "nf4" and linear.in_features % BLOCK:
        raise ValueError(
            f"quantize: nf4 works on blocks of {BLOCK} weights and found {linear.in_features} inputs; choose int8 or a multiple of {BLOCK}"
        )
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    with torch.device("meta"):
        if scheme == "int8":
            layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=OUTLIER)
        else:
            layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4")
    layer.bias = linear.bias
    return layer


def _pack(weight: Tensor, layer: nn.Module, scheme: Scheme) -> nn.Parameter:
    """Quantize (out, in) float32: bitsandbytes does it when a fresh parameter is moved, to the CPU too."""
    bnb = _bitsandbytes()
    if scheme == "int8":
        packed: nn.Parameter = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
    else:
        packed = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, module=layer).to(weight.device)
    return packed


def _unpack(tensors: dict[str, Tensor], layer: nn.Module, scheme: Scheme) -> nn.Parameter:
    """The parameter that these tensors of a file were. Raises KeyError or ValueError where some are missing."""
    bnb = _bitsandbytes()
    weight = tensors.pop("weight")
    if scheme == "int8":
        whole: nn.Parameter = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False, SCB=tensors["SCB"]).to("cpu")
    else:
        whole = bnb.nn.Params4bit.from_prequantized(weight, tensors, device="cpu", module=layer)
    return whole


def _take(tensors: dict[str, Tensor], layer: str, scheme: Scheme) -> dict[str, Tensor]:
    """Remove from `tensors` those that a layer's weight is packed in; their names without the layer's."""
    first, *more = (layer + suffix for suffix in PACKED[scheme])
    names = [name for name in tensors if name == first or name.startswith(tuple(more))]
    return {name.removeprefix(f"{layer}."): tensors.pop(name) for name in names}


def _ready(model: nn.Module, scheme: Scheme) -> nn.Module:
    """In evaluation mode (in training mode int8 does not round activations), and marked as transformers does, which peft asks for."""
    setattr(model, "is_loaded_in_8bit" if scheme == "int8" else "is_loaded_in_4bit", True)
    return model.eval()


def _config_section(model: nn.Module) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    eight_bits = bool(getattr(model, "is_loaded_in_8bit", False))
    general: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_8bit": eight_bits, "load_in_4bit": not eight_bits}
    general["llm_int8_skip_modules"] = ["lm_head"]
    if eight_bits:
        return general | {"llm_int8_threshold": OUTLIER, "llm_int8_has_fp16_weight": False}
    four_bits = {"quant_type": "nf4", "use_double_quant": True, "compute_dtype": "float32", "quant_storage": "uint8"}
    return general | {f"bnb_4bit_{key}": value for key, value in four_bits.items()}


def _scheme_of(section: Mapping[str, Any], place: Path) -> Scheme:
    if section.get("quant_method") == "bitsandbytes":
        if section.get("load_in_8bit"):
            return "int8"
        if section.get("bnb_4bit_quant_type") == "nf4":
            return "nf4"
    found = section.get("bnb_4bit_quant_type") or section.get("quant_method")
    raise ValueError(f"{place}: quantized with {found!r}, and only bitsandbytes' int8 and nf4 are read; quantize the plain model anew")


def _bitsandbytes() -> Any:
    """Imported late, because it takes seconds and only quantized models need it. Raises ValueError naming the extra that is missing."""
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("quantized models need bitsandbytes; pip install 'llm-from-scratch[quantize]'") from None
    # It warns at every int8 product that float32 becomes float16 on the way to int8: once a layer and token, and nothing can be done.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes
