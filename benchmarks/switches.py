"""Speed and memory with each switch of training on and off: recomputed layers, smaller parts, compiled code, faster optimizers."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.nn import Parameter

from benchmarks import table
from benchmarks.apart import DEVICE, WARM, Steps, apart, peak, plan, train
from llm_from_scratch.model import registry
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.training.optimizer import BETAS, Muon, split
from llm_from_scratch.training.plan import TrainParams

VOCAB = 2048
SHAPES: dict[str, dict[str, int]] = {
    "cpu": {"context": 256, "width": 192, "layers": 4, "heads": 6, "hidden": 512, "batch": 8, "steps": 7, "optimizer_steps": 15},
    "cuda": {"context": 1024, "width": 768, "layers": 12, "heads": 12, "hidden": 2048, "batch": 16, "steps": 30, "optimizer_steps": 40},
    "toy": {"context": 16, "width": 16, "layers": 2, "heads": 2, "hidden": 32, "batch": 4, "steps": 4, "optimizer_steps": 4},
}
OFF = "all off"
TRAINING: dict[str, dict[str, Any]] = {
    OFF: {},
    "checkpointing": {"checkpointing": True},
    "micro_batch: a quarter": {"micro_batch": 4},
    "both of these": {"checkpointing": True, "micro_batch": 4},
    "compile": {"compile": True},
}
Move = Callable[[], None]
NOTES = [
    "Training steps go through `fit`, on random tokens, with Muon; the first {warm} are not counted, and what the first one alone took "
    "(compiling, where that is on) stands beside them. `speed` and `memory` are against the row of the same part with nothing on.",
    "Optimizer steps move the weights of the same model by gradients that stay; their memory counts weights, gradients and moments.",
    "Memory is the highest after the first steps, less what the process held before the model was built. On a CPU that is resident memory: "
    "with compile the compiler's own memory is in it.",
    "Each number is the median over rounds; each measurement has a process of its own, and the switches take turns.",
]


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="with --quick: compile too, which takes half a minute")
    arguments = parser.parse_args()
    shape, rounds = SHAPES["toy" if arguments.quick else DEVICE], 1 if arguments.quick else arguments.rounds
    chosen = {name: switched for name, switched in TRAINING.items() if name != "compile" or not arguments.quick or arguments.compile}
    optimizers = ["AdamW, a loop", "Muon, one by one"] if arguments.quick else list(OPTIMIZERS)
    steps: dict[str, list[Steps]] = {name: [] for name in [*chosen, *optimizers]}
    for _ in range(rounds):
        for name, switched in chosen.items():
            parts = {"micro_batch": shape["batch"] // switched["micro_batch"]} if "micro_batch" in switched else {}
            steps[name].append(apart(train, told(shape, switched | parts), None))
        for name in optimizers:
            steps[name].append(apart(move, name, shape))
    rows = [row("training step", name, OFF, steps) for name in chosen]
    rows += [row("optimizer step", name, "AdamW, a loop" if "AdamW" in name else "Muon, one by one", steps) for name in optimizers]
    settings = {"device": DEVICE, **shape, "vocab": VOCAB, "model": "llama", "rounds": rounds}
    notes = [note.format(warm=WARM) for note in NOTES]
    table.write(arguments.out, "switches", "What each switch of training costs and saves", rows, settings, notes)


def told(shape: dict[str, int], switched: dict[str, Any]) -> TrainParams:
    """The shipped rung `base` in another shape, for a few steps, with a switch or two turned."""
    sizes = {name: shape[name] for name in ("context", "batch", "steps")}
    return plan("base", model=model_params(shape).model_dump(), **sizes, warmup_steps=0, **switched)


def model_params(shape: dict[str, int]) -> LlamaParams:
    sizes = {name: shape[name] for name in ("context", "width", "layers", "heads", "hidden")}
    return LlamaParams(architecture="llama", kv_heads=shape["heads"], rope_theta=10000.0, qk_norm=False, copying=0.0, **sizes)


def adamw(**kind: bool) -> Callable[[list[Parameter]], Move]:
    return lambda weights: torch.optim.AdamW(weights, lr=1e-3, betas=BETAS, **kind).step


def one_by_one(matrices: list[Parameter]) -> Move:
    movers = [Muon([matrix], 0.02, 0.01) for matrix in matrices]

    def step() -> None:
        for mover in movers:
            mover.step()

    return step


OPTIMIZERS: dict[str, Callable[[list[Parameter]], Move]] = {
    "AdamW, a loop": adamw(foreach=False),
    "AdamW, foreach": adamw(foreach=True),
    "AdamW, fused": adamw(fused=True),
    "Muon, one by one": one_by_one,
    "Muon, stacked by shape": lambda matrices: Muon(matrices, 0.02, 0.01).step,
}


def move(name: str, shape: dict[str, int]) -> Steps:
    """Time the steps of one optimizer over the weights it would have: all for AdamW, the hidden matrices for Muon."""
    with peak() as memory:
        torch.manual_seed(1)
        model = registry.build(model_params(shape), VOCAB).to(DEVICE)
        weights = list(model.parameters()) if "AdamW" in name else split(model)[0]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        step, times = OPTIMIZERS[name](weights), []
        for number in range(WARM + shape["optimizer_steps"]):
            if number == WARM:
                memory.start()
            started = perf_counter()
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (perf_counter() - started))
        memory.stop()
    return Steps(median(times[WARM:]), times[0], memory.mib, 0.0)


def row(part: str, name: str, off: str, steps: dict[str, list[Steps]]) -> dict[str, Any]:
    times = {key: table.middle([run.step_ms for run in steps[key]]) for key in (name, off)}
    peaks = {key: table.middle([run.peak_mib for run in steps[key]])["median"] for key in (name, off)}
    return {
        "part": part,
        "switch": name,
        "ms a step": times[name]["median"],
        "from … to": f"{times[name]['low']:.3g} … {times[name]['high']:.3g}",
        "speed": times[off]["median"] / times[name]["median"],
        "peak MiB": round(peaks[name], 1),
        "memory": peaks[name] / peaks[off],
        "first step ms": table.middle([run.first_ms for run in steps[name]])["median"],
    }


if __name__ == "__main__":
    main()
