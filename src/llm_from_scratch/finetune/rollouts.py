"""Rollouts: what the policy itself answers, scored by a reward model, and learned from for a few updates before it is thrown away.

It is judged for what it does and not for what others did. What it cannot do is save a sample for later: once the policy has moved, the
answers are no longer its own, and the ratio to the policy that wrote them is clipped (Schulman et al. 2017, arXiv:1707.06347).

Shapes: B answers, P prompt tokens, N answer tokens, T = P + N - 1 places that predict.
"""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from llm_from_scratch.finetune.policy import Aligning, log_probs, mean_where
from llm_from_scratch.finetune.reward import RewardModel
from llm_from_scratch.inference.batched import by_length, draw
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.training.batches import windows
from llm_from_scratch.training.loop import Batch
from llm_from_scratch.training.memory import UNSCORED


@dataclass(frozen=True)
class PromptLesson:
    """What an online method learns from: prompts, text as ids, a frozen reward model, and the tokens that end an answer.

    `eot` ends a document and `end` a message; both are among them.
    """

    prompts: list[list[int]]
    text: np.ndarray
    reward: RewardModel
    ends: frozenset[int]
    eot: int
    end: int


class Online(Aligning):
    """Methods that write for themselves: `rollout` answers at a time, gone over `epochs` times in batches of `batch`.

    A save in the middle of a rollout could not be gone on from, as the policy that wrote it is gone: `checkpoint_every` is a multiple of
    the updates that a rollout is good for.
    """

    rollout: Annotated[int, Field(ge=2)]
    epochs: Annotated[int, Field(ge=1)]
    clip_range: Annotated[float, Field(gt=0, lt=1)]
    stop_kl: Annotated[float, Field(gt=0)]

    @property
    def updates(self) -> int:
        """Steps that a rollout is good for."""
        return self.epochs * self.rollout // self.batch

    @field_validator("rollout")
    @classmethod
    def _whole_batches(cls, rollout: int, entry: ValidationInfo) -> int:
        if rollout % (batch := entry.data.get("batch", 1)):
            raise ValueError(f"{rollout} answers are no whole number of batches of {batch}; set it to a multiple of {batch}")
        return rollout

    @field_validator("epochs")
    @classmethod
    def _saves_between_rollouts(cls, epochs: int, entry: ValidationInfo) -> int:
        if not {"rollout", "batch", "checkpoint_every"} <= entry.data.keys():
            return epochs
        updates = epochs * entry.data["rollout"] // entry.data["batch"]
        if (every := entry.data["checkpoint_every"]) % updates:
            raise ValueError(f"a rollout is good for {updates} steps, and checkpoint_every is {every}; set that to a multiple of {updates}")
        return epochs


@dataclass(frozen=True)
class Rollout:
    """Rows of one length: ids and targets (B, T), log-probabilities by the policy that wrote and by the reference (B, T), rewards (B,).

    Targets are those of the answer, unscored elsewhere; log-probabilities are 0 there.
    """

    ids: Tensor
    targets: Tensor
    written: Tensor
    reference: Tensor
    rewards: Tensor

    @property
    def scored(self) -> Tensor:
        """(B, T), where an answer was drawn."""
        return self.targets != UNSCORED

    @property
    def kl(self) -> float:
        """From the policy to the reference, nats an answer: the mean over what the policy wrote."""
        return float((self.written - self.reference).sum(1).mean())


