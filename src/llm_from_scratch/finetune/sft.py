"""Supervised fine-tuning: the same next-token loss, on conversations, counted on the answers only.

Nothing is new but the batches: a question and its passages are read, not learned, so their targets are masked. What it cannot do is say
which of two answers is better; the preference methods do. It trains every weight; `lora` trains a few.

Shapes: B conversations, T tokens of the longest in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from llm_from_scratch.data.chat import ChatRecord
from llm_from_scratch.model.registry import save_model
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.tokenizer.base import END_OF_TURN, Tokenizer
from llm_from_scratch.tokenizer.chat import render
from llm_from_scratch.training.batches import conversations, shifted, stacked
from llm_from_scratch.training.loop import Batches, Loss, next_token
from llm_from_scratch.training.memory import UNSCORED
from llm_from_scratch.training.plan import Plan

SHORTEST_PASSAGE = 16  # tokens; a passage cut below this says nothing


class Finetune(Plan):
    """What every method is told: the plan of training, the bundle it starts from, the corpus of its records, and what to measure.

    `guide` is a second bundle that the method reads, the reward model of those that follow one; the others name `model` again.
    """

    model: str
    guide: str
    records: str
    questions: Annotated[int, Field(ge=1)]
    samples: Annotated[int, Field(ge=0)]


class SftParams(Finetune):
    """Fine-tuning of all weights."""

    method: Literal["sft"]


@dataclass(frozen=True)
class Examples:
    """Conversations as (inputs, targets), each (T,) int64; how many lost the end of a passage, and how many had no room at all.

    `end` ends a message and `eot` a document; the latter also fills up the shorter rows of a batch, unscored.
    """

    pairs: list[tuple[Tensor, Tensor]]
    cut: int
    skipped: int
    eot: int
    end: int

    @property
    def answer_tokens(self) -> int:
        """How many targets are scored."""
        return sum(int((targets != UNSCORED).sum()) for _, targets in self.pairs)


@dataclass(frozen=True)
class Job:
    """What a method hands to `fit` (`model`, `batches`, `loss`), and what is to be done once that ended.

    `plain` gives the trained model as one to ask, `save` writes it into a folder as a bundle of `kind`; it is told where the
    bundle that it started from is.
    """

    model: nn.Module
    batches: Batches
    loss: Loss
    kind: Literal["model", "adapter", "reward"]
    plain: Callable[[], nn.Module]
    save: Callable[[Path, str], None]


def job(model: Rung, examples: Examples, params: SftParams) -> Job:
    """All weights, next-token loss."""
    return Job(
        model=model,
        batches=chat_batches(examples, params.batch, params.seed),
        loss=next_token,
        kind="model",
        plain=lambda: model,
        save=lambda folder, base: save_model(model, folder, examples.eot, examples.end),
    )


def encode_records(records: Sequence[ChatRecord], tokenizer: Tokenizer, context: int) -> Examples:
    """Each record as one row of at most `context` tokens. A longer one loses the end of its system message, or, without one, is skipped.

    Raises ValueError when no record fits.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    cut = 0
    for record in records:
        ids, scored = render(record["messages"], tokenizer, prompt=False)
        excess = len(ids) - 1 - context
        if excess > 0:
            if not _shorten_passage(ids, scored, excess, tokenizer.special):
                continue
            cut += 1
        pairs.append(shifted(torch.tensor(ids), torch.tensor(scored)))
    if not pairs:
        raise ValueError(f"none of {len(records)} chat records fits a context of {context} tokens; give more, or raise finetune.*.context")
    return Examples(pairs, cut, len(records) - len(pairs), tokenizer.eot, tokenizer.end_of_turn)


def chat_batches(examples: Examples, batch: int, seed: int) -> Batches:
    """The batch of a step: (inputs, targets), each (B, T), conversations of like length together."""
    return conversations(examples.pairs, batch, examples.eot, seed)


@torch.no_grad()
def answer_loss(model: nn.Module, examples: Examples, batch: int) -> float:
    """Nats per answer token over all of `examples`. The model's mode (train, eval) is left as found."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    ordered = sorted(examples.pairs, key=lambda pair: len(pair[0]))
    nats = 0.0
    for start in range(0, len(ordered), batch):
        inputs, targets = stacked(ordered[start : start + batch], examples.eot)
        logits = model(inputs.to(device)).float()
        nats += float(functional.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=UNSCORED, reduction="sum"))
    model.train(was_training)
    return nats / examples.answer_tokens


def _shorten_passage(ids: list[int], scored: list[bool], excess: int, special: dict[str, int]) -> bool:
    """Take `excess` tokens off the end of a leading system message, in place; false where there is none with that much to give."""
    if ids[0] != special["<|system|>"]:
        return False
    end = ids.index(special[END_OF_TURN])
    if end - 1 - excess < SHORTEST_PASSAGE:
        return False
    del ids[end - excess : end], scored[end - excess : end]
    return True
