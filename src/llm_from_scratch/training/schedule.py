"""The learning rate over a run: a linear warmup, a plateau, and a linear cooldown (Hägele et al. 2024, arXiv:2405.18392).

A pure function of the step. Most of what a small run learns after its first minutes, it learns in the cooldown.
"""

from __future__ import annotations

from llm_from_scratch.training.plan import Plan


def share(step: int, plan: Plan) -> float:
    """The share of the full rate at `step`, counted from 0: rising to 1, and `plan.final_share` at the very last step."""
    cooldown = round(plan.cooldown_share * plan.steps)
    left = plan.steps - 1 - step
    warm = min(1.0, (step + 1) / plan.warmup_steps) if plan.warmup_steps else 1.0
    cool = plan.final_share + (1 - plan.final_share) * min(1.0, left / cooldown) if cooldown else 1.0
    return min(warm, cool)
