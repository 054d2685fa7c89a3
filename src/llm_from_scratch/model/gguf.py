"""GGUF, the one-file form of llama.cpp: a table of named values, then the tensors, quantized in blocks or not.

Read into the config.json and the tensors that Hugging Face's layout would have, and written from them, so the rest of the project knows
nothing of it. The names differ, a linear layer is always (out, in), and for the architecture `llama` the rows of queries and keys stand
in another order: llama.cpp turns neighbours (2i, 2i + 1), we and Hugging Face turn (i, i + D / 2).

Shapes: H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm_from_scratch.model.gpt import Gpt
from llm_from_scratch.model.huggingface import export_names, turned
from llm_from_scratch.model.llama import Llama

Fields = Mapping[str, Any]
"""Metadata by name: text, numbers, truth values, and lists of them."""
Kind = Literal["f16", "q8_0"]

BLOCK = 32
"""Weights of a row that share a scale in Q8_0."""
FILE_TYPES = {"f16": 1, "q8_0": 7}
LARGEST_HALF = 65504.0
EXTRA = "uv pip install 'llm-from-scratch[import]'"

LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
FAMILIES = {"llama": ("model.layers.", LLAMA_NAMES), "qwen3": ("model.layers.", LLAMA_NAMES), "gpt2": ("transformer.h.", GPT_NAMES)}
"""llama.cpp's architecture to what Hugging Face calls the blocks and their parts."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """(config.json, tensors, metadata): the first two as a Hugging Face folder would hold them, the tensors in float32.

    Raises ValueError for a file that is cut short or none, and by name for whatever is not computed here.
    """
    metadata, stored = _parse(path)
    try:
        config = _config(metadata, stored)
        tensors = {_their_name(name, config["model_type"]): (name, tensor) for name, tensor in stored.items()}
        found = {name: _import(name, _dequantize(given, tensor), config) for name, (given, tensor) in tensors.items()}
    except KeyError as error:
        raise ValueError(f"{path.name} has no {error}; it is not a whole model, fetch it again") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    return config, _without_tied_head(found, config, path), metadata


def write(path: Path, model: Gpt | Llama, kind: Kind, fields: Fields) -> None:
    """The model at `path` with `fields` (tokenizer, name, licence) beside what its shape says.

    Matrices in half precision or Q8_0 (rows that are no multiple of 32 in half), vectors and learned positions in float32. Raises
    ValueError for a weight that half precision cannot hold.
    """
    gguf = _library()
    config = _described(model)
    architecture = config.pop("architecture")
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in ({f"{architecture}.{key}": value for key, value in config.items()} | dict(fields)).items():
        _add(writer, name, value)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in export_names(model).items():
        given = _our_name(name, architecture)
        weight = _export(name, tensor.detach().float().cpu(), model)
        stored = _storage(given, weight, kind)
        data = weight.contiguous().numpy()
        writer.add_tensor(given, gguf.quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- a file to a folder -----------------------------------------------------------------------------------------------------------


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    gguf = _library()
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}); fetch it again") from None
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _config(metadata: Fields, stored: Mapping[str, Any]) -> dict[str, Any]:
    """config.json. Raises ValueError for another architecture, or a field of this one that changes the function."""
    kind = metadata["general.architecture"]
    if kind not in FAMILIES:
        raise ValueError(f"general.architecture is {kind!r}, and only {', '.join(FAMILIES)} are read")
    values = {name.removeprefix(f"{kind}."): value for name, value in metadata.items() if name.startswith(f"{kind}.")}
    for field in (
        "rope.scaling.type",
        "attention.sliding_window",
        "expert_count",
        "attention.logit_scale",
        "logit_scale",
        "residual_scale",
    ):
        if values.get(field) not in (None, 0, 1.0, "none"):
            raise ValueError(f"{kind}.{field} is {values[field]!r}, which is not computed here")
    heads, width = values["attention.head_count"], values["embedding_length"]
    common = {"model_type": kind, "vocab_size": int(stored["token_embd.weight"].shape[-1])}
    if kind == "gpt2":
        return common | {
            "n_positions": values["context_length"],
            "n_embd": width,
            "n_layer": values["block_count"],
            "n_head": heads,
            "n_inner": values["feed_forward_length"],
            "resid_pdrop": 0.0,
            "layer_norm_epsilon": values["attention.layer_norm_epsilon"],
        }
    shared, head_dim = (
        values.get("attention.head_count_kv", heads),
        values.get("attention.key_length", width // heads if isinstance(heads, int) else 0),
    )
    same = {"attention.head_count": heads, "attention.head_count_kv": shared, "feed_forward_length": values["feed_forward_length"]}
    for field, found in same.items():
        if not isinstance(found, int):
            raise ValueError(f"{kind}.{field} differs from layer to layer, and all layers are alike here")
    for field in ("attention.value_length", "rope.dimension_count"):
        if values.get(field, head_dim) != head_dim:
            raise ValueError(f"{kind}.{field} is {values[field]}, and only the head width, {head_dim}, is computed here")
    return common | {
        "max_position_embeddings": values["context_length"],
        "hidden_size": width,
        "num_hidden_layers": values["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": head_dim,
        "intermediate_size": values["feed_forward_length"],
        "rope_theta": values.get("rope.freq_base", 10000.0),
        "rms_norm_eps": values["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in stored,
    }


def _their_name(name: str, kind: str) -> str:
    """`blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`."""
    blocks, names = FAMILIES[kind]
    *place, part, ending = name.split(".")
    if part not in names or ending not in ("weight", "bias") or (place and (len(place) != 2 or place[0] != "blk")):
        raise ValueError(f"the tensor {name} has no place in a {kind} as it is computed here (biases, experts, scaled rotations are not)")
    return f"{blocks}{place[1]}.{names[part]}.{ending}" if place else f"{names[part]}.{ending}"


def _dequantize(name: str, tensor: Any) -> Tensor:
    gguf = _library()
    try:
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    except NotImplementedError:
        raise ValueError(f"{name} is stored as {tensor.tensor_type.name}, which cannot be unpacked here; take Q8_0, Q4_1 or F16") from None


def _import(name: str, tensor: Tensor, config: Fields) -> Tensor:
    if config["model_type"] == "gpt2":
        return turned(name, tensor)
    if config["model_type"] == "llama" and (heads := _rotated(name, config["num_attention_heads"], config["num_key_value_heads"])):
        return _halves(tensor, heads)
    return tensor


def _without_tied_head(tensors: dict[str, Tensor], config: Fields, path: Path) -> dict[str, Tensor]:
    """Files of gpt2 repeat the token table as the head. Raises ValueError where it is another."""
    if config["model_type"] != "gpt2" or "lm_head.weight" not in tensors:
        return tensors
    if not torch.equal(tensors.pop("lm_head.weight"), tensors["transformer.wte.weight"]):
        raise ValueError(f"{path.name}: output.weight is not token_embd.weight, and a gpt2's head is tied; take a file in F16 or Q8_0")
    return tensors


# --- a model to a file ------------------------------------------------------------------------------------------------------------


def _described(model: Gpt | Llama) -> dict[str, Any]:
    """What the shape says, by llama.cpp's names."""
    shape = model.shape
    common = {
        "context_length": shape.context,
        "embedding_length": shape.width,
        "block_count": shape.layers,
        "feed_forward_length": shape.hidden,
        "attention.head_count": shape.heads,
        "vocab_size": shape.vocab_size,
    }
    if isinstance(model, Gpt):
        return {"architecture": "gpt2", **common, "attention.layer_norm_epsilon": float(shape.norm_eps)}
    return {
        "architecture": "qwen3" if model.shape.qk_norm else "llama",
        **common,
        "attention.head_count_kv": model.shape.kv_heads,
        "attention.key_length": model.shape.head_dim,
        "attention.value_length": model.shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(shape.norm_eps),
        "rope.dimension_count": model.shape.head_dim,
        "rope.freq_base": float(model.shape.rope_theta),
    }


