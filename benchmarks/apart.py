"""Measurements in a process of their own each: then peak memory is theirs alone, and none warms the caches of the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch

from llm_from_scratch.data.shards import open_shards
from llm_from_scratch.model import registry
from llm_from_scratch.training.batches import windows
from llm_from_scratch.training.loop import Batch, Batches, fit, next_token
from llm_from_scratch.training.plan import TrainParams
from stages.__main__ import read_yaml

WARM = 2  # steps that are not counted: kernels are chosen, moments allocated, code compiled
HELD_OUT = 16  # batches
MIB = 2**20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
R = TypeVar("R")


def apart(work: Callable[..., R], *arguments: Any) -> R:
    """`work`, a function at the top of a module, done in a new process, forked from one that has imported torch and done nothing."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.apart", "torch._dynamo"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


@dataclass(frozen=True)
class Steps:
    """Milliseconds of a step and of the first one, MiB at the peak (see `Peak`), and the loss on held-out text in the end."""

    step_ms: float
    first_ms: float
    peak_mib: float
    val_loss: float


def plan(rung: str, **changes: Any) -> TrainParams:
    """An entry of the shipped params.yaml, with changes."""
    params: Any = read_yaml(Path(__file__).parent.parent / "params.yaml")
    return TrainParams.model_validate(params["train"][rung] | changes)


def train(plan: TrainParams, tokens: Path | None) -> Steps:
    """Train as `plan` says, on a tokens bundle or, without one, on random ids (vocabulary 2,048), of which nothing can be learned."""
    if tokens is None:
        ids = held_out = np.random.default_rng(1).integers(2048, size=100_000).astype(np.uint16)
        vocab_size = 2048
    else:
        shards = open_shards(tokens)
        ids, held_out, vocab_size = shards.train, shards.val, shards.vocab_size
    begun: list[float] = []
    torch.compiler.config.force_disable_caches = plan.compile  # or the second round would find the first one's code
    with peak() as memory:
        torch.manual_seed(plan.seed)
        model = registry.build(plan.model, vocab_size)
        fit(model, clocked(windows(ids, plan.context, plan.batch, plan.seed), begun, memory), next_token, plan, device=DEVICE)
        memory.stop()
    gaps = np.diff(begun) * 1000
    test = windows(held_out, plan.context, plan.batch, seed=0)
    with torch.no_grad():
        losses = [next_token(model, to_device(test(step))).item() for step in range(HELD_OUT)]
    return Steps(median(gaps[WARM:]), gaps[0], memory.mib, float(np.mean(losses)))


def clocked(batches: Batches, begun: list[float], memory: Peak) -> Batches:
    """The same batches; when each was asked for, which is when its step began, goes into `begun`."""

    def at(step: int) -> Batch:
        if step == WARM:
            memory.start()
        begun.append(perf_counter())
        return batches(step)

    return at


def to_device(batch: Batch) -> Batch:
    return batch[0].to(DEVICE), batch[1].to(DEVICE)


class Peak:
    """The most memory between `start` and `stop`, in MiB, less what the process held when this was made.

    On a card it is what tensors took; on a CPU, resident memory as Linux counts it: code that was loaded since is in it.
    """

    def __init__(self) -> None:
        load_libraries()
        self.before = 0.0 if DEVICE == "cuda" else status("VmRSS")
        self.mib = 0.0

    def start(self) -> None:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now

    def stop(self) -> None:
        found = torch.cuda.max_memory_allocated() / MIB if DEVICE == "cuda" else status("VmHWM")
        self.mib = found - self.before


@contextmanager
def peak() -> Iterator[Peak]:
    if DEVICE == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise SystemExit("peak memory is read from Linux's /proc, which is not here; run this on Linux, or with a card")
    yield Peak()


def load_libraries() -> None:
    """Compute a little, so that what torch loads on first use is no part of the difference."""
    layer = torch.nn.Linear(64, 64).to(DEVICE)
    for fused in (False, True):
        layer(torch.randn(64, 64, device=DEVICE)).logsumexp(-1).sum().backward()
        torch.optim.AdamW(layer.parameters(), fused=fused).step()


def status(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
