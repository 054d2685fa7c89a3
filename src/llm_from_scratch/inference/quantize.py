"""Smaller weights: the linear layers inside the blocks in 16, 8 or 4 bits, and bundles of them.

| scheme | in the file | multiplied by |
|---|---|---|
| `bf16` | all weights in bfloat16 | float32, to which they are widened at loading: a smaller file, not a smaller model |
| `int8` | 8 bits, a scale a row | bitsandbytes' LLM.int8(): activations rounded too, outliers apart |
| `int8_dynamic` | the same file | `int8.Dynamic`: activations rounded token by token, and many tokens' multiplied as whole numbers |
| `int8_weight` | the same file | `int8.WeightOnly`: activations in bfloat16; in an engine a few tokens' stay as they are |
| `nf4` | 4 bits, a scale for 64, itself in 8 bits | bitsandbytes: weights unpacked to float32 at every step |

In `int8_dynamic`, attention is multiplied as in `int8_weight`: its matrices are the smallest, and rounding what they multiply is nearly
half of what the scheme would cost (SmolLM2-135M: 0.6% of its bits a byte in place of 1.1%), for no time: their one operation more is the
activations' own rounding.

transformers opens all of them. The three int8 schemes write one and the same `model.safetensors`, the one that transformers would have
written. Which kernel runs is a choice at loading, and stands in config.json under a key of ours that transformers does not read: it runs
LLM.int8(), which rounds activations in its own way, so its logits are near those of our two kernels, not equal.

The embedding and the head are left alone in the file (but for bf16): tied they are one matrix, which the embedding reads by row, and a
packed one cannot be. In a small model they are a good part of the weights, so the file shrinks by less than the layers do. A large one is
read as a head once a token, from memory, and would be most of what an 8-bit model reads (SmolLM2-135M: 113 of 219 MB). So our two kernels
make an 8-bit copy of it at loading, for the head alone: what is looked up stays exact, and the copy costs a quarter of it in memory.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from llm_from_scratch.bundle import MANIFEST, BundleError, save_tensors
from llm_from_scratch.inference import int8, nf4, packed
from llm_from_scratch.inference.int8 import KERNELS, Int8Linear, WeightOnly
from llm_from_scratch.model.gpt import Gpt
from llm_from_scratch.model.huggingface import INDEX, WEIGHTS
from llm_from_scratch.model.llama import Llama
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.model.registry import CONFIG, export_state, from_config, load_model, read_config, read_tensors
from llm_from_scratch.section import Section

Scheme = Literal["bf16", "int8", "int8_dynamic", "int8_weight", "nf4"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
KINDS = ("model", "ngram", "quantized")
"""Bundles that `load_bundle` opens."""
SECTION, KERNEL = "quantization_config", "llm_from_scratch_kernel"
"""Keys of config.json: the one that transformers reads, and the one that says which of our kernels multiplies."""
PACKED = {"int8": (".weight", ".SCB", ".weight_format"), "nf4": (".weight", ".weight.")}
"""How the names of a quantized weight's tensors go on, or begin, after the name of its layer."""
HEAD = "lm_head"
LARGE_HEAD = 2**22
"""Numbers in a tied head from which it is copied: 16 MB of float32 are in no core's own cache when the next token comes."""


class QuantizeParams(Section):
    """One entry of the section `quantize`: which model, how, and how many held-out `tokens` it is scored on (`evaluate_tokens`; 0: all)."""

    model: str
    scheme: Scheme
    tokens: str
    evaluate_tokens: int = Field(ge=0)


def quantize(model: nn.Module, scheme: Scheme) -> nn.Module:
    """A copy of `model` in evaluation mode, its linear layers inside the blocks quantized (for bf16: every weight rounded), for our two
    kernels a large tied head too.

    Raises ValueError where there are no such layers, and for a scheme that is none.
    """
    _require_known(scheme)
    names = linear_names(model)
    if not names:
        raise ValueError(f"quantize: no linear layer inside the blocks of {type(model).__name__}; only a plain gpt or llama has them")
    quantized = copy.deepcopy(model)
    if scheme == "bf16":
        with torch.no_grad():
            for weight in quantized.parameters():
                weight.copy_(weight.bfloat16())
        return _ready(quantized, scheme)
    for name in names:
        linear = quantized.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = kernel_of(scheme, name).of(linear) if scheme in KERNELS else packed.pack(linear, _packing(scheme))
        quantized.set_submodule(name, layer)
    return _ready(_with_head(quantized, scheme), scheme)


