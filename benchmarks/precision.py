"""Week 7: speed, memory and loss of a small GPT in each precision, on whatever this machine computes with."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks import table
from benchmarks.apart import DEVICE, Steps, apart, plan, train
from llm_from_scratch.training.plan import TrainParams
from llm_from_scratch.training.precision import arithmetic

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
SHAPES: dict[str, dict[str, int]] = {
    "cpu": {"context": 64, "width": 64, "layers": 2, "heads": 2, "batch": 8, "steps": 200},
    "cuda": {"context": 1024, "width": 768, "layers": 12, "heads": 12, "batch": 16, "steps": 200},
    "toy": {"context": 16, "width": 16, "layers": 1, "heads": 2, "batch": 2, "steps": 5},
}


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument(
        "--tokens", type=Path, default=Path("artifacts/tokens/shakespeare_char"), help="a tokens bundle, as the line makes it"
    )
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    shape, seeds = SHAPES["toy" if arguments.quick else DEVICE], range(1, 2 if arguments.quick else 1 + arguments.seeds)
    tokens = None if arguments.quick else arguments.tokens
    able = [name for name in PRECISIONS if name != "tf32" or DEVICE == "cuda"]
    found: dict[str, list[Steps]] = {name: [] for name in able}
    for seed in seeds:  # one precision after the other, again and again: a machine that slows down slows all of them
        for name in able:
            found[name].append(apart(train, told(shape, name, seed), tokens))
    products = {name: apart(product, name, 64 if arguments.quick else 1024) for name in able}
    rows = [row(name, found, shape) | {"GFLOP/s": products.get(name)} for name in PRECISIONS]
    settings = {"device": DEVICE, **shape, "seeds": list(seeds)}
    table.write(arguments.out, "precision", "A small GPT trained in each precision", rows, settings, NOTES)


NOTES = [
    "`speed` and `memory` are against fp32 in the same run; medians over seeds, and for tokens/s and loss the lowest and highest too.",
    "Weights, gradients and moments are fp32 in all of them. So memory can fall only by what the forward pass keeps, and where batches are "
    "as small as here, the narrow copies of the weights cost more than that saves.",
    "`loss` is in nats a token on held-out text after all steps, computed in fp32.",
    "`GFLOP/s` is a product of two square matrices, 1,024 wide: so narrow a model spends most of its time elsewhere, a wide one spends it "
    "there. A CPU without avx512_bf16 and amx_bf16 has no units for bf16, and without avx512_fp16 and amx_fp16 none for fp16: it converts "
    "numbers before and after each product. This is why fp32 is the default, and the profile for cards says bf16.",
]


def told(shape: dict[str, int], precision: str, seed: int) -> TrainParams:
    """The shipped rung `gpt` in another shape. All the rest, the optimizer and its rates too, is as it stands in params.yaml."""
    sizes = {name: shape[name] for name in ("context", "width", "layers", "heads")}
    steps = dict.fromkeys(("steps", "evaluate_every", "checkpoint_every"), shape["steps"])
    changes = steps | {"warmup_steps": shape["steps"] // 10, "context": shape["context"], "batch": shape["batch"]}
    return plan("gpt", model={"architecture": "gpt", "dropout": 0.0, **sizes}, seed=seed, precision=precision, **changes)


def product(precision: str, width: int) -> float:
    """Billions of operations a second in square matrix products: what is left of a precision's speed where a model is wide."""
    with arithmetic(precision, torch.device(DEVICE)) as numbers, numbers.autocast():
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        x = torch.randn(width, width, device=DEVICE).to(dtype)
        count, started = 0, perf_counter()
        while perf_counter() < started + 1:
            (x @ x)[0, 0].item()  # waits for a card
            count += 1
        return round(2 * width**3 * count / (perf_counter() - started) / 1e9, 1)


def row(name: str, found: dict[str, list[Steps]], shape: dict[str, int]) -> dict[str, Any]:
    if name not in found:
        return {"precision": name, "tokens/s": "needs an NVIDIA card"}
    tokens = shape["batch"] * shape["context"]
    speeds = {key: table.middle([1000 * tokens / run.step_ms for run in found[key]]) for key in ("fp32", name)}
    peaks = {key: table.middle([run.peak_mib for run in found[key]])["median"] for key in ("fp32", name)}
    losses = table.middle([run.val_loss for run in found[name]])
    return {
        "precision": name,
        "tokens/s": round(speeds[name]["median"]),
        "from … to": f"{speeds[name]['low']:,.0f} … {speeds[name]['high']:,.0f}",
        "speed": speeds[name]["median"] / speeds["fp32"]["median"],
        "peak MiB": round(peaks[name], 1),
        "memory": peaks[name] / peaks["fp32"],
        "loss": losses["median"],
        "its spread": f"{losses['low']:.4f} … {losses['high']:.4f}",
    }


if __name__ == "__main__":
    main()
