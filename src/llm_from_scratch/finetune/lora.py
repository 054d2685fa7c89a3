"""LoRA: learn a small difference. Beside each chosen weight W runs a thin detour, and only the detour is trained.

    y = W x + (alpha / sqrt(rank)) B A x        A (rank, in) drawn at random, B (out, rank) zero, so it starts exactly as the base

Hu et al. 2021 (arXiv:2106.09685); the square root is rsLoRA (Kalajdzievski 2023, arXiv:2312.03732), under which a larger rank needs no
new alpha. peft does it; here are its traps. The tied head stays out: merged into it, a detour would change the embedding too.

Detours cannot teach the embedding of a token that the base has never seen, and no text holds the tokens of a chat. Their few rows may be
trained beside the detours (`chat_tokens`), in the embedding and the head alike. An adapter is saved in peft's own format, for
transformers too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llm_from_scratch.bundle import BundleError, load_tensors, save_tensors
from llm_from_scratch.finetune.sft import Examples, Finetune, Job, chat_batches
from llm_from_scratch.inference.packed import MARKS
from llm_from_scratch.model.gpt import Gpt
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.section import Section
from llm_from_scratch.training.loop import next_token

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class LoraParams(Section):
    """The detour: how thin, how strong, and beside which Linear modules (by the last part of their name).

    `chat_tokens`: whether the embeddings of the tokens that only a chat has learn too, at `embedding_learning_rate`. At a rank of 1 the
    two matrices are vectors, which every optimizer here moves at that rate too.
    """

    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[int, Field(ge=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: Annotated[list[str], Field(min_length=1)]
    chat_tokens: bool


class LoraFinetuneParams(Finetune):
    """Fine-tuning of an adapter; the base stays as it is."""

    method: Literal["lora"]
    lora: LoraParams


def job(model: Rung, examples: Examples, params: LoraFinetuneParams) -> Job:
    """The same loss on the same batches as `sft`, with the gradient let into the adapter only. Raises ValueError for a packed base."""
    if any(getattr(model, mark, False) for mark in MARKS.values()):
        raise ValueError("finetune: method lora wants a base of plain weights, and this one's are packed in few bits; use method qlora")
    return adapter_job(model, examples, params, params.lora, merge)


def adapter_job(model: Rung, examples: Examples, params: Finetune, detour: LoraParams, plain: Callable[[PeftModel], Rung]) -> Job:
    """The job of training a new adapter on `model`, which is changed in place; `plain` merges the trained one."""
    attached = attach(model, detour, params.seed, chat_tokens(model, examples) if detour.chat_tokens else ())
    return Job(
        model=attached,
        batches=chat_batches(examples, params.batch, params.seed),
        loss=next_token,
        kind="adapter",
        plain=lambda: plain(attached),
        save=lambda folder, base: save_adapter(attached, folder, base),
    )


def chat_tokens(model: Rung, examples: Examples) -> range:
    """The tokens that open and end messages: in every vocabulary of ours the last ones, after the one that ends a document."""
    return range(examples.eot + 1, model.vocab_size)


def attach(model: nn.Module, params: LoraParams, seed: int, tokens: Sequence[int] = ()) -> PeftModel:
    """`model`, changed in place, with a new adapter beside every target; only it is trainable, and the embeddings of `tokens`.

    Raises ValueError when a target is no Linear of this model or shares its weight with another module, as a tied head does.
    """
    _refuse_unknown(model, params.targets)
    _refuse_shared(model, params.targets)
    config = _peft().LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=list(params.targets),
        use_rslora=True,
        trainable_token_indices={table: list(tokens) for table in _tables(model) if table not in params.targets} if tokens else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attached: PeftModel = _peft().get_peft_model(model, config)
    return attached


def save_adapter(model: PeftModel, folder: Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft does, but always the same bytes for the same adapter.

    peft's own `save_pretrained` writes the targets in the order of a set, which differs from one process to the next.
    `base` names the bundle that the adapter belongs to.
    """
    save_tensors(folder / WEIGHTS, {name: tensor.detach().cpu() for name, tensor in _tensors(model).items()})
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True, "task_type": "CAUSAL_LM"}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(base: nn.Module, folder: Path) -> PeftModel:
    """`base`, changed in place, with the adapter in `folder` attached and frozen: one of ours, or LoRA that peft saved anywhere.

    Raises BundleError when they do not fit, and ValueError for an adapter that is no LoRA.
    """
    tensors = load_tensors(folder / WEIGHTS)
    config = _peft().PeftConfig.from_pretrained(str(folder))
    if (found := str(getattr(config.peft_type, "value", config.peft_type))) != "LORA":
        raise ValueError(f"{folder / CONFIG}: the adapter is of type {found}, and only LORA is read; train one with method lora or qlora")
    if not isinstance(config.target_modules, str):  # a regular expression is for peft to match
        _refuse_unknown(base, sorted(config.target_modules))
    try:
        return reattach(base, config, tensors)
    except BundleError as error:
        raise BundleError(f"{folder}: {error}") from None


def reattach(base: nn.Module, config: Any, tensors: dict[str, Tensor]) -> PeftModel:
    """`base`, changed in place, with the adapter that a peft config and its tensors describe. Raises BundleError when they do not fit."""
    config = copy.deepcopy(config)
    config.task_type = None  # with one, peft expects the forward of a transformers model
    config.base_model_name_or_path = None
    if isinstance(config.trainable_token_indices, list):  # without a name, peft asks transformers which module the embedding is
        config.trainable_token_indices = {_tables(base)[0]: config.trainable_token_indices}
    model: PeftModel = _peft().get_peft_model(base, config)
    wanted = {name: tensor.shape for name, tensor in _tensors(model).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wanted != found:
        odd = sorted(wanted.items() ^ found.items())[0][0]
        raise BundleError(
            f"the adapter does not fit this model: {odd} is {_shape(found, odd)} there and {_shape(wanted, odd)} here; "
            "load it on the base it was trained on"
        )
    _peft().set_peft_model_state_dict(model, tensors)
    return model


def merge(model: PeftModel) -> Rung:
    """A plain copy of the base with the adapter added into its weights: the same outputs, and nothing beside them to compute."""
    merged: Rung = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    return merged


def detached(model: PeftModel) -> tuple[Rung, Any, dict[str, Tensor]]:
    """(a copy of the base as it was, the adapter's config, its tensors): what `reattach` puts together."""
    base: Rung = copy.deepcopy(model).unload()
    return base, model.peft_config["default"], _tensors(model)


def _tensors(model: PeftModel) -> dict[str, Tensor]:
    """What of the model is the adapter, named as in its file."""
    tensors: dict[str, Tensor] = _peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def _tables(model: nn.Module) -> list[str]:
    """The modules that hold a row for each token: the embedding, and a head of its own."""
    if isinstance(model, Gpt):
        return ["wte"]
    return ["embed_tokens", "lm_head"] if getattr(model, "lm_head", None) is not None else ["embed_tokens"]


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
