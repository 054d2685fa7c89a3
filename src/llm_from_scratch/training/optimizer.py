"""How weights move: AdamW for all of them, its moments in 32 or 8 bits, or Muon for the hidden matrices with AdamW beside; driven as one.

AdamW scales each weight's step by itself. Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) treats a matrix as a whole and
replaces its gradient by the nearest matrix with all singular values near 1, so that rare directions learn as fast as common ones.
Embeddings, the head, norms and biases are no maps between hidden spaces: AdamW moves those, without decay, at a rate of their own.

torch.optim.Muon exists, but iterates in bfloat16, which a CPU without bf16 units does some 45 times slower, and one matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from llm_from_scratch.training.plan import Plan
from llm_from_scratch.training.sharded import shared_like, whole

BETAS = (0.9, 0.99)  # a slower second moment than the usual 0.95: our batches hold few tokens, so their gradients are noisy
MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients, steep at zero: in five rounds they bring 0.01 up to about 1
ROUNDS = 5
HEADS = ("head", "lm_head", "score")
TOKENS = "token_adapter"  # what peft calls the rows of an embedding that an adapter learns


def build(model: nn.Module, plan: Plan) -> Optimizer:
    """The optimizer of `plan.optimizer` over whatever in `model` requires a gradient. Raises ValueError where that is nothing."""
    matrices, rest = split(model)
    if not matrices + rest:
        raise ValueError("no parameter of the model requires a gradient; nothing can be trained")
    slow = {"params": rest, "lr": plan.embedding_learning_rate, "weight_decay": 0.0}
    fast = {"params": matrices, "lr": plan.learning_rate, "weight_decay": plan.weight_decay}
    if plan.optimizer != "muon":
        return Optimizer(_adamw([fast, slow], plan.optimizer))
    if not matrices:
        raise ValueError(f"muon moves hidden matrices, and {type(model).__name__} has none that learn; set optimizer to adamw")
    return Optimizer([Muon(matrices, plan.learning_rate, plan.weight_decay), *_adamw([slow], "adamw")])


def split(model: nn.Module) -> tuple[list[Parameter], list[Parameter]]:
    """What learns, as (hidden matrices, all the rest). A matrix of one row or column is a vector, and no hidden matrix."""
    ends = {id(weight) for weight in _ends(model)}
    matrices: list[Parameter] = []
    rest: list[Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and min(parameter.shape) > 1 and id(parameter) not in ends
            (matrices if hidden else rest).append(parameter)
    return matrices, rest


class Optimizer:
    """Several torch optimizers as one. The rates they were made with are the full ones, and `scale` sets the share of the moment."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.rates: list[float] = [group["lr"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def scale(self, share: float) -> None:
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Every moment and momentum by "part.parameter.name". The rates are not in it: they follow from the plan and the step."""
        return {
            f"{place}.{index}.{name}": torch.as_tensor(value)
            for place, part in enumerate(self.parts)
            for index, weight in enumerate(_weights(part))
            for name, value in part.state.get(weight, {}).items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for place, part in enumerate(self.parts):
            weights = _weights(part)
            state: dict[int, dict[str, Any]] = {}
            for key, tensor in tensors.items():
                owner, index, name = key.split(".")
                if int(owner) == place:
                    weight = weights[int(index)]
                    moment = tensor.shape == weight.shape  # and not a count of steps, which bitsandbytes wants as a number
                    count = tensor.ndim == 0 and tensor.dtype == torch.int64
                    state.setdefault(int(index), {})[name] = shared_like(tensor, weight) if moment else tensor.item() if count else tensor
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal. Matrices of one shape form a group, and a step is one batched product for all of them.

    Of matrices that processes share, each gathers all and does the whole work: right, and as slow as on one process.
    """

    def __init__(self, matrices: Iterable[Parameter], lr: float, weight_decay: float) -> None:
        shapes: dict[torch.Size, list[Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": same} for same in shapes.values()], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move each matrix by lr · sqrt(max(1, rows / columns)), the factor that keeps the change of its output alike at any shape."""
        for group in self.param_groups:
            moved = [matrix for matrix in group["params"] if matrix.grad is not None]
            if not moved:
                continue
            directions = orthogonal(torch.stack([whole(self._nesterov(matrix)) for matrix in moved]))
            rows, columns = moved[0].shape
            rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
            for matrix, direction in zip(moved, directions, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(shared_like(direction, matrix), alpha=rate)

    def _nesterov(self, matrix: Parameter) -> Tensor:
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """(n, rows, columns) → the same with every singular value between about 0.7 and 1.2, by Newton–Schulz iteration.

    x ← a·x + b·(x·xᵀ)·x + c·(x·xᵀ)²·x takes odd powers of the singular values and leaves the singular vectors alone.
    """
    a, b, c = QUINTIC
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _weights(part: torch.optim.Optimizer) -> list[Parameter]:
    """What a part moves, in the order that torch numbers it."""
    return [weight for group in part.param_groups for weight in group["params"]]


def _adamw(groups: list[dict[str, Any]], kind: str) -> list[torch.optim.Optimizer]:
    """One AdamW over the groups that hold anything. The fused one takes less than half the time of the others, on CPU too."""
    filled = [group for group in groups if group["params"]]
    if not filled:
        return []
    return [torch.optim.AdamW(filled, betas=BETAS, fused=True) if kind == "adamw" else _in_8_bits(filled, kind)]


def _in_8_bits(groups: list[dict[str, Any]], kind: str) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW (Dettmers et al. 2022, arXiv:2110.02861): moments in 8 bits, but for tensors of fewer than 4,096 numbers.

    The paged one may keep them in the machine's memory while the card's is full. Raises ValueError for it on a CPU, which has nothing to
    page to, and where bitsandbytes is missing.
    """
    if kind == "paged_adamw_8bit" and not groups[0]["params"][0].is_cuda:
        raise ValueError(f"optimizer {kind} moves moments from a card's memory to the machine's, and this is a CPU; set it to adamw_8bit")
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(f"optimizer {kind} is bitsandbytes'; pip install 'llm-from-scratch[quantize]', or set it to adamw") from None
    made = bitsandbytes.optim.PagedAdamW8bit if kind == "paged_adamw_8bit" else bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = made(groups, betas=BETAS)
    return optimizer


def _ends(model: nn.Module) -> Iterable[Parameter]:
    """The weights that meet tokens rather than hidden states: embeddings, and heads, by our name and those of Hugging Face and peft."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in (*HEADS, TOKENS):
            yield from module.parameters()
