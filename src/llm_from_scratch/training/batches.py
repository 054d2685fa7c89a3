"""What a model sees at each step: random windows of the training tokens.

The batch of a step is a pure function of the step, so a resumed run needs no cursor, and sees what it would have seen.

Shapes: B batch, T context.
"""

from __future__ import annotations

import numpy as np
import torch

from llm_from_scratch.training.loop import Batch, Batches


def windows(ids: np.ndarray, context: int, batch: int, seed: int) -> Batches:
    """Step → `batch` windows from anywhere in `ids` (N,), targets one token ahead. Raises ValueError where not even one fits."""
    if len(ids) < context + 1:
        raise ValueError(
            f"{len(ids)} training tokens are fewer than one window of context + 1 = {context + 1}; lower context or tokenize more text"
        )
    offsets = np.arange(context + 1)

    def at(step: int) -> Batch:
        starts = np.random.default_rng((seed, step)).integers(len(ids) - context, size=(batch, 1))
        rows = torch.from_numpy(ids[starts + offsets].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    return at
