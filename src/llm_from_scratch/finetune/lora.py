"""LoRA: learn a small difference. Beside each chosen weight W runs a thin detour, and only the detour is trained.

    y = W x + (alpha / sqrt(rank)) B A x        A (rank, in) drawn at random, B (out, rank) zero, so it starts exactly as the base

Hu et al. 2021 (arXiv:2106.09685); the square root is rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), under which a larger rank needs no
new alpha. peft does it; here are its traps. The tied head stays out: merged into it, a detour would change the embedding too. What LoRA
cannot do is teach the embedding of a token that the base has never seen. An adapter is saved in peft's own format, for transformers too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from llm_from_scratch.bundle import BundleError, load_tensors, save_tensors
from llm_from_scratch.finetune.sft import Examples, Finetune, Job, chat_batches
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.section import Section
from llm_from_scratch.training.loop import next_token

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class LoraParams(Section):
    """The detour: how thin, how strong, and beside which Linear modules (by the last part of their name)."""

    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[int, Field(ge=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: Annotated[list[str], Field(min_length=1)]


class LoraFinetuneParams(Finetune):
    """Fine-tuning of an adapter; the base stays as it is."""

    method: Literal["lora"]
    lora: LoraParams


def job(model: Rung, examples: Examples, params: LoraFinetuneParams) -> Job:
    """The same loss on the same batches as `sft`, with the gradient let into the adapter only."""
    attached = attach(model, params.lora, params.seed)
    return Job(
        model=attached,
        batches=chat_batches(examples, params.batch, params.seed),
        loss=next_token,
        kind="adapter",
        plain=lambda: merge(attached),
        save=lambda folder, base: save_adapter(attached, folder, base),
    )


def attach(model: nn.Module, params: LoraParams, seed: int) -> PeftModel:
    """`model`, changed in place, with a new adapter beside every target; only the adapter is trainable.

    Raises ValueError when a target is no Linear of this model or shares its weight with another module, as a tied head does.
    """
    peft = _peft()
    _refuse_unknown(model, params.targets)
    _refuse_shared(model, params.targets)
    config = peft.LoraConfig(
        r=params.rank, lora_alpha=params.alpha, lora_dropout=params.dropout, target_modules=list(params.targets), use_rslora=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attached: PeftModel = peft.get_peft_model(model, config)
    return attached


def save_adapter(model: PeftModel, folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does, but always the same bytes for the same adapter.

    peft's own `save_pretrained` writes the targets in the order of a set, which differs from one process to the next.
    `base` names the bundle that the adapter belongs to.
    """
    state = _peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    save_tensors(folder / WEIGHTS, {name: tensor.detach().cpu() for name, tensor in state.items()})
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True, "task_type": "CAUSAL_LM"}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(base: nn.Module, folder: Path) -> PeftModel:
    """`base`, changed in place, with the adapter in `folder` attached and frozen. Raises BundleError when they do not fit."""
    peft = _peft()
    tensors = load_tensors(folder / WEIGHTS)
    config = peft.LoraConfig.from_pretrained(str(folder))
    config.task_type = None  # with one, peft expects the forward of a transformers model
    config.base_model_name_or_path = None
    _refuse_unknown(base, sorted(config.target_modules))
    model: PeftModel = peft.get_peft_model(base, config)
    wanted = {name: tensor.shape for name, tensor in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wanted != found:
        odd = sorted(wanted.items() ^ found.items())[0][0]
        raise BundleError(
            f"{folder}: the adapter does not fit this model: {odd} is {_shape(found, odd)} there and {_shape(wanted, odd)} here; "
            "load it on the base it was trained on"
        )
    peft.set_peft_model_state_dict(model, tensors)
    return model


def merge(model: PeftModel) -> Rung:
    """A plain copy of the base with the adapter added into its weights: the same outputs, and nothing beside them to compute."""
    merged: Rung = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    return merged


def _refuse_unknown(model: nn.Module, targets: Sequence[str]) -> None:
    present = sorted({name.rsplit(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    if missing := [target for target in targets if target not in present]:
        raise ValueError(
            f"lora.targets: {', '.join(missing)} matched no layer of this {type(model).__name__}; "
            f"its Linear layers are {', '.join(present) or 'none'}"
        )


def _refuse_shared(model: nn.Module, targets: Sequence[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(weight), []).append(name.removesuffix(".weight"))
    for names in owners.values():
        if len(names) > 1 and (shared := [name for name in names if name.rsplit(".")[-1] in targets]):
            other = next(name for name in names if name != shared[0])
            raise ValueError(f"lora.targets: {shared[0]} shares its weight with {other}, so merging would change both; take it out")


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "absent"


def _peft() -> Any:
    """peft, imported late: it takes seconds, and only fine-tuning needs it."""
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA needs peft, which is not installed; pip install 'llm-from-scratch[finetune]'") from None
    return peft