class OnPolicy(ABC):
    """Batches of a run that writes for itself: the first step that a rollout is for writes it with the policy as it then is.

    `model` is what `fit` trains and `policy` the part of it that answers, `each` times to a prompt. What stands here is of one rollout
    and forgotten with it, so it need not be journalled.
    """

    each = 1

    def __init__(self, model: nn.Module, policy: Rung, lesson: PromptLesson, params: Online) -> None:
        self.model, self.policy, self.lesson, self.plan = model, policy, lesson, params
        self.text = windows(lesson.text, params.text_tokens, params.batch, params.seed)
        self.reference = copy.deepcopy(policy).requires_grad_(False).eval()
        self.stopped = False
        self.kept: Batch = ()
        self.order: list[list[int]] = []

    @abstractmethod
    def prepare(self, rollout: Rollout) -> Batch:
        """All that the updates on a rollout read, ids and targets first."""

    def batches(self, step: int) -> Batch:
        """Rows of the rollout that the step belongs to, and beside them as many windows of text and their next tokens."""
        phase, place = divmod(step, self.plan.updates)
        if not self.kept or place == 0:
            self.write(phase)
        return (*(tensor[self.order[place]].cpu() for tensor in self.kept), *self.text(step))

    @torch.no_grad()
    def write(self, phase: int) -> None:
        """A new rollout in place of the last."""
        device = next(self.policy.parameters()).device
        for frozen in (self.reference, self.lesson.reward):
            frozen.to(device)
        prompts = prompts_of(self.lesson.prompts, self.plan.rollout // self.each, self.plan.seed, phase).repeat_interleave(self.each, 0)
        seed = self.plan.seed * 1_000_003 + phase
        self.model.eval()
        rollout = roll_out(self.policy, self.reference, self.lesson, prompts, self.plan.answer_tokens, seed)
        self.kept = self.prepare(rollout)
        self.model.train()
        self.order = shuffled(self.plan.rollout, self.plan.batch, self.plan.epochs, seed)
        self.stopped = False

    def surrogate(self, now: Tensor, written: Tensor, advantages: Tensor, scored: Tensor) -> Tensor | None:
        """PPO's clipped loss, a mean over the tokens of answers; None once the policy is `stop_kl` nats a token from the one that wrote."""
        moved = float(mean_where(written - now.detach(), scored))
        self.stopped = self.stopped or moved > self.plan.stop_kl
        return None if self.stopped else mean_where(clipped((now - written).exp(), advantages, self.plan.clip_range), scored)


@torch.no_grad()
def roll_out(policy: nn.Module, reference: nn.Module, lesson: PromptLesson, prompts: Tensor, new: int, seed: int) -> Rollout:
    """The policy's own answers to prompts (B, P), drawn at temperature 1 behind a cache."""
    device = next(policy.parameters()).device
    answers, drawn = draw(policy, prompts, new, lesson.ends, torch.Generator().manual_seed(seed))
    whole = torch.cat((prompts, answers), 1)
    ids, targets = whole[:, :-1].to(device), whole[:, 1:].clone()
    targets[:, : prompts.size(1) - 1] = UNSCORED
    targets[:, prompts.size(1) - 1 :][~drawn] = UNSCORED
    targets = targets.to(device)
    written, there = (log_probs(model(ids), targets) for model in (policy, reference))
    rewards = lesson.reward(whole.to(device), _last(answers, drawn, lesson.ends) + prompts.size(1))
    return Rollout(ids, targets, written, there, rewards)


def prompts_of(prompts: Sequence[list[int]], rows: int, seed: int, phase: int) -> Tensor:
    """(rows, P) prompts of one length for rollout number `phase`, drawn from all of a length that has enough of them."""
    rng = random.Random(f"{seed}:{phase}")
    groups = by_length(prompts, len(prompts))
    group = rng.choices(groups, [len(group) for group in groups])[0]
    places = rng.sample(group, rows) if len(group) >= rows else rng.choices(group, k=rows)
    return torch.tensor([prompts[place] for place in places])


def shuffled(count: int, batch: int, epochs: int, seed: int) -> list[list[int]]:
    """The rows of each update on one rollout: every epoch goes over all of them in another order."""
    rng = random.Random(seed)
    orders = [rng.sample(range(count), count) for _ in range(epochs)]
    return [order[start : start + batch] for order in orders for start in range(0, count, batch)]


def clipped(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's surrogate to be made small, at each place (B, T): the worse of the plain and the clipped (Schulman et al. 2017, equation 7)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def _last(answers: Tensor, drawn: Tensor, ends: frozenset[int]) -> Tensor:
    """Places in the answers (B, N) of the last token of the text, -1 where there is none: a token that ends an answer is no part of it."""
    text = drawn & ~torch.isin(answers, torch.tensor(sorted(ends)))
    return text.sum(1) - 1