def linear_names(model: nn.Module) -> list[str]:
    """The plain linear layers inside the blocks of a gpt or llama; none of anything else."""
    if not isinstance(model, Gpt | Llama):
        return []
    blocks = "transformer.h." if isinstance(model, Gpt) else "model.layers."
    return [name for name, part in model.named_modules() if type(part) is nn.Linear and name.startswith(blocks)]


def kernel_of(scheme: Scheme, name: str) -> type[Int8Linear]:
    """The layer that stands in for the one called `name` in one of our two schemes; attention's is in bfloat16 (see the module)."""
    return WeightOnly if "attn" in name else KERNELS[scheme]


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that `quantize` replaced in the blocks, by name; for bf16, which replaces none, those whose weights it rounded."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, Int8Linear) or packed.packing_of(part)}
    replaced = {name: part for name, part in layers.items() if name != HEAD}
    return replaced or {name: model.get_submodule(name) for name in linear_names(model) if _is_bf16(model)}


def scheme_of(model: nn.Module) -> Scheme:
    """How a model is quantized. Raises ValueError for one that is not."""
    layers = quantized_layers(model).values()
    if not layers:
        raise ValueError(f"this {type(model).__name__} is not quantized; call quantize first")
    kinds = {type(layer) for layer in layers}
    ours = (scheme for scheme in SCHEMES if scheme in KERNELS and KERNELS[scheme] in kinds)  # int8_dynamic, which has both, first
    return next(ours, None) or packed.packing_of(next(iter(layers))) or "bf16"


def dequantized(layer: nn.Module) -> Tensor:
    """float32 (out, in): the numbers that a layer of `quantized_layers` stands for, the same bits that bitsandbytes unpacks."""
    tensors = layer.state_dict()
    if "SCB" in tensors:
        return int8.dequantize(tensors["weight"], tensors["SCB"])
    weight: Tensor = nf4.dequantize(tensors) if "weight.absmax" in tensors else tensors["weight"]
    return weight


def linear_mb(model: nn.Module) -> tuple[float, float]:
    """Megabytes of the replaced weights as stored, with all that unpacking them needs, and of the same weights in float32."""
    layers: list[Any] = list(quantized_layers(model).values())
    plain = sum(4 * layer.in_features * layer.out_features for layer in layers)
    if _is_bf16(model):
        return plain / 2e6, plain / 1e6
    stored = sum(tensor.nbytes for layer in layers for name, tensor in layer.state_dict().items() if name != "bias")
    return stored / 1e6, plain / 1e6


def save_quantized(model: nn.Module, source: Path, folder: Path) -> None:
    """Write a quantized model beside what goes with it: tokenizer, chat template and generation settings are those of `source`.

    Raises ValueError for a model that is not quantized.
    """
    scheme = scheme_of(model)
    config = {key: value for key, value in read_config(source).items() if key not in (SECTION, KERNEL)}
    config |= {"dtype": "bfloat16"} if scheme == "bf16" else {"dtype": "float32", SECTION: packed.section(_packing(scheme))}
    config |= {KERNEL: scheme} if scheme in KERNELS else {}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if scheme == "bf16":
        assert isinstance(model, Gpt | Llama)
        tensors = {name: tensor.bfloat16() for name, tensor in export_state(model).items()}
    else:
        tensors = model.state_dict()  # ours are Hugging Face's names; a quantized Conv1D is not turned there
    save_tensors(folder / WEIGHTS, tensors)
    own = {CONFIG, INDEX, MANIFEST, "README.md"}
    for path in source.iterdir():
        if path.is_file() and path.name not in own and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)


