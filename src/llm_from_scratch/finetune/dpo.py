"""DPO: preferences without a reward model and without rollouts, because the policy itself can be read as one.

    loss = -log sigmoid(beta (log p(chosen) / p0(chosen) - log p(rejected) / p0(rejected)))

Rafailov et al. 2023 (arXiv:2305.18290). It starts at ln 2, where the policy p is the reference p0. IPO (Azar et al. 2023, arXiv:2310.12036)
asks for a finite margin, 1 / (2 beta), instead of one as large as can be, over the mean of an answer's tokens, as trl has it. What neither
can do is learn from answers that the model would never write: the pairs are of the start, and the policy moves away from them.

Shapes: B pairs, T tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from llm_from_scratch.finetune.pairs import Pair, PairLesson, pair_batches, stack
from llm_from_scratch.finetune.policy import Aligning, log_probs, text_loss
from llm_from_scratch.finetune.sft import Job
from llm_from_scratch.model.registry import save_model
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.training.batches import windows
from llm_from_scratch.training.loop import Batch, Batches, Loss
from llm_from_scratch.training.memory import UNSCORED

START = math.log(2)
"""The loss of a policy that is its reference."""


class DpoParams(Aligning):
    """`beta` is what a nat away from the reference costs; `variant` is which loss. The pairs are those of the bundle `guide`."""

    method: Literal["dpo"]
    variant: Literal["dpo", "ipo"]
    beta: Annotated[float, Field(gt=0)]


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Log-ratios to the reference, (B,) each, to the mean loss."""
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Log-ratios, means over tokens, (B,) each, to the mean loss."""
    return (chosen - rejected - 1 / (2 * beta)).square().mean()


def loss(params: DpoParams) -> Loss:
    """The loss of ids (B, 2, T), a target a pair, labels (B, 2, T), the reference's log-probabilities of both answers (B, 2), and text."""

    def of(model: nn.Module, batch: Batch) -> Tensor:
        ids, _, labels, reference, text, following = batch
        ratios = answer_log_probs(model, ids, labels) - reference
        if params.variant == "ipo":
            ratios = ratios / (labels != UNSCORED).sum(-1)
        found = (dpo if params.variant == "dpo" else ipo)(ratios[:, 0], ratios[:, 1], params.beta)
        return found + params.text_weight * text_loss(model(text), following) if params.text_weight else found

    return of


def answer_log_probs(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """ids and labels (B, 2, T) to the log-probability of each answer, (B, 2)."""
    found = log_probs(model(ids.flatten(0, 1)), labels.flatten(0, 1))
    return found.sum(-1).view(-1, 2)


def batches(model: Rung, pairs: Sequence[Pair], text: np.ndarray, pad: int, params: DpoParams) -> Batches:
    """The batch of a step, with what a frozen copy of `model`, as it is now, says of it; and windows of `text`."""
    reference = copy.deepcopy(model).requires_grad_(False).eval()

    def make(places: list[int]) -> Batch:
        ids, labels = stack([pairs[place] for place in places], pad)
        with torch.no_grad():
            there = answer_log_probs(reference, ids, labels)
        return ids, torch.zeros(len(ids), 1, dtype=torch.long), labels, there

    asked = pair_batches(len(pairs), params.batch, params.seed, make)
    beside = windows(text, params.text_tokens, min(params.batch, len(pairs)), params.seed)
    return lambda step: (*asked(step), *beside(step))


def job(base: Rung, lesson: PairLesson, params: DpoParams) -> Job:
    """All weights of `base`, by the pairs alone."""
    return Job(
        model=base,
        batches=batches(base, lesson.pairs, lesson.text, lesson.pad, params),
        loss=loss(params),
        kind="model",
        plain=lambda: base,
        save=lambda folder, base_at: save_model(base, folder, lesson.pad, lesson.end),
    )
