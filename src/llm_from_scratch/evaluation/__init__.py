"""How good a model is, by rulers that do not care which model: likelihood, questions, retrieval, speed, and what it writes."""

from __future__ import annotations

from pydantic import Field

from llm_from_scratch.evaluation.selection import ServeRule
from llm_from_scratch.section import Section


class PromotionParams(Section):
    """When a champion alias moves: the new version has to beat the champion's metric (lower is better) by `minimum_gain`."""

    metric: str
    finetune_metric: str
    alignment_metric: str
    minimum_gain: float = Field(ge=0)


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
