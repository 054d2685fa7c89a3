"""Week 8: what each quantization of a model of more than 25 million parameters costs in likelihood, and what it gains in room and time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import table
from benchmarks.recipe import PLAN, Recipe
from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.data.shards import open_shards
from llm_from_scratch.evaluation.compare import compare
from llm_from_scratch.evaluation.latency import batch_latency, prefill, step_seconds
from llm_from_scratch.evaluation.likelihood import score
from llm_from_scratch.evaluation.speed import resident_mb, size_mb
from llm_from_scratch.inference.quantize import SCHEMES, linear_mb, load_bundle, quantize, save_quantized
from llm_from_scratch.model import registry
from llm_from_scratch.model.llama import LlamaParams

EOT = 0
LARGE = LlamaParams(
    architecture="llama",
    context=256,
    width=768,
    layers=4,
    heads=12,
    kv_heads=12,
    hidden=2048,
    rope_theta=10000.0,
    qk_norm=False,
    copying=0.0,
)
DEEP = LARGE.model_copy(update={"width": 512, "layers": 8, "heads": 8, "kv_heads": 8, "hidden": 1536})
TOY = LARGE.model_copy(update={"context": 64, "width": 64, "layers": 2, "heads": 2, "kv_heads": 2, "hidden": 128})
CONTEXT, PROMPT, REQUESTS, REQUESTS_STEPS = 128, 16, 16, 6
BEFORE, PEER = "fp32", "transformers, fp32"
DEEPER = ", deeper"


Speeds = dict[str, dict[str, list[float]]]
"""Model, what it did, and milliseconds of it in each round."""


@dataclass(frozen=True)
class Text:
    """Token ids to learn from and to be scored on, and how many bytes each token spells."""

    train: np.ndarray
    held_out: np.ndarray
    token_bytes: np.ndarray


@dataclass(frozen=True)
class Effort:
    """How much of everything: training steps, held-out tokens for the large model and for `base`, rounds, and steps timed in each."""

    steps: int
    tokens: int
    base_tokens: int
    rounds: int
    timed: int


def main() -> None:
    parser = table.parser(__doc__ or "")
    parser.add_argument("--tokens", type=Path, default=Path("artifacts/tokens/wikipedia_bpe"), help="a tokens bundle, as the line makes it")
    parser.add_argument("--base", type=Path, default=Path("artifacts/models/base"), help="a finished model of these tokens; loss only")
    parser.add_argument("--steps", type=int, default=100, help="of training the large model, 512 tokens each")
    parser.add_argument("--rounds", type=int, default=30, help="how often each speed is measured, in turn")
    arguments = parser.parse_args()
    quick = arguments.quick
    effort = Effort(3, 200, 200, 1, 3) if quick else Effort(arguments.steps, 3000, 20000, arguments.rounds, 12)
    text, base = (toy_text(), None) if quick else (read(arguments.tokens), opened(arguments.base))
    trained = train(TOY if quick else LARGE, text, effort.steps)

    with tempfile.TemporaryDirectory() as work:
        folders = write(trained, Path(work))
        models: dict[str, nn.Module] = {name: opened(folder) for name, folder in folders.items()}
        peers = with_transformers(folders) | deeper(TOY if quick else DEEP, len(text.token_bytes))
        speeds = timed(models, peers, text.held_out, effort)
        sizes = {name: size_mb(folder) for name, folder in folders.items()}
    losses = {name: lost(trained, model, text, effort.tokens) for name, model in models.items()}
    settled = {} if base is None else settled_losses(base, text, effort.base_tokens)
    rows = [row(name, models.get(name), sizes, speeds, losses, settled) for name in speeds]
    settings = {
        "parameters": registry.parameters(trained),
        "trained_tokens": effort.steps * CONTEXT * 4,
        "held_out_tokens": effort.tokens,
        "base_held_out_tokens": effort.base_tokens,
        "rounds": effort.rounds,
        **table.packages("bitsandbytes", "transformers"),
    }
    table.write(arguments.out, "quantization", "Quantizations of a Llama-shaped model, on a CPU", rows, settings, NOTES)


NOTES = [
    "Every row is the bundle as it was written and opened again. `speed` is fp32's time by the row's, in the same round, the median of "
    "all rounds; `16 at once` is the same for sixteen requests in step, `reading` for a prompt of 64 tokens; `ms` are medians over "
    "rounds of the median step.",
    "`deeper` has about as many parameters, untrained, in eight layers 512 wide, where the others have four 768 wide: twice as many of "
    "the operations around the matrices, which no quantization makes faster.",
    "`MB held` are the weights, scales and tables in memory, without caches and libraries. bf16 is widened to float32 on loading, because "
    "a processor without bf16 units multiplies it more slowly: it saves disk and nothing else.",
    "`GB/s` is `MB held` by `ms`: a token for one request reads every weight once and does two operations with it, so time is bytes over "
    "bandwidth. A quarter of the bytes can be at most four times as fast; what keeps our two int8 kernels below is a small head, which "
    "stays in float32, and what is no matrix. Up to sixteen tokens of fp32 and of these two go through `inference/kernels.py`, the other "
    "rows through torch and bitsandbytes.",
    "With sixteen requests each weight that was read is used sixteen times, and with a whole prompt a hundred times: arithmetic takes the "
    "time there. int8_weight has no less of it than fp32, and its weights to widen first; of a whole prompt, int8_dynamic multiplies whole "
    "numbers in the MLPs, four at a time where the processor has VNNI (without it, in a plain loop).",
    "`loss` is by how much bits per byte rise. The large model has seen few tokens, and weights far from settled forgive rounding; "
    "`loss of base` is the same for the small model that `make repro` trains to the end.",
    "int8 and nf4 are bitsandbytes' own layers in our model. Its nf4 unpacks all weights to float32 at every step, which is why the "
    "smallest file is the slowest model here.",
]


def read(tokens: Path) -> Text:
    """Raises BundleError where there is none."""
    bundle.verify(tokens, "tokens")
    shards = open_shards(tokens)
    return Text(shards.train, shards.val, tokenizer.load(tokens).token_bytes())


def toy_text() -> Text:
    ids = np.random.default_rng(0).integers(0, 64, 5000).astype(np.uint16)
    return Text(ids, ids[:1000], np.ones(64, dtype=np.int64))


def train(shape: LlamaParams, text: Text, steps: int) -> nn.Module:
    """AdamW: at this width Muon's products would take longer than the model's."""
    rates = {"optimizer": "adamw", "learning_rate": 1e-3, "embedding_learning_rate": 1e-3, "cooldown_share": 0.6}
    plan = PLAN.model_copy(update={"context": min(CONTEXT, shape.context), "batch": 4, **rates})
    return Recipe(shape, plan).train(text.train, len(text.token_bytes), 1, steps).model


def write(model: nn.Module, work: Path) -> dict[str, Path]:
    """The bundles, by name; the plain one first."""
    folders = {name: work / name for name in (BEFORE, *SCHEMES)}
    for name, folder in folders.items():
        folder.mkdir()
        if name == BEFORE:
            registry.save_model(model, folder, EOT)  # type: ignore[arg-type]
        else:
            save_quantized(quantize(model, name), folders[BEFORE], folder)  # type: ignore[arg-type]
    return folders


def opened(folder: Path) -> nn.Module:
    model = load_bundle(folder)
    assert isinstance(model, nn.Module)
    return model


def with_transformers(folders: Mapping[str, Path]) -> dict[str, nn.Module]:
    """The peers: what transformers makes of the same folders."""
    from transformers import AutoModelForCausalLM

    asked = {PEER: BEFORE, "transformers, LLM.int8()": "int8"}
    return {name: AutoModelForCausalLM.from_pretrained(folders[source], dtype=torch.float32).eval() for name, source in asked.items()}


def deeper(shape: LlamaParams, vocab_size: int) -> dict[str, nn.Module]:
    """As many parameters in twice the layers, untrained: for speed alone."""
    torch.manual_seed(0)
    model = registry.build(shape, vocab_size).eval()
    return {f"{name}{DEEPER}": model if name == BEFORE else quantize(model, name) for name in (BEFORE, "int8_dynamic", "int8_weight")}


def timed(models: Mapping[str, nn.Module], peers: Mapping[str, nn.Module], ids: np.ndarray, effort: Effort) -> Speeds:
    """Of each model, round after round: milliseconds of a step for one request; of `models` also for sixteen, and for reading a prompt."""
    prompt, whole = ids[:PROMPT].tolist(), ids[: CONTEXT // 2].tolist()
    found: Speeds = {name: {"one": [], "several": [], "reading": []} for name in (*models, *peers)}
    for turn in range(effort.rounds + 1):
        for name, model in {**models, **peers}.items():
            steps = transformers_seconds if name.startswith("transformers") else step_seconds
            milliseconds = 1000 * median(steps(model, prompt, effort.timed))
            if turn:  # the first round is not counted: caches, lazy set-up
                found[name]["one"].append(milliseconds)
    for _ in range(1 + effort.rounds // 4):
        for name, model in models.items():
            found[name]["several"].append(batch_latency(model, prompt, REQUESTS_STEPS, 1, REQUESTS).p50_ms)
            found[name]["reading"].append(1000 * len(whole) / prefill(model, whole, 1))
    return found


@torch.inference_mode()
def transformers_seconds(model: Any, prompt: list[int], tokens: int) -> list[float]:
    """What `step_seconds` is for our models."""
    state = model(torch.tensor([prompt]), use_cache=True)
    seconds = []
    for _ in range(tokens):
        started = perf_counter()
        state = model(state.logits[:, -1:].argmax(-1), past_key_values=state.past_key_values, use_cache=True)
        state.logits[0, -1].argmax().item()
        seconds.append(perf_counter() - started)
    return seconds


def lost(plain: nn.Module, small: nn.Module, text: Text, tokens: int) -> dict[str, float]:
    """Bits per byte, and what differs from `plain`."""
    ids, context = text.held_out[:tokens], min(CONTEXT, int(plain.context))  # type: ignore[arg-type]
    agreement = compare(plain, small, ids, context, 8)
    return {"bits": score(small, ids, text.token_bytes, context).val_bpb, "kl": agreement.kl, "top1": agreement.top1}


def settled_losses(base: Any, text: Text, tokens: int) -> dict[str, float]:
    """Bits per byte of `base` and of each quantization of it."""
    models = {BEFORE: base} | {scheme: quantize(base, scheme) for scheme in SCHEMES}
    return {name: score(model, text.held_out[:tokens], text.token_bytes, base.context).val_bpb for name, model in models.items()}


def row(
    name: str,
    model: nn.Module | None,
    sizes: Mapping[str, float],
    speeds: Speeds,
    losses: Mapping[str, dict[str, float]],
    settled: Mapping[str, float],
) -> dict[str, Any]:
    one = table.middle(speeds[name]["one"])
    found: dict[str, Any] = {"bundle": name, "ms": one["median"], "from … to": f"{one['low']:.2f} … {one['high']:.2f}"}
    found["speed"] = gain(speeds, name, "one")
    if model is None:
        return found
    packed, unpacked = linear_mb(model) if name != BEFORE else (1.0, 1.0)
    held = resident_mb(model)
    bits = {key: losses[key]["bits"] for key in (BEFORE, name)}
    return found | {
        "16 at once, ms": median(speeds[name]["several"]),
        "16 at once": gain(speeds, name, "several"),
        "reading": gain(speeds, name, "reading"),
        "MB on disk": sizes[name],
        "MB held": held,
        "linear layers": packed / unpacked,
        "GB/s": held / one["median"],
        "bits per byte": f"{bits[name]:.4f}",
        "loss": f"{bits[name] / bits[BEFORE] - 1:+.3%}",
        "loss of base": f"{settled[name] / settled[BEFORE] - 1:+.3%}" if settled else "",
        "KL": losses[name]["kl"],
        "same first choice": f"{losses[name]['top1']:.1%}",
    }


def gain(speeds: Speeds, name: str, key: str) -> float:
    """How many times as fast as fp32 of the same shape, round by round."""
    before = speeds[BEFORE + DEEPER if name.endswith(DEEPER) else BEFORE]
    return median(theirs / ours for theirs, ours in zip(before[key], speeds[name][key], strict=True))


if __name__ == "__main__":
    main()