def _our_name(name: str, kind: str) -> str:
    blocks, names = FAMILIES[kind]
    given = {theirs: ours for ours, theirs in names.items()}
    stem, _, ending = name.rpartition(".")
    if not stem.startswith(blocks):
        return f"{given[stem]}.{ending}"
    layer, _, part = stem.removeprefix(blocks).partition(".")
    return f"blk.{layer}.{given[part]}.{ending}"


def _export(name: str, tensor: Tensor, model: Gpt | Llama) -> Tensor:
    if isinstance(model, Gpt):
        return turned(name, tensor)
    heads = _rotated(name, model.shape.heads, model.shape.kv_heads)
    return _neighbours(tensor, heads) if heads and not model.shape.qk_norm else tensor


def _storage(name: str, weight: Tensor, kind: Kind) -> Any:
    """llama.cpp multiplies by matrices alone; what it adds or scales by must be float32."""
    types = _library().GGMLQuantizationType
    if weight.dim() < 2 or name.startswith("position_embd"):
        return types.F32
    if kind == "q8_0" and weight.shape[-1] % BLOCK == 0:
        return types.Q8_0
    if (largest := float(weight.abs().max())) > LARGEST_HALF:
        raise ValueError(f"{name} holds {largest:.3g}, and half precision ends at {LARGEST_HALF:.0f}; it cannot be exported")
    return types.F16


def _add(writer: Any, name: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, list(value))


# --- rotations --------------------------------------------------------------------------------------------------------------------


def _rotated(name: str, heads: int, kv_heads: int) -> int:
    """How many heads a weight has whose rows are turned by position; 0 for all others."""
    return heads if name.endswith("q_proj.weight") else kv_heads if name.endswith("k_proj.weight") else 0


def _halves(weight: Tensor, heads: int) -> Tensor:
    """(H · D, C) with neighbours in pairs to halves in pairs."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    """The other way."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError(f"GGUF files need the package gguf; {EXTRA}") from None
    return gguf
