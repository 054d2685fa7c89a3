"""What the loss calls: the model itself, or another view of the same weights that does the same in less memory or less time.

What is saved, evaluated and handed back is always the model.
"""

from __future__ import annotations

import shutil
from typing import cast

import torch
from torch import nn

from llm_from_scratch.model.gpt import Gpt
from llm_from_scratch.model.llama import Llama
from llm_from_scratch.training.plan import Plan

COMPILERS = ("c++", "g++", "clang++", "cl")


def learner(model: nn.Module, plan: Plan) -> nn.Module:
    """`model`, checkpointing its layers and compiled as the plan says. Raises ValueError where one of them is not to be had."""
    checkpoint_layers(model, plan.checkpointing)
    if not plan.compile:
        return model
    if not any(map(shutil.which, COMPILERS)):
        raise ValueError(f"torch.compile needs a C++ compiler, found none of {', '.join(COMPILERS)}; install one, or set compile to false")
    return cast(nn.Module, torch.compile(model))


def checkpoint_layers(model: nn.Module, on: bool) -> None:
    """Whether the backward pass computes each layer's inside again instead of keeping it. Raises ValueError where there are no layers."""
    layered = [part for part in model.modules() if isinstance(part, Gpt | Llama)]
    if on and not layered:
        raise ValueError(f"checkpointing computes the layers of a gpt or llama again, and {type(model).__name__} is none; set it to false")
    for part in layered:
        part.checkpointing = on
