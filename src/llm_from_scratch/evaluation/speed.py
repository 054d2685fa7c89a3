"""How fast a model writes and how much room it takes.

One request, one token after another, as a person at a prompt waits for it. Batching gives more tokens a second; it is not measured here.
The numbers hold a clock, so they belong in reports and never in a bundle.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch import nn

from llm_from_scratch.inference.decoding import decoder
from llm_from_scratch.model.ngram import NGram


@dataclass(frozen=True)
class Latency:
    """`p50_ms`: half of the tokens took no longer than this many milliseconds. `tok_per_s`: tokens by the time of all of them."""

    p50_ms: float
    tok_per_s: float


def latency(model: nn.Module | NGram, prompt: Sequence[int], tokens: int, repeats: int) -> Latency:
    """Of `tokens` greedy ones after `prompt`; the median of `repeats`, after one that is not counted (caches, lazy set-up)."""
    runs = [step_seconds(model, prompt, tokens) for _ in range(repeats + 1)][1:]
    return Latency(p50_ms=1000 * median(median(steps) for steps in runs), tok_per_s=tokens / median(sum(steps) for steps in runs))


def step_seconds(model: nn.Module | NGram, prompt: Sequence[int], tokens: int) -> list[float]:
    """Seconds of each of `tokens` steps. Reading the prompt is not in it; it grows with the prompt and is paid once."""
    ids = list(prompt)
    next_logits = decoder(model, len(ids) + tokens + 1)
    ids.append(int(next_logits(ids).argmax()))
    seconds = []
    for _ in range(tokens):
        started = time.perf_counter()
        token = int(next_logits(ids).argmax())
        seconds.append(time.perf_counter() - started)
        ids.append(token)
    return seconds


def size_mb(folder: Path) -> float:
    """Megabytes (10**6 bytes) of the weights of a bundle."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
