"""How good a model is, by rulers that do not care which model: likelihood, questions, retrieval, speed, and what it writes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llm_from_scratch.evaluation.selection import ServeRule
from llm_from_scratch.section import Section


class PromotionParams(Section):
    """When a champion alias moves: the whole interval of the new version's gain has to lie above `minimum_gain`.

    A gain is told from noise on `units` at most and `minimum_units` at least, in `resamples`, with `confidence`. The metrics, all better
    when lower, are `val_bpb` (bits per byte of documents), `val_loss` (bits per byte of answers; of a reward model the loss of its pairs),
    and `gold_cost` (minus what the gold judge gives for what is written).
    """

    metric: Literal["val_bpb", "val_loss"]
    finetune_metric: Literal["val_bpb", "val_loss"]
    alignment_metric: Literal["val_bpb", "gold_cost"]
    minimum_gain: float = Field(ge=0)
    units: int = Field(ge=1)
    minimum_units: int = Field(ge=2)
    resamples: int = Field(ge=100)
    confidence: float = Field(gt=0.5, lt=1)


class MixtureParams(Section):
    """`slice_tokens` at the end of train fit the weights of an n-gram of `order` that was counted without them."""

    order: int = Field(ge=1)
    slice_tokens: int = Field(ge=1)


class EvaluateParams(Section):
    """The section `evaluate`. `questions` held-out ones are asked, each with `choices` answers to tell apart and `passages` to read."""

    seed: int = Field(ge=0)
    questions: int = Field(ge=1)
    choices: int = Field(ge=2)
    passages: int = Field(ge=1)
    answer_tokens: int = Field(ge=1)
    latency_tokens: int = Field(ge=1)
    latency_repeats: int = Field(ge=1)
    kl_tokens: int = Field(ge=1)
    heatmap_text: str = Field(min_length=1)
    mixture: MixtureParams
    serve_rule: ServeRule
    promotion: PromotionParams
