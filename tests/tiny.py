"""Real bundles too small to mean anything, as the stages would leave them: for tests that need whole parts and no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.inference.quantize import load_bundle, quantize, save_quantized
from llm_from_scratch.model import registry
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.retrieval.passages import Passage
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.tokenizer import BpeTokenizer
from llm_from_scratch.tokenizer.bpe import train_bpe
from tests import tiny_retrieval

SENTENCES = (
    "The cat is a small animal that lives with people.",
    "The dog is an animal that barks at the cat.",
    "A river is water that runs to the sea.",
    "A star is a sphere of gas that shines.",
)
CONTEXT = 128


def tiny_limits(**changes: Any) -> ServeParams:
    """What a service of these parts takes and gives at most."""
    limits = {
        "model": "chat_int8",
        "model_name": "tiny",
        "embedding_name": "tiny-embedder",
        "slots": 2,
        "prefill_chunk": 16,
        "maximum_prompt_tokens": 64,
        "maximum_new_tokens": 32,
        "default_new_tokens": 8,
        "maximum_choices": 3,
        "maximum_inputs": 4,
        "maximum_body_bytes": 4096,
        "maximum_waiting": 1,
        "deadline_seconds": 60,
        "passages": 2,
        "maximum_passages": 3,
    }
    return ServeParams.model_validate(limits | changes)


def tiny_tokenizer(folder: Path, vocab_size: int = 300) -> BpeTokenizer:
    """Byte pairs of four sentences, saved in `folder` (which has no manifest yet)."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = train_bpe(SENTENCES, vocab_size)
    trained.save(folder)
    return trained


def tiny_model(folder: Path, seed: int = 0, context: int = CONTEXT) -> Path:
    """A sealed, untrained llama with its tokenizer."""
    with bundle.writing(folder) as partial:
        words = tiny_tokenizer(partial)
        torch.manual_seed(seed)
        shape = LlamaParams(
            architecture="llama",
            context=context,
            width=32,
            layers=2,
            heads=4,
            kv_heads=2,
            hidden=64,
            rope_theta=10000.0,
            qk_norm=False,
            copying=0.0,
        )
        model = registry.build(shape, words.vocab_size)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=0.4)  # as built, blocks add nothing at first and a model only repeats the last token
                if len(weight) == words.vocab_size:
                    weight[list(words.special.values())] = 0  # a logit of 0 is never the highest: greedy answers run to their limit
        registry.save_model(model, partial, words.eot)
        bundle.seal(partial, "model", "train@tiny", {}, parameters=registry.parameters(model), tokenizer=tokenizer.digest(partial))
    return folder


def tiny_quantized(folder: Path, source: Path) -> Path:
    """A sealed int8 bundle of the model in `source`."""
    model = load_bundle(source)
    assert isinstance(model, torch.nn.Module)
    with bundle.writing(folder) as partial:
        save_quantized(quantize(model, "int8"), source, partial)
        parents = {"model": bundle.read_manifest(source).digest}
        bundle.seal(partial, "quantized", "quantize@tiny_int8", parents, tokenizer=tokenizer.digest(partial))
    return folder


def tiny_embedder(folder: Path, seed: int = 0) -> Path:
    """A sealed corpus bundle with an untrained BERT in it."""
    return tiny_retrieval.tiny_encoder(folder, seed)


def tiny_passages(texts: Sequence[str] = SENTENCES) -> list[Passage]:
    """One passage a text, titled with its second word."""
    return [Passage(f"Q{number}#0", f"Q{number}", text.split()[1], text) for number, text in enumerate(texts)]


def tiny_index(folder: Path, embedder: Embedder, texts: Sequence[str] = SENTENCES) -> Index:
    """The texts, indexed and sealed."""
    return tiny_retrieval.tiny_index(folder, embedder, tiny_passages(texts))


def in_float32(theirs: nn.Module) -> nn.Module:
    """A model that transformers opened, its 4-bit layers kept from rounding activations to bfloat16 where the CPU could multiply that."""
    for layer in theirs.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return theirs
