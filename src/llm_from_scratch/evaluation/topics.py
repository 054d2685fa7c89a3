"""What a held-out text costs by its field: which parts of the world a model of an encyclopedia knows less well.

Each text is read alone, from an end of text on, so no field profits from the one before it. Bits per byte, as everywhere: see `likelihood`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from llm_from_scratch.data.documents import Document
from llm_from_scratch.evaluation.likelihood import Likelihood, score
from llm_from_scratch.evaluation.multiple_choice import Progress, quiet
from llm_from_scratch.tokenizer.base import Tokenizer


def bits_by_topic(
    model: nn.Module, tokenizer: Tokenizer, documents: Sequence[Document], context: int, progress: Progress = quiet
) -> list[dict[str, Any]]:
    """For each topic its `documents`, `bytes` and `val_bpb`, the cheapest first. Raises ValueError where a text spells no byte.

    `progress` is told of every text that was read.
    """
    spelled = tokenizer.token_bytes()
    costs: dict[str, list[Likelihood]] = defaultdict(list)
    for document in documents:
        ids = np.array([tokenizer.eot, *tokenizer.encode(document.text), tokenizer.eot])
        costs[document.topic].append(score(model, ids, spelled, context))
        progress(1)
    rows = [
        {"topic": topic, "documents": len(found), "bytes": sum(one.bytes for one in found), "val_bpb": together(found).val_bpb}
        for topic, found in costs.items()
    ]
    return sorted(rows, key=lambda row: (row["val_bpb"], row["topic"]))


def together(costs: Sequence[Likelihood]) -> Likelihood:
    """Several texts as one."""
    return Likelihood(math.fsum(one.nats for one in costs), sum(one.tokens for one in costs), sum(one.bytes for one in costs))
