"""What torchrun starts in test_training_distributed.py: some runs of `fit`, one after the other, in one group of processes.

`python tests/distributed_child.py FOLDER` does the cases in FOLDER/cases.json; the first process writes FOLDER/<case>.json and
.safetensors. The task is the same as one process has it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.bundle import save_tensors
from llm_from_scratch.model import registry
from llm_from_scratch.model.gpt import GptParams
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.training.distributed import Parallel, Place, Replicated, Sharded, together
from llm_from_scratch.training.loop import Batch, Fitted, fit, next_token
from llm_from_scratch.training.plan import Plan
from llm_from_scratch.training.resume import Journal

STEPS = 12
PLAN: dict[str, Any] = {
    "seed": 1,
    "context": 16,
    "batch": 4,
    "micro_batch": 0,
    "steps": STEPS,
    "optimizer": "muon",
    "learning_rate": 0.01,
    "embedding_learning_rate": 0.01,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "cooldown_share": 0.5,
    "final_share": 0.1,
    "clip": 1.0,
    "precision": "fp32",
    "checkpointing": False,
    "compile": False,
    "parallel": "none",
    "evaluate_every": 1,
    "checkpoint_every": 3,
}
LLAMA = LlamaParams(
    architecture="llama", context=16, width=16, layers=2, heads=4, kv_heads=2, hidden=40, rope_theta=10000.0, qk_norm=False, copying=0.0
)
GPT = GptParams(architecture="gpt", context=16, width=16, layers=2, heads=2, dropout=0.0)
VOCABULARY = 51  # odd, so that no two processes hold equally many rows of the embedding


class Killed(Exception):
    """What stands for a kill where all processes are to stop at the same step."""


def model(architecture: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    made = registry.build(LLAMA if architecture == "llama" else GPT, VOCABULARY)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.2)  # as built, blocks add nothing, and gradients of nothing are all rounding
    return made


def batch(step: int) -> Batch:
    """Rows of which unequal parts are scored, and in every third step one not at all."""
    random = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (4, 17), generator=random)
    targets = ids[:, 1:].clone()
    for row in range(4):
        targets[row, : (5 * row + step) % 16] = -100
    if step % 3 == 0:
        targets[step % 4] = -100
    return ids[:, :-1], targets


def run(
    trained: nn.Module,
    parallel: Parallel,
    journal: Journal | None = None,
    dies_at: int = -1,
    fails_on: int = -1,
    poisons: int = -1,
    **changes: Any,
) -> Fitted:
    """`dies_at` is a step; in step 5 the process `fails_on` raises, and the loss of the process `poisons` is no number."""
    now = 0

    def at(step: int) -> Batch:
        nonlocal now
        now = step
        if step == dies_at:
            raise Killed
        if step == 5 and parallel.rank == fails_on:
            raise OSError("the disk of this process is gone")
        return batch(step)

    def loss(taught: nn.Module, rows: Batch) -> Tensor:
        value = next_token(taught, rows)
        return value * float("nan") if now == 5 and parallel.rank == poisons else value

    def evaluate(seen: nn.Module) -> dict[str, float]:
        return {"val_loss": next_token(seen, batch(1000)).item()}

    return fit(trained, at, loss, Plan.model_validate(PLAN | changes), journal=journal, evaluate=evaluate, parallel=parallel)


def case(folder: Path, name: str, parallel: Parallel, architecture: str = "llama", journal: str = "", **changes: Any) -> None:
    trained = model(architecture)
    try:
        done = run(trained, parallel, Journal(folder / journal) if journal else None, **changes)
    except Killed:
        return
    except ValueError as error:
        (folder / f"{name}_{parallel.rank}.txt").write_text(str(error))
        return
    tensors: dict[str, Tensor] = {key: tensor.detach() for key, tensor in trained.named_parameters()}
    if parallel.first:
        (folder / f"{name}.json").write_text(json.dumps({"curve": done.curve, "resumed_at": done.resumed_at, "tokens": done.tokens}))
        save_tensors(folder / f"{name}.safetensors", tensors)


def main(folder: Path) -> None:
    place = Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    kinds: dict[str, type[Replicated]] = {"ddp": Replicated, "fsdp": Sharded}
    with together("ddp", place):
        for told in json.loads((folder / "cases.json").read_text()):
            case(folder, parallel=kinds[told.pop("kind")](place), **told)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
