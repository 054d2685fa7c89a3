"""The ladder by name: build a rung from its params, save it as a Hugging Face folder, load it from that folder alone.

gpt and llama are saved as what Hugging Face calls gpt2, llama and qwen3, so nobody needs our code to use them. The rungs that it does
not know get a `model_type` of our own, and their params stand in config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from torch import Tensor

from llm_from_scratch.bundle import BundleError, load_tensors, save_tensors
from llm_from_scratch.model import huggingface
from llm_from_scratch.model.attention import Attention, AttentionParams
from llm_from_scratch.model.bigram import Bigram, BigramParams
from llm_from_scratch.model.gpt import Gpt, GptParams, GptShape
from llm_from_scratch.model.huggingface import WEIGHTS
from llm_from_scratch.model.llama import Llama, LlamaParams, LlamaShape, start_copying
from llm_from_scratch.model.mlp import Mlp, MlpParams
from llm_from_scratch.model.ngram import NGram, NgramParams
from llm_from_scratch.model.rung import Rung

LADDER = ("ngram", "bigram", "mlp", "attention", "gpt", "llama")
OURS = "llm_from_scratch_"
CONFIG, GENERATION = "config.json", "generation_config.json"


def _known(value: Any) -> Any:
    if isinstance(value, dict) and (name := value.get("architecture")) not in LADDER:
        raise ValueError(f"no rung {name!r}; the ladder is {' < '.join(LADDER)}")
    return value


ModelParams = Annotated[
    Annotated[
        NgramParams | BigramParams | MlpParams | AttentionParams | GptParams | LlamaParams,
        Field(discriminator="architecture"),
    ],
    BeforeValidator(_known),
]
"""The `model` of a training section: which rung, and the numbers that it needs."""


def build(params: ModelParams, vocab_size: int) -> Rung:
    """An untrained rung, drawn from torch's global random numbers: seed them first. The n-gram is not built but counted."""
    match params:
        case BigramParams():
            return Bigram(params, vocab_size)
        case MlpParams():
            return Mlp(params, vocab_size)
        case AttentionParams():
            return Attention(params, vocab_size)
        case GptParams():
            fields = params.model_dump(exclude={"architecture"})
            return Gpt(GptShape(vocab_size=vocab_size, hidden=4 * params.width, norm_eps=1e-5, **fields))
        case LlamaParams():
            if params.width % params.heads:
                raise ValueError(f"width {params.width} is not a multiple of heads {params.heads}; every head needs the same share of it")
            fields = params.model_dump(exclude={"architecture", "copying"}) | {"head_dim": params.width // params.heads}
            llama = Llama(LlamaShape(vocab_size=vocab_size, tied=True, norm_eps=1e-6, **fields))
            if params.copying:
                start_copying(llama, params.copying)
            return llama
        case NgramParams():
            raise ValueError("an ngram has nothing to build before it has read a text; NGram.train counts one")


def parameters(model: torch.nn.Module | NGram) -> int:
    """Learned numbers, a tied one once; of an n-gram, its counts."""
    return model.parameters if isinstance(model, NGram) else sum(weight.numel() for weight in model.parameters())


def config_of(model: Rung | NGram, eot: int) -> dict[str, Any]:
    """config.json of a model whose texts end in the token `eot`."""
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    if isinstance(model, NGram):
        return {"model_type": f"{OURS}ngram", "architecture": "ngram", "order": model.order, "vocab_size": model.vocab_size, **ends}
    if isinstance(model, Gpt | Llama):
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        return {**huggingface.config_of(model), "dtype": dtype, "use_cache": True, **ends}
    assert isinstance(model, Bigram | Mlp | Attention)
    fields = model.params.model_dump()
    return {"model_type": OURS + model.params.architecture, "vocab_size": model.vocab_size, **fields, **ends}


def export_state(model: Rung | NGram) -> dict[str, Tensor]:
    """The tensors of model.safetensors: Hugging Face's names and layout for gpt and llama, each tied tensor once."""
    if isinstance(model, NGram):
        return {name: torch.from_numpy(array) for name, array in model.arrays().items()}
    return huggingface.export_names(model) if isinstance(model, Gpt | Llama) else dict(model.state_dict())


def import_state(model: Rung, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors as `export_state` names them into a model, in the model's own precision.

    Raises ValueError naming the first tensor that is missing, left over, or of another shape.
    """
    named = huggingface.import_names(model, tensors) if isinstance(model, Gpt | Llama) else dict(tensors)
    wanted = model.state_dict()
    if odd := sorted(named.keys() ^ wanted.keys()):
        found = "has no place in the model" if odd[0] in named else "is missing"
        raise ValueError(f"{odd[0]} {found} ({len(odd)} such names); the weights and config.json are not of one model")
    for name, tensor in named.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"found shape {tuple(tensor.shape)}, config.json wants {tuple(wanted[name].shape)}"
            raise ValueError(f"{name}: {shapes}; the weights and config.json are not of one model")
    model.load_state_dict(named)


def save_model(model: Rung | NGram, folder: Path, eot: int, end: int | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors. A chat model also stops at `end`, the end of a message."""
    generation = {"bos_token_id": eot, "eos_token_id": eot if end is None else [eot, end], "pad_token_id": eot}
    save_as(model, folder, config_of(model, eot), generation)


def save_as(model: Rung | NGram, folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """The same with config.json and generation_config.json as they are given."""
    _write_json(folder / CONFIG, config)
    _write_json(folder / GENERATION, generation)
    save_tensors(folder / WEIGHTS, export_state(model))


def load_model(folder: Path) -> Rung | NGram:
    """The model that a folder holds, in eval mode and fp32: one of ours, or any plain gpt2, llama or qwen3 from Hugging Face.

    Raises BundleError when files are missing or cut short, and ValueError when config.json and weights do not fit.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    try:
        if config["model_type"] == f"{OURS}ngram":
            return NGram.from_arrays({name: tensor.numpy() for name, tensor in tensors.items()}, config["vocab_size"], config["order"])
        model = from_config(config)
        import_state(model, tensors)
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} has no {error}; take it from the folder the weights came with") from None
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return model.eval()


def from_config(config: Mapping[str, Any]) -> Rung:
    """An untrained model of the shape that a config.json gives; the random numbers of the caller are left alone."""
    kind = str(config["model_type"])
    with torch.random.fork_rng(devices=[]):
        if kind in huggingface.MODEL_TYPES:
            return huggingface.from_config(config)
        if (name := kind.removeprefix(OURS)) == kind or name not in LADDER:
            known = " < ".join(LADDER)
            raise ValueError(f"no rung {kind!r}; the ladder is {known}, and {', '.join(huggingface.MODEL_TYPES)} are read as gpt and llama")
        return build(_params(name, config), config["vocab_size"])


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as written. Raises BundleError when there is none, or it names no model."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"no {CONFIG} in {folder}; a model folder has one beside {WEIGHTS}") from None
    except ValueError as error:
        raise BundleError(f"{folder / CONFIG} is not JSON ({error}); fetch or rebuild the folder") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise BundleError(f"{folder / CONFIG} has no model_type, so it is no model's; the ladder is {' < '.join(LADDER)}")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one safetensors file or from the shards that its index lists."""
    return {name: tensor for path in huggingface.weight_files(folder) for name, tensor in load_tensors(path).items()}


def _params(name: str, config: Mapping[str, Any]) -> ModelParams:
    """The params of one of our own rungs, out of the config.json that holds them."""
    ours: TypeAdapter[Any] = TypeAdapter(ModelParams)
    beside = {"model_type", "vocab_size", "bos_token_id", "eos_token_id"}
    try:
        params: ModelParams = ours.validate_python({key: value for key, value in config.items() if key not in beside})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"config.json of a {name}: {where}: {first['msg']}; it must be as save_model wrote it") from None
    return params


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
