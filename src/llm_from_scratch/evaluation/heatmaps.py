"""What each position looks at: the attention of a model over a text somebody can read beside it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from llm_from_scratch.inference.decoding import context_of
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.model.ngram import NGram


@torch.no_grad()
def attention_of(engine: Engine, text: str) -> tuple[NDArray[np.float32], list[str]]:
    """Weights (layers, heads, T, T), a row a query and a column what it looks at, and the T tokens of `text` as they read.

    Raises ValueError for a model without attention, and for a text longer than it can see.
    """
    ids = engine.tokenizer.encode(text)
    attend = getattr(engine.model, "attention_maps", None)
    if isinstance(engine.model, NGram) or attend is None:
        raise ValueError(f"a {type(engine.model).__name__} has no attention to draw; choose attention, gpt or llama")
    if len(ids) > (longest := context_of(engine.model)):
        raise ValueError(f"the text is {len(ids)} tokens, the model sees {longest}; choose a shorter one")
    maps = attend(torch.tensor([ids]))
    return maps.float().numpy(), [engine.tokenizer.bytes_of(token).decode("utf-8", errors="replace") for token in ids]
