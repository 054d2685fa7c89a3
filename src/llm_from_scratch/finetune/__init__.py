"""Fine-tuning: a base model and records in, a model that answers out.

A method prepares a `Job` (what to train, on which batches, by which loss) and the one `training.loop.fit` does it. A new method is a module
with its params and such a function, a member of FinetuneParams and an entry in METHODS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from llm_from_scratch.finetune import lora, sft
from llm_from_scratch.finetune.lora import LoraFinetuneParams
from llm_from_scratch.finetune.sft import Examples, Job, SftParams
from llm_from_scratch.model.rung import Rung

FinetuneParams = Annotated[SftParams | LoraFinetuneParams, Field(discriminator="method")]

METHODS: dict[str, Callable[[Rung, Examples, Any], Job]] = {"sft": sft.job, "lora": lora.job}
