"""Fine-tuning: a base model and records in, a model that answers, or answers better, out.

A method prepares a `Job` (what to train, on which batches, by which loss) and the one `training.loop.fit` does it. A new method is a module
with its params and such a function, a member of FinetuneParams and an entry in METHODS. `sft`, `lora` and `qlora` learn answers that people
wrote; `reward` learns which of two is better, and `dpo`, `ppo` and `grpo` learn to write what is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from llm_from_scratch.finetune import dpo, grpo, lora, ppo, qlora, reward, sft
from llm_from_scratch.finetune.dpo import DpoParams
from llm_from_scratch.finetune.grpo import GrpoParams
from llm_from_scratch.finetune.lora import LoraFinetuneParams
from llm_from_scratch.finetune.ppo import PpoParams
from llm_from_scratch.finetune.qlora import QloraFinetuneParams
from llm_from_scratch.finetune.reward import RewardParams
from llm_from_scratch.finetune.sft import Job, SftParams
from llm_from_scratch.model.rung import Rung

FinetuneParams = Annotated[
    SftParams | LoraFinetuneParams | QloraFinetuneParams | RewardParams | DpoParams | PpoParams | GrpoParams, Field(discriminator="method")
]

METHODS: dict[str, Callable[[Rung, Any, Any], Job]] = {
    "sft": sft.job,
    "lora": lora.job,
    "qlora": qlora.job,
    "reward": reward.job,
    "dpo": dpo.job,
    "ppo": ppo.job,
    "grpo": grpo.job,
}
"""Each takes the model to start from, what there is to learn (`Examples`, `PairLesson` or `PromptLesson`), and its params."""
