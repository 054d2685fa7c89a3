"""Our best small rung on tinyshakespeare, as a value: what nanogpt.py runs against nanoGPT and ablation.py takes apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_from_scratch.model import registry
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.model.registry import ModelParams
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.training.batches import windows
from llm_from_scratch.training.loop import Log, fit, next_token, quiet
from llm_from_scratch.training.plan import Plan

MODEL = LlamaParams(
    architecture="llama", context=64, width=128, layers=4, heads=4, kv_heads=1, hidden=344, rope_theta=10000.0, qk_norm=False, copying=0.0
)
PLAN = Plan(
    seed=1,
    context=64,
    batch=12,
    micro_batch=0,
    steps=1000,
    optimizer="muon",
    learning_rate=0.005,
    embedding_learning_rate=0.012,
    weight_decay=0.01,
    warmup_steps=30,
    cooldown_share=0.6,
    final_share=0.0,
    clip=1.0,
    precision="fp32",
    checkpointing=False,
    compile=False,
    parallel="none",
    evaluate_every=1_000_000,
    checkpoint_every=1_000_000,
)
CALIBRATION = 40  # steps timed to tell how many fit into a budget


@dataclass(frozen=True)
class Trained:
    """A trained rung, and what it took."""

    model: nn.Module
    seconds: float
    tok_per_s: float


@dataclass(frozen=True)
class Recipe:
    """A model and a plan. `alter` changes the built model in place, for what no param says."""

    model: ModelParams = MODEL
    plan: Plan = PLAN
    alter: Any = None

    def with_plan(self, **changes: Any) -> Recipe:
        """The same with other numbers in its plan; a batch of a longer context goes with it."""
        return replace(self, plan=self.plan.model_copy(update=changes))

    def build(self, vocab_size: int, seed: int) -> Rung:
        torch.manual_seed(seed)
        made = registry.build(self.model, vocab_size)
        if self.alter is not None:
            self.alter(made)
        return made

    def train(self, ids: np.ndarray, vocab_size: int, seed: int, steps: int, log: Log = quiet) -> Trained:
        """A rung trained for `steps`; the time is that of the whole of `fit`, loading and logging in it (nothing is evaluated)."""
        warmup = min(self.plan.warmup_steps, steps // 4)
        plan = self.plan.model_copy(update={"seed": seed, "steps": steps, "warmup_steps": warmup})
        model = self.build(vocab_size, seed)
        started = perf_counter()
        fit(model, windows(ids, plan.context, plan.batch, seed), next_token, plan, log)
        seconds = perf_counter() - started
        return Trained(model, seconds, steps * plan.batch * plan.context / seconds)

    def steps_in(self, seconds: float, ids: np.ndarray, vocab_size: int) -> int:
        """How many steps fit into `seconds`, from the median of some that are timed now."""
        model = self.build(vocab_size, seed=0)
        ends: list[float] = []
        batches = windows(ids, self.plan.context, self.plan.batch, 0)
        fit(
            model,
            lambda step: (ends.append(perf_counter()), batches(step))[1],
            next_token,
            self.plan.model_copy(update={"steps": CALIBRATION}),
        )
        return max(4, int(seconds / median(np.diff(ends))))
