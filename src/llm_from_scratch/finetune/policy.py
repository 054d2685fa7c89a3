"""What the preference methods share: their params, the probability of an answer, and means over what was answered.

Shapes: B answers, T places that predict, V vocabulary.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from llm_from_scratch.finetune.sft import Finetune
from llm_from_scratch.training.memory import UNSCORED


class Aligning(Finetune):
    """`guide` is the reward bundle: its model scores rollouts, its pairs are learned from. Answers have up to `answer_tokens` tokens.

    Beside each row goes a window of `text_tokens` of the corpus, whose next-token loss counts `text_weight` times, so that language is
    not lost on the way (Ouyang et al. 2022 call it PPO-ptx).
    """

    prompt_tokens: Annotated[int, Field(ge=1)]
    answer_tokens: Annotated[int, Field(ge=1)]
    text_weight: Annotated[float, Field(ge=0)]
    text_tokens: Annotated[int, Field(ge=1)]


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (B, T, V) and targets (B, T) to the log-probability of each target, (B, T); 0 where it is unscored."""
    return -F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction="none").view_as(targets)


def text_loss(logits: Tensor, following: Tensor) -> Tensor:
    """Logits (B, S, V) of windows of text and their next tokens (B, S) to the mean nats a token."""
    return F.cross_entropy(logits.float().flatten(0, 1), following.flatten())


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values (B, T) where `mask` is true."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whitened(values: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    """Values (B, T) scaled to a variance of 1 where `mask` is true, and, unless `shift` is false, to a mean of 0; 0 elsewhere."""
    mean = mean_where(values, mask)
    scaled = (values - mean) * torch.rsqrt(mean_where((values - mean).square(), mask) + 1e-8)
    return (scaled if shift else scaled + mean) * mask
