"""How fast a model writes and reads, as an engine serves it.

Writing is one token after another: of one request, as a person at a prompt waits for it, or of several in step, which gives each of them
its tokens later and all of them more a second. Reading is a whole prompt at once (prefill). The numbers hold a clock, so they belong in
reports and never in a bundle.

Shapes: B requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from llm_from_scratch.inference.batching import Batcher, Batching
from llm_from_scratch.inference.decoding import context_of, evaluating
from llm_from_scratch.inference.forward import Forward, forward_of
from llm_from_scratch.inference.kv_cache import SlotCache
from llm_from_scratch.inference.sampling import Sampling, likeliest


@dataclass(frozen=True)
class Latency:
    """`p50_ms`: half of the steps, a token of each request, took no longer than this many milliseconds. `tok_per_s`: tokens by the time of
    all of them.
    """

    p50_ms: float
    tok_per_s: float


def latency(model: nn.Module, prompt: Sequence[int], tokens: int, repeats: int) -> Latency:
    """Of `tokens` greedy ones after `prompt`; the median of `repeats`, after one that is not counted (caches, lazy set-up)."""
    return _middle([step_seconds(model, prompt, tokens) for _ in range(repeats + 1)][1:], tokens)


def batch_latency(model: nn.Module, prompt: Sequence[int], tokens: int, repeats: int, batch: int) -> Latency:
    """The same of `batch` requests in step, all with `prompt`, within the model's context.

    Raises ValueError where the prompt and the tokens do not fit the context.
    """
    return _middle([batch_step_seconds(model, prompt, tokens, batch) for _ in range(repeats + 1)][1:], batch * tokens)


def prefill(model: nn.Module, prompt: Sequence[int], repeats: int) -> float:
    """Tokens a second of reading `prompt` into an empty cache; the median of `repeats`, after one that is not counted."""
    return len(prompt) / median([_prompted(model, prompt, 1, 0)[-1] for _ in range(repeats + 1)][1:])


def step_seconds(model: nn.Module, prompt: Sequence[int], tokens: int) -> list[float]:
    """Seconds of each of `tokens` steps of a gpt or llama. Reading the prompt is not in it; it grows with the prompt and is paid once."""
    written = Batcher(model, Batching(slots=1, prefill_chunk=512)).tokens(prompt, Sampling(temperature=0, max_tokens=tokens + 1), ())
    next(written)
    seconds = []
    for _ in range(tokens):
        started = time.perf_counter()
        next(written)
        seconds.append(time.perf_counter() - started)
    return seconds


@torch.inference_mode()
def batch_step_seconds(model: nn.Module, prompt: Sequence[int], tokens: int, batch: int) -> list[float]:
    """Seconds of each of `tokens` steps of `batch` requests, each of which gets a token from every step."""
    slots, forward, logits, _ = _prompted(model, prompt, batch, tokens)
    seconds, best = [], likeliest(logits[:, -1])
    with evaluating(model):
        for _ in range(tokens):
            started = time.perf_counter()
            logits = forward(torch.tensor(best, device=slots.device)[:, None], slots.rows(0, batch, 1, range(batch)), False)
            best = likeliest(logits[:, -1])  # waits for a card
            seconds.append(time.perf_counter() - started)
    return seconds


def _middle(runs: Sequence[Sequence[float]], tokens: int) -> Latency:
    """Of several runs of steps, each of which made `tokens` tokens: the median step of the median run."""
    return Latency(p50_ms=1000 * median(median(steps) for steps in runs), tok_per_s=tokens / median(sum(steps) for steps in runs))


@torch.inference_mode()
def _prompted(model: nn.Module, prompt: Sequence[int], batch: int, more: int) -> tuple[SlotCache, Forward, Tensor, float]:
    """`batch` times `prompt` in empty slots with room for `more`, how to read on, the last logits (B, 1, V), and the seconds of reading."""
    if len(prompt) + more > (context := context_of(model)):
        raise ValueError(f"found {len(prompt) + more} tokens, the context holds {context}; time fewer")
    slots, forward = SlotCache(model, batch, len(prompt) + more), forward_of(model)
    ids = torch.tensor([list(prompt)] * batch, device=slots.device)
    started = time.perf_counter()
    with evaluating(model):
        logits = forward(ids, slots.rows(0, batch, len(prompt), range(batch)), False)
    logits[0, -1, 0].item()
    return slots, forward, logits, time.perf_counter() - started
