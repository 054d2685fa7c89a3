"""A version opened: from what the registry keeps of it to a function of texts.

The bundle is where it was when it was registered, as long as nothing newer took its place, or where `place_of` says that it was
brought back to.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.evaluation.whole import open_whole
from llm_from_scratch.finetune.reward import load_reward
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.registry.places import place_of
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.tracking import Answer


def open_version(config: Mapping[str, Any]) -> Answer:
    """A question is answered, a text gone on with or judged, a query searched for; params are max_tokens, temperature and seed.

    Raises BundleError naming the command that brings a bundle back which is no longer there.
    """
    root = Path(config["root"])
    folder = place_of(root, config["folder"], config["digest"])
    beside = {role: place_of(root, bundled["folder"], bundled["digest"]) for role, bundled in config["beside"].items()}
    match config["asked"]:
        case "query":
            return partial(_found, Index.open(folder, Embedder.open(beside["embedder"])))
        case "judge":
            bundle.verify(folder, "reward")
            return partial(_judged, load_reward(folder), tokenizer.load(folder))
        case asked:
            return partial(_written, Engine(*open_whole(folder, beside.get("base"))), asked == "chat")


def _written(engine: Engine, chat: bool, texts: list[str], params: Mapping[str, Any]) -> list[str]:
    sampling = Sampling(**{"max_tokens": 24, "temperature": 0.0, **params})
    pieces = [engine.chat([{"role": "user", "content": text}], sampling) if chat else engine.complete(text, sampling) for text in texts]
    return ["".join(piece.text for piece in answer).strip() for answer in pieces]


@torch.no_grad()
def _judged(model: Any, words: tokenizer.Tokenizer, texts: list[str], params: Mapping[str, Any]) -> list[str]:
    rows = [torch.tensor([words.eot, *words.encode(text)][: model.context]) for text in texts]
    return [f"{float(model(row[None], torch.tensor([len(row) - 1]))):.4f}" for row in rows]


def _found(index: Index, texts: list[str], params: Mapping[str, Any]) -> list[str]:
    """The best passage for each query, or nothing."""
    return [hits[0].passage.text if hits else "" for hits in index.search_all(texts, 1)]
