"""What a training run is told: the `train` section of params.yaml, one entry a rung.

A neural rung has a plan, the numbers that `fit` reads; fine-tuning shares them. The n-gram counts and needs none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from llm_from_scratch.model.ngram import NgramParams
from llm_from_scratch.model.registry import ModelParams
from llm_from_scratch.section import Section

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, lt=10)]
Share = Annotated[float, Field(ge=0, le=1)]
Parallelism = Literal["none", "ddp", "fsdp"]


class Plan(Section):
    """How to train, whatever the model and the loss. Steps count optimizer steps, shares are of all steps or of the rate.

    `micro_batch` rows go through the model at once, 0 for the whole batch; what is learned is the same.
    `parallel` says how processes that torchrun started share the work; the batch is that of all of them together.
    """

    seed: Annotated[int, Field(ge=0)]
    context: Positive
    batch: Positive
    micro_batch: Annotated[int, Field(ge=0)]
    steps: Positive
    optimizer: Literal["adamw", "muon", "adamw_8bit", "paged_adamw_8bit"]
    learning_rate: Rate
    embedding_learning_rate: Rate
    weight_decay: Share
    warmup_steps: Annotated[int, Field(ge=0)]
    cooldown_share: Share
    final_share: Share
    clip: Annotated[float, Field(gt=0)]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    checkpointing: bool
    compile: bool
    parallel: Parallelism
    evaluate_every: Positive
    checkpoint_every: Positive

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup: int, entry: ValidationInfo) -> int:
        if warmup > (steps := entry.data.get("steps", warmup)):
            raise ValueError(f"{warmup} is more than the {steps} steps there are; lower it or train longer")
        return warmup


class LessonParams(Section):
    """Lessons in reading: all of the `first` steps, and of the others evenly spread a `share`, each on `batch` conversations."""

    first: Annotated[int, Field(ge=0)]
    share: Share
    batch: Positive

    @property
    def some(self) -> bool:
        """Whether there is any at all: an overlay can only turn numbers."""
        return self.first > 0 or self.share > 0


class TrainParams(Plan):
    """One neural rung: its tokens, its model, its plan, and, where the tokens have some, its lessons in reading."""

    tokens: str
    evaluate_tokens: Annotated[int, Field(ge=0)]
    model: ModelParams
    lessons: LessonParams | None

    @field_validator("model")
    @classmethod
    def _batches_fit_the_model(cls, model: ModelParams, entry: ValidationInfo) -> ModelParams:
        longest, context = getattr(model, "context", None), entry.data.get("context", 0)
        if longest is not None and context > longest:
            raise ValueError(f"it sees {longest} tokens, and context puts {context} into a batch; lower context or raise model.context")
        return model


class NgramTrainParams(Section):
    """The rung that counts: no steps and no rate, only its tokens and its order."""

    tokens: str
    seed: Annotated[int, Field(ge=0)]
    evaluate_tokens: Annotated[int, Field(ge=0)]
    model: NgramParams


def _kind(entry: Any) -> str | None:
    """Which of the two an entry is, None where it is neither; one of no known architecture is taken for neural, whose model names it."""
    if not isinstance(entry, dict | Section):
        return None
    model = entry.get("model") if isinstance(entry, dict) else getattr(entry, "model", None)
    architecture = model.get("architecture") if isinstance(model, dict) else getattr(model, "architecture", None)
    return "ngram" if architecture == "ngram" else "neural"


RungParams = Annotated[
    Annotated[TrainParams, Tag("neural")] | Annotated[NgramTrainParams, Tag("ngram")],
    Discriminator(_kind, custom_error_type="dict_type"),
]
