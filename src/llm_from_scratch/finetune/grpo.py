"""GRPO: PPO without a critic. Several answers to one prompt are each other's expectation.

    advantage = (reward - mean of its group) / standard deviation of its group

Shao et al. 2024 (arXiv:2402.03300): every token of an answer has its advantage, and the distance to the reference is a term of the loss,
by an estimate that is never negative (Schulman 2020, "k3"). What it cannot do is say which token of an answer was the good one.

Shapes: B answers, G answers to one prompt, T places that predict.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from llm_from_scratch.finetune.policy import log_probs, mean_where, text_loss
from llm_from_scratch.finetune.rollouts import Online, OnPolicy, PromptLesson, Rollout
from llm_from_scratch.finetune.sft import Job
from llm_from_scratch.model.registry import save_model
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.training.loop import Batch
from llm_from_scratch.training.memory import UNSCORED


class GrpoParams(Online):
    """`group` answers to a prompt are compared; `beta` is what a nat away from the reference costs."""

    method: Literal["grpo"]
    group: Annotated[int, Field(ge=2)]
    beta: Annotated[float, Field(ge=0)]

    @field_validator("group")
    @classmethod
    def _whole_groups(cls, group: int, entry: ValidationInfo) -> int:
        if (rollout := entry.data.get("rollout", group)) % group:
            raise ValueError(f"a rollout of {rollout} answers is no whole number of groups of {group}; change one of them")
        return group


class Grpo(OnPolicy):
    """Batches and loss of one run."""

    plan: GrpoParams

    def __init__(self, policy: Rung, lesson: PromptLesson, params: GrpoParams) -> None:
        super().__init__(policy, policy, lesson, params)
        self.each = params.group

    def prepare(self, rollout: Rollout) -> Batch:
        """Ids, targets, log-probabilities by the writer and by the reference, advantages."""
        advantages = relative(rollout.rewards, self.plan.group)[:, None] * rollout.scored
        return rollout.ids, rollout.targets, rollout.written, rollout.reference, advantages

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The surrogate, beta times the distance, and text loss, means over tokens; once the rollout is used up, nothing."""
        ids, targets, written, reference, advantages, text, following = batch
        scored = targets != UNSCORED
        now = log_probs(model(ids), targets)
        surrogate = self.surrogate(now, written, advantages, scored)
        if surrogate is None:
            return torch.zeros(())
        loss = surrogate + self.plan.beta * mean_where(distance(now, reference), scored)
        return loss + self.plan.text_weight * text_loss(model(text), following) if self.plan.text_weight else loss


def relative(rewards: Tensor, group: int) -> Tensor:
    """Rewards (B,) of groups, one after the other, to advantages (B,); a group that is all alike has none."""
    groups = rewards.view(-1, group)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def distance(now: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy ‖ reference) at each place from the token that was drawn: never negative, and unbiased."""
    gap = reference - now
    return gap.exp() - gap - 1


def job(base: Rung, lesson: PromptLesson, params: GrpoParams) -> Job:
    """All weights of `base`."""
    run = Grpo(base, lesson, params)
    return Job(base, run.batches, run.loss, "model", lambda: base, lambda folder, base_at: save_model(base, folder, lesson.eot, lesson.end))
