"""Prompts, and pairs of answers to them, as token ids: what the preference methods learn from.

Where nobody has judged answers yet, the model writes some to each prompt and a judge says which are better. A prompt is the
beginning of a document, to be gone on with, or a conversation, to be answered.

Shapes: B pairs, T tokens of the longest row (prompt and answer).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from llm_from_scratch.data.preferences import Preference
from llm_from_scratch.finetune.judge import Judge
from llm_from_scratch.inference.batched import by_length, draw
from llm_from_scratch.tokenizer.base import Tokenizer
from llm_from_scratch.tokenizer.chat import Message, render
from llm_from_scratch.training.loop import Batch, Batches
from llm_from_scratch.training.memory import UNSCORED

ROWS = 128  # texts drawn at once
Progress = Callable[[Sequence[list[int]]], Iterable[list[int]]]


@dataclass(frozen=True)
class Row:
    """Prompt and answer, one after the other; the answer begins at `start`."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Row
    rejected: Row


@dataclass(frozen=True)
class PairLesson:
    """Pairs to learn from, as text and as ids, and text beside them; `pad` ends a document and fills up rows, `end` ends a message."""

    preferences: list[Preference]
    pairs: list[Pair]
    text: np.ndarray
    pad: int
    end: int


def openings(texts: Iterable[str], tokenizer: Tokenizer, tokens: int) -> list[list[int]]:
    """The first `tokens` tokens of each text, behind the token that begins a document; shorter texts are left out."""
    encoded = (ids.tolist() for ids in tokenizer.encode_batch(list(texts)))
    return [[tokenizer.eot, *ids[:tokens]] for ids in encoded if len(ids) > tokens]


def answers(
    model: nn.Module, prompts: Sequence[list[int]], new: int, tokenizer: Tokenizer, seed: int, progress: Progress = iter
) -> list[list[int]]:
    """What the model answers to each prompt, up to `new` tokens, drawn as it thinks (temperature 1); without the token that ended it."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = [[] for _ in prompts]
    ends = set(tokenizer.special.values())
    for group in progress(by_length(prompts, ROWS)):
        ids, drawn = draw(model, torch.tensor([prompts[place] for place in group]), new, ends, generator)
        for place, row, said in zip(group, ids.tolist(), drawn.sum(1).tolist(), strict=True):
            answer = row[:said]
            found[place] = answer[:-1] if answer[-1] in ends else answer
    return found


def judged(
    model: nn.Module,
    prompts: Sequence[list[int]],
    new: int,
    each: int,
    tokenizer: Tokenizer,
    judge: Judge,
    seed: int,
    progress: Progress = iter,
) -> list[Preference]:
    """Of `each` answers to every prompt the best with the worst, by `judge`, the second best with the second worst, and so on.

    Answers that are worth the same make no pair.
    """
    repeated = [prompt for prompt in prompts for _ in range(each)]
    texts = [tokenizer.decode(answer) for answer in answers(model, repeated, new, tokenizer, seed, progress)]
    made = []
    for place, prompt in enumerate(prompts):
        scored = sorted((judge(text), text) for text in texts[place * each : (place + 1) * each] if text.strip())
        half = len(scored) // 2
        for (low, worse), (high, better) in zip(scored[:half], reversed(scored[-half:]), strict=True):
            if low < high:
                made.append(Preference(tokenizer.decode(prompt), better, worse))
    return made


def encode_pairs(preferences: Sequence[Preference], tokenizer: Tokenizer, context: int) -> tuple[list[Pair], int]:
    """(pairs, how many had no room in `context` tokens). Raises ValueError when none has."""
    encoded = [_pair(one, tokenizer) for one in preferences]
    pairs = [pair for pair in encoded if max(len(pair.chosen.ids), len(pair.rejected.ids)) <= context]
    if not pairs:
        raise ValueError(f"none of {len(preferences)} preferences fits a context of {context} tokens; give more, or raise its context")
    return pairs, len(preferences) - len(pairs)


def stack(pairs: Sequence[Pair], pad: int) -> tuple[Tensor, Tensor]:
    """(ids, targets), each (B, 2, T): chosen beside rejected; a target is the next token where that is the answer's, else unscored."""
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    targets = torch.full((len(rows), longest), UNSCORED)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        targets[place, row.start - 1 : len(row.ids) - 1] = torch.tensor(row.ids[row.start :])
    return ids.view(-1, 2, longest), targets.view(-1, 2, longest)


def pair_batches(count: int, batch: int, seed: int, make: Callable[[list[int]], Batch]) -> Batches:
    """The batch of a step, made of the places in it: every epoch shows each of `count` pairs once, in an order of (seed, epoch).

    What does not fill a batch is left for the next epoch's order; of fewer pairs than a batch holds, all are in each.
    """
    batch = min(batch, count)
    per_epoch = count // batch

    @lru_cache(maxsize=1)
    def order(epoch: int) -> list[int]:
        places = list(range(count))
        random.Random(f"{seed}:{epoch}").shuffle(places)
        return places

    def at(step: int) -> Batch:
        epoch, place = divmod(step, per_epoch)
        return make(order(epoch)[place * batch : (place + 1) * batch])

    return at


def _pair(preference: Preference, tokenizer: Tokenizer) -> Pair:
    prompt, end = encode_prompt(preference.prompt, tokenizer)
    chosen, rejected = (Row((*prompt, *tokenizer.encode(answer), *end), len(prompt)) for answer in (preference.chosen, preference.rejected))
    return Pair(chosen, rejected)


def encode_prompt(prompt: str | Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids that end an answer to it)."""
    if isinstance(prompt, str):
        return [tokenizer.eot, *tokenizer.encode(prompt)], []
    return render(prompt, tokenizer, prompt=True)[0], [tokenizer.end_of_turn]
