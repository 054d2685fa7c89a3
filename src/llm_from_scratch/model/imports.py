"""Other people's models as bundles of ours: what they are made of is read, checked and written again, in float32.

Raises ValueError naming the field, tensor or file that stands in the way. What decides is whether this project's gpt or llama computes the
same function; see `huggingface` and `gguf` for what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch.model import gguf, huggingface
from llm_from_scratch.model.gpt import Gpt
from llm_from_scratch.model.llama import Llama
from llm_from_scratch.model.registry import CONFIG, GENERATION, from_config, import_state, load_model, read_config

TOKEN_ROWS = ("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight")


@dataclass(frozen=True)
class Source:
    """A model as it was found. `ends`: bos_token_id, eos_token_id (several, where a chat ends in another) and pad_token_id."""

    model: Gpt | Llama
    ends: dict[str, Any]
    metadata: dict[str, Any]


def read_gguf(path: Path) -> Source:
    """A model of llama.cpp's, with the file's metadata."""
    config, tensors, metadata = gguf.read(path)
    model = from_config(config)
    assert isinstance(model, Gpt | Llama)
    try:
        import_state(model, tensors)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ends = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    turn = metadata.get("tokenizer.ggml.eot_token_id", ends["eos_token_id"])
    if turn != ends["eos_token_id"]:
        ends["eos_token_id"] = [ends["eos_token_id"], turn]
    return Source(model.eval(), {name: found for name, found in ends.items() if found is not None}, metadata)


def read_folder(folder: Path) -> Source:
    """A model in a folder of Hugging Face's layout, from safetensors in one file or in shards. A pickle is refused unopened."""
    config = read_config(folder)
    if config["model_type"] not in huggingface.MODEL_TYPES:
        known = ", ".join(huggingface.MODEL_TYPES)
        raise ValueError(f"{folder / CONFIG}: model_type is {config['model_type']!r}, and only {known} are computed here")
    if "quantization_config" in config:
        raise ValueError(f"{folder / CONFIG}: quantization_config is there; take the plain model, and quantize it here")
    model = load_model(folder)
    assert isinstance(model, Gpt | Llama)
    generation = json.loads((folder / GENERATION).read_text(encoding="utf-8")) if (folder / GENERATION).exists() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: generation.get(name, config.get(name)) for name in names}
    return Source(model, {name: value for name, value in found.items() if value is not None}, config)


def fitted(model: Gpt | Llama, vocab_size: int) -> Gpt | Llama:
    """The model without the rows past the last token, which many have for the sake of round sizes: no text has them.

    Raises ValueError where rows are missing.
    """
    if (rows := model.shape.vocab_size) == vocab_size:
        return model
    if rows < vocab_size:
        raise ValueError(f"the model has rows for {rows} tokens, the tokenizer has {vocab_size}; take both from one folder")
    with torch.random.fork_rng(devices=[]):
        made = type(model)(replace(model.shape, vocab_size=vocab_size))  # type: ignore[arg-type]
    state: Mapping[str, torch.Tensor] = model.state_dict()
    made.load_state_dict({name: weight[:vocab_size] if name in TOKEN_ROWS else weight for name, weight in state.items()})
    return made.eval()
