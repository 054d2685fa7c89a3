"""What a model sees at each step: random windows of the training tokens, conversations whose answers alone count, or both in turn.

The batch of a step is a pure function of the step, so a resumed run needs no cursor, and sees what it would have seen.

Shapes: B batch, T context, or the longest conversation of a batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from llm_from_scratch.training.loop import Batch, Batches
from llm_from_scratch.training.memory import UNSCORED

POOL = 32  # batches that are sorted by length together: enough for little padding, few enough to stay well mixed

Pair = tuple[Tensor, Tensor]
"""A conversation as (inputs, targets), each (T,) int64; what is read and not learned has UNSCORED for its target."""


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


def conversations(pairs: Sequence[Pair], batch: int, pad: int, seed: int) -> Batches:
    """Step → (inputs, targets), each (B, T), conversations of like length together; shorter ones are filled up with `pad`, unscored.

    Every epoch shows each conversation once, in an order drawn from (seed, epoch), so a step's batch depends on nothing before it.
    """
    lengths = [len(inputs) for inputs, _ in pairs]
    per_epoch = -(-len(lengths) // batch)

    @lru_cache(maxsize=1)
    def order(epoch: int) -> list[list[int]]:
        return _length_sorted(lengths, batch, random.Random(f"{seed}:{epoch}"))

    def at(step: int) -> Batch:
        epoch, place = divmod(step, per_epoch)
        return stacked([pairs[index] for index in order(epoch)[place]], pad)

    return at


def in_turn(batches: Batches, others: Batches, first: int, share: float) -> Batches:
    """Step → a batch of `others` for the `first` steps and then, evenly spread, for `share` of them; else one of `batches`.

    Each sees its own steps, from 0 on without a gap.
    """

    def at(step: int) -> Batch:
        later = max(0, step - first)
        taken = int(later * share)
        if step < first or int((later + 1) * share) > taken:
            return others(min(step, first) + taken)
        return batches(later - taken)

    return at


def shifted(ids: Tensor, scored: Tensor) -> Pair:
    """A conversation's ids (T + 1,) as a pair: each place is asked for the next token, and counts where that one is `scored`."""
    return ids[:-1], ids[1:].masked_fill(~scored[1:], UNSCORED)


def stacked(pairs: Sequence[Pair], pad: int) -> Batch:
    """One batch of these, (B, T) each."""
    inputs = nn.utils.rnn.pad_sequence([inputs for inputs, _ in pairs], batch_first=True, padding_value=pad)
    targets = nn.utils.rnn.pad_sequence([targets for _, targets in pairs], batch_first=True, padding_value=UNSCORED)
    return inputs, targets


def _length_sorted(lengths: Sequence[int], batch: int, rng: random.Random) -> list[list[int]]:
    shuffled = list(range(len(lengths)))
    rng.shuffle(shuffled)
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), batch * POOL):
        pool = sorted(shuffled[start : start + batch * POOL], key=lengths.__getitem__)
        batches += [pool[place : place + batch] for place in range(0, len(pool), batch)]
    rng.shuffle(batches)
    return batches