def load_bundle(folder: Path) -> nn.Module | NGram:
    """The model in a folder, plain or quantized, in evaluation mode.

    Raises BundleError for a damaged one and ValueError for what is no whole model, as an adapter is, or quantized in a way not known here.
    """
    if (folder / "adapter_config.json").exists() and not (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds an adapter, and its base is elsewhere; open it with finetune, or serve a merged one")
    config = read_config(folder)
    if SECTION not in config:
        plain = load_model(folder)
        return _ready(plain, "bf16") if config.get("dtype") == "bfloat16" and isinstance(plain, Gpt | Llama) else plain
    scheme = _scheme_in(config, folder / CONFIG)
    model = from_config(config)
    tensors = read_tensors(folder)
    names = linear_names(model)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            layer = _layer(linear, name, scheme, _take(tensors, name, _packing(scheme)))
        except (KeyError, ValueError) as error:
            raise BundleError(f"{folder / WEIGHTS}: {name} cannot be unpacked ({error}); it and {CONFIG} are not of one model") from None
        model.set_submodule(name, layer)
    missing, odd = model.load_state_dict(tensors, strict=False)
    taken = {name + suffix for name in names for suffix in PACKED["int8"]}
    if wrong := odd + sorted(set(missing) - taken):
        raise BundleError(f"{folder / WEIGHTS}: {wrong[0]} {'has no place' if odd else 'is missing'}; it and {CONFIG} are not of one model")
    return _ready(_with_head(model, scheme), scheme)


def _with_head(model: nn.Module, scheme: Scheme) -> nn.Module:
    """With an 8-bit copy of the embedding as its head, where the kernel is ours and the head tied and large. It is in no file."""
    if isinstance(model, Llama) and model.shape.tied and scheme in KERNELS and model.shape.vocab_size * model.shape.width >= LARGE_HEAD:
        weight, largest = int8.round_rows(model.model.embed_tokens.weight.detach())
        setattr(model, HEAD, KERNELS[scheme](weight, largest, None, stored=False))
    return model


def _layer(linear: nn.Linear, name: str, scheme: Scheme, tensors: dict[str, Tensor]) -> nn.Module:
    """What stands in place of `linear`. Raises KeyError or ValueError where the tensors are not those of such a layer."""
    if scheme == "nf4":
        return packed.unpack(linear, "nf4", tensors)
    weight, largest = tensors["weight"], tensors["SCB"]
    if weight.dtype != torch.int8 or weight.shape != linear.weight.shape or largest.shape != weight.shape[:1]:
        wanted = f"int8 {tuple(linear.weight.shape)} and a scale a row"
        raise ValueError(f"found {weight.dtype} {tuple(weight.shape)} with {tuple(largest.shape)} scales, wanted {wanted}")
    if scheme not in KERNELS:
        return packed.unpack(linear, "int8", tensors)
    aligned = weight.clone()  # a tensor of a mapped file may begin at any byte, and the kernels read sixteen at once
    return kernel_of(scheme, name)(aligned, largest.clone(), linear.bias)


def _take(tensors: dict[str, Tensor], layer: str, packing: packed.Packing) -> dict[str, Tensor]:
    """Remove from `tensors` those that a layer's weight is packed in; their names without the layer's."""
    first, *more = (layer + suffix for suffix in PACKED[packing])
    names = [name for name in tensors if name == first or name.startswith(tuple(more))]
    return {name.removeprefix(f"{layer}."): tensors.pop(name) for name in names}


def _ready(model: nn.Module, scheme: Scheme) -> nn.Module:
    """In evaluation mode (in training mode LLM.int8() does not round activations), and marked as transformers does, which peft asks for."""
    mark = "is_rounded_to_bf16" if scheme == "bf16" else packed.MARKS.get(scheme)
    if mark:
        setattr(model, mark, True)
    return model.eval()


def _is_bf16(model: nn.Module) -> bool:
    return bool(getattr(model, "is_rounded_to_bf16", False))


def _packing(scheme: Scheme) -> packed.Packing:
    """How the file holds the weights."""
    return "nf4" if scheme == "nf4" else "int8"


def _scheme_in(config: Mapping[str, Any], place: Path) -> Scheme:
    """The scheme of a quantized bundle by its config.json. Raises ValueError naming what it found where nothing here can run it."""
    section = config[SECTION]
    if section.get("quant_method") == "bitsandbytes":
        if section.get("load_in_8bit"):
            kernel = config.get(KERNEL, "int8")
            if kernel != "int8" and kernel not in KERNELS:
                raise ValueError(f"{place}: {KERNEL} is {kernel!r}, and there is {', '.join(KERNELS)}; without the key, LLM.int8() runs")
            scheme: Scheme = kernel
            return scheme
        if section.get("bnb_4bit_quant_type") == "nf4":
            return "nf4"
    found = section.get("bnb_4bit_quant_type") or section.get("quant_method")
    raise ValueError(f"{place}: quantized with {found!r}, and only bitsandbytes' int8 and nf4 are read; quantize the plain model anew")


def _require_known(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"quantize: no scheme {scheme!r}; there is {', '.join(SCHEMES)}")
