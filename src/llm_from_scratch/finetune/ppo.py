"""PPO: the policy answers, the reward model scores, and what did better than expected becomes more likely, in small safe steps.

Each token pays beta · (log p - log p0) for leaving the reference, and the last one earns the reward. A value head learns to expect what
will be earned from each place on, generalized advantage estimation says how much better it went, and the ratio to the policy that wrote
is clipped (Schulman et al. 2016, arXiv:1506.02438, and 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593, for the penalty
and for how beta adapts). What it cannot do is tell a better answer from one that the reward model likes by mistake.

Shapes: B answers, T places that predict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llm_from_scratch.bundle import save_tensors
from llm_from_scratch.finetune.policy import log_probs, mean_where, text_loss, whitened
from llm_from_scratch.finetune.rollouts import Online, OnPolicy, PromptLesson, Rollout
from llm_from_scratch.finetune.sft import Job
from llm_from_scratch.model.gpt import Gpt
from llm_from_scratch.model.llama import Llama
from llm_from_scratch.model.registry import save_model
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.training.loop import Batch
from llm_from_scratch.training.memory import UNSCORED

VALUE_HEAD = "value_head.safetensors"
MOST = 0.2  # by how much of itself beta moves at most, for one rollout


class PpoParams(Online):
    """`beta` is what a nat away from the reference costs at first; it adapts so that an answer is about `target_kl` nats away.

    `horizon` is how many answers it takes beta to adapt; `discount` and `trace` are the gamma and lambda of the advantages.
    """

    method: Literal["ppo"]
    beta: Annotated[float, Field(ge=0)]
    target_kl: Annotated[float, Field(gt=0)]
    horizon: Annotated[int, Field(ge=1)]
    discount: Annotated[float, Field(gt=0, le=1)]
    trace: Annotated[float, Field(ge=0, le=1)]
    value_weight: Annotated[float, Field(ge=0)]
    whiten_rewards: bool


class ActorCritic(nn.Module):
    """A policy, a value head on what its head reads, and beta: all that a run of PPO changes, so all that its journal keeps."""

    beta: Tensor

    def __init__(self, policy: Gpt | Llama, beta: float) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = nn.Linear(policy.shape.width, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.register_buffer("beta", torch.tensor(beta))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T) to logits (B, T, V) and values (B, T)."""
        x = self.policy.mix(self.policy.embed(ids, 0), None)
        return self.policy.unembed(x), self.value_head(self.policy.normed(x))[..., 0]


class Ppo(OnPolicy):
    """Batches and loss of one run."""

    model: ActorCritic
    plan: PpoParams

    def __init__(self, policy: Rung, lesson: PromptLesson, params: PpoParams) -> None:
        if not isinstance(policy, Gpt | Llama):
            raise ValueError(f"PPO needs a gpt or a llama, and this is a {type(policy).__name__}; name another model")
        super().__init__(ActorCritic(policy, params.beta), policy, lesson, params)

    def prepare(self, rollout: Rollout) -> Batch:
        """Ids, targets, log-probabilities by the writer, values, advantages, returns; and beta moves by how far away the rollout was."""
        values = self.model(rollout.ids)[1] * rollout.scored
        rewards = token_rewards(rollout, float(self.model.beta), self.plan.whiten_rewards)
        advantages = gae(rewards, values, rollout.scored, self.plan.discount, self.plan.trace)
        self.model.beta.mul_(adapted(rollout.kl, self.plan.target_kl, self.plan.rollout / self.plan.horizon))
        return rollout.ids, rollout.targets, rollout.written, values, whitened(advantages, rollout.scored), advantages + values

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Policy, value and text loss, means over tokens; once the rollout is used up, nothing."""
        ids, targets, written, old_values, advantages, returns, text, following = batch
        logits, values = model(ids)
        scored = targets != UNSCORED
        surrogate = self.surrogate(log_probs(logits, targets), written, advantages, scored)
        if surrogate is None:
            return torch.zeros(())
        loss = surrogate + self.plan.value_weight * mean_where(value_errors(values, old_values, returns, self.plan.clip_range), scored)
        return loss + self.plan.text_weight * text_loss(model(text)[0], following) if self.plan.text_weight else loss


def token_rewards(rollout: Rollout, beta: float, whiten: bool) -> Tensor:
    """(B, T): what each token pays for leaving the reference, and at the last one of an answer its reward."""
    scored = rollout.scored
    rewards = -beta * (rollout.written - rollout.reference)
    places = torch.arange(scored.size(1), device=scored.device)
    last = (scored * (places + 1)).amax(1) - 1
    rewards[torch.arange(len(rewards), device=scored.device), last] += rollout.rewards
    return whitened(rewards, scored, shift=False) if whiten else rewards * scored


def gae(rewards: Tensor, values: Tensor, scored: Tensor, discount: float, trace: float) -> Tensor:
    """Advantages (B, T), 0 where nothing is scored: the sum of the errors of one-step expectations ahead, each further one counting
    `discount` · `trace` times as much. After an answer's last token nothing is expected.
    """
    advantages = torch.zeros_like(rewards)
    ahead = torch.zeros_like(rewards[:, 0])
    expected = torch.zeros_like(ahead)
    for place in range(rewards.size(1) - 1, -1, -1):
        inside = scored[:, place]
        error = rewards[:, place] + discount * expected - values[:, place]
        ahead = torch.where(inside, error + discount * trace * ahead, 0.0)
        expected = torch.where(inside, values[:, place], 0.0)
        advantages[:, place] = ahead
    return advantages


def value_errors(values: Tensor, old: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Half the squared error at each place, the worse of that of the value and of one at most `clip_range` from the `old` one."""
    near = old + (values - old).clamp(-clip_range, clip_range)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def adapted(kl: float, target: float, share: float) -> float:
    """By what beta is multiplied after a rollout that was `kl` nats away; `share` of the horizon has passed with it."""
    return 1 + max(-MOST, min(MOST, kl / target - 1)) * share


def job(base: Rung, lesson: PromptLesson, params: PpoParams) -> Job:
    """The policy and its value head, which is saved apart, so that the bundle is a model like any other."""
    run = Ppo(base, lesson, params)

    def save(folder: Path, base_at: str) -> None:
        save_model(run.policy, folder, lesson.eot, lesson.end)
        save_tensors(folder / VALUE_HEAD, {name: weight.detach() for name, weight in run.model.value_head.state_dict().items()})

    return Job(run.model, run.batches, run.loss, "model", lambda: run.policy, save)
