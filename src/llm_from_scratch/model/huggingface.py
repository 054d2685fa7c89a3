"""The Hugging Face layout: what config.json says of a gpt or llama, and what its tensors are called.

Written so that `AutoModelForCausalLM.from_pretrained` needs no code of ours; read so that a folder from there needs none of theirs.
What is not the function that our rung computes (another activation, scaled rotations, biases) is refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_from_scratch.bundle import BundleError
from llm_from_scratch.model.gpt import Gpt, GptShape
from llm_from_scratch.model.llama import Llama, LlamaShape

Config = Mapping[str, Any]

MODEL_TYPES = ("gpt2", "llama", "qwen3")
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""GPT-2 keeps these as (in, out), where a linear layer has (out, in)."""
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Tables that old checkpoints carry along; we compute them."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


def config_of(model: Gpt | Llama) -> dict[str, Any]:
    """The fields of config.json that fix the function, token ids left out."""
    return _gpt_config(model.shape) if isinstance(model, Gpt) else _llama_config(model.shape)


def from_config(config: Config) -> Gpt | Llama:
    """An untrained model of the shape that config.json gives. Raises ValueError for what the rung cannot compute."""
    try:
        return Gpt(_gpt_shape(config)) if config["model_type"] == "gpt2" else Llama(_llama_shape(config))
    except KeyError as error:
        raise ValueError(f"config.json of a {config['model_type']} has no {error}; take it from the folder the weights came with") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the one, or the shards that its index lists, which are looked for in the folder only.

    Raises BundleError for a folder whose weights are a pickle: opening one runs whatever code is in it.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        pickles = [name for name in PICKLES if (folder / name).exists()]
        if pickles and not (folder / WEIGHTS).exists():
            raise BundleError(f"{folder / pickles[0]} is a pickle, which runs code when it is opened; fetch {WEIGHTS} of the same model")
        return [folder / WEIGHTS]
    shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / Path(shard).name for shard in sorted(set(shards))]


def export_names(model: Gpt | Llama) -> dict[str, Tensor]:
    """The weights under their Hugging Face names and in their layout. A tied head is not there twice."""
    return {name: turned(name, tensor) if isinstance(model, Gpt) else tensor for name, tensor in model.state_dict().items()}


def import_names(model: Gpt | Llama, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same the other way, from any of the forms that checkpoints come in.

    The base model's own checkpoints lack its prefix (`transformer.` or `model.`), as OpenAI's GPT-2 does; old ones carry buffers; some
    repeat the tied head.
    """
    prefix = "transformer." if isinstance(model, Gpt) else "model."
    bare = not any(name.startswith(prefix) for name in tensors)
    tied = isinstance(model, Gpt) or model.lm_head is None
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(BUFFERS) or (tied and name == "lm_head.weight"):
            continue
        full = prefix + name if bare and name != "lm_head.weight" else name
        named[full] = turned(full, tensor) if isinstance(model, Gpt) else tensor
    return named


def turned(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a gpt between our (out, in) and GPT-2's (in, out), either way; by its name, whatever is not such a matrix stays."""
    return tensor.T if name.endswith(CONV1D) else tensor


def _gpt_config(shape: GptShape) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.context,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.hidden,
        "activation_function": "gelu_new",
        "embd_pdrop": shape.dropout,
        "attn_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
        "layer_norm_epsilon": shape.norm_eps,
        "tie_word_embeddings": True,
    }


def _gpt_shape(config: Config) -> GptShape:
    """The optional fields have GPT-2's defaults; of its three dropouts we keep the residual one for all."""
    _require(config, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _require(config, "tie_word_embeddings", True)
    _require(config, "scale_attn_weights", True)
    _require(config, "scale_attn_by_inverse_layer_idx", False)
    _require(config, "add_cross_attention", False)
    return GptShape(
        vocab_size=config["vocab_size"],
        context=config["n_positions"],
        width=config["n_embd"],
        layers=config["n_layer"],
        heads=config["n_head"],
        hidden=config.get("n_inner") or 4 * config["n_embd"],
        dropout=config.get("resid_pdrop", 0.1),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
    )


def _llama_config(shape: LlamaShape) -> dict[str, Any]:
    """`rope_theta` stands twice: in `rope_parameters` for transformers 5, beside it for older readers."""
    return {
        "architectures": ["Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if shape.qk_norm else "llama",
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tied,
        **({} if shape.qk_norm else {"mlp_bias": False}),
    }


def _llama_shape(config: Config) -> LlamaShape:
    """The optional fields have the defaults of LlamaConfig and Qwen3Config."""
    _require(config, "hidden_act", "silu")
    _require(config, "attention_bias", False)
    _require(config, "mlp_bias", False)
    _require(config, "use_sliding_window", False)
    qwen = config["model_type"] == "qwen3"
    heads = config["num_attention_heads"]
    return LlamaShape(
        vocab_size=config["vocab_size"],
        context=config["max_position_embeddings"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if qwen else config["hidden_size"] // heads),
        hidden=config["intermediate_size"],
        rope_theta=_rope_theta(config),
        qk_norm=qwen,
        tied=config.get("tie_word_embeddings", False),
        norm_eps=config.get("rms_norm_eps", 1e-6),
    )


def _rope_theta(config: Config) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _require({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, "rope_type", "default")
    _require({**config, **rope}, "partial_rotary_factor", None, 1)
    theta: float = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return float(theta)


def _require(config: Config, field: str, *known: object) -> None:
    """Refuse a value other than those `known`, of which the first is what a missing field means."""
    if (found := config.get(field, known[0])) not in known:
        raise ValueError(f"config.json: {field} is {found!r}, and this rung computes only {' or '.join(map(repr, known))}")
