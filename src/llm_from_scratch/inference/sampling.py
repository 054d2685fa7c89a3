"""Which token comes next: the logits of a model, filtered and drawn from.

The order is that of transformers, so the same settings mean the same distribution: repetition penalty, temperature, top-k, top-p.
It looks at one place at a time, so it cannot take a token back (beam search can). How logits come about is `decoding`'s business.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llm_from_scratch.inference.decoding import decoder

if TYPE_CHECKING:
    from llm_from_scratch.model.ngram import NGram


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw. Every filter is off unless asked for; `temperature` 0 takes the likeliest token and draws nothing.

    `top_k` 0 keeps all tokens, `top_p` 1 all of the mass, `repetition_penalty` 1 leaves what was said before alone
    (Keskar et al. 2019, CTRL). `stop` holds strings that end the text and are no part of it. Raises ValueError.
    """

    temperature: float
    max_tokens: int
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        wanted = {
            "temperature": (0 <= self.temperature < math.inf, "a number from 0 (greedy) up"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a number above 0; 1 is off"),
            "stop": (isinstance(self.stop, tuple) and all(self.stop), "a tuple of strings, none of them empty"),
            "seed": (0 <= self.seed < 2**63, "from 0 up to 2**63 - 1"),
        }
        for name, (fits, what) in wanted.items():
            if not fits:
                raise ValueError(f"sampling.{name}: found {getattr(self, name)!r}, wanted {what}")


def generate(
    model: nn.Module | NGram, prompt_ids: Sequence[int], sampling: Sampling, eot: int, stop_ids: Collection[int] = ()
) -> Iterator[int]:
    """New ids after `prompt_ids`, for any rung, until `max_tokens` of them, `eot` or one of `stop_ids` (which is not yielded).

    An empty prompt is the beginning of a document. Once the text outgrows the model's context, it goes on from the newest part.
    The same seed gives the same ids, whatever else is drawn at the time.
    """
    ids = list(prompt_ids) or [eot]
    ends = {eot, *stop_ids}
    next_logits = decoder(model, len(ids) + sampling.max_tokens)
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(sampling.max_tokens):
        token = pick(next_logits(ids), sampling, generator, ids)
        if token in ends:
            return
        ids.append(token)
        yield token


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator, history: Sequence[int]) -> int:
    """One token id from logits (V,), given the ids so far."""
    logits = penalized(logits.float().cpu(), sampling.repetition_penalty, history)
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits, sampling), 1, generator=generator))


def penalized(logits: Tensor, penalty: float, history: Sequence[int]) -> Tensor:
    """Logits (V,) with every token of `history` made less likely: a positive logit divided by `penalty`, a negative one multiplied."""
    if penalty == 1 or not history:
        return logits
    said = torch.tensor(sorted(set(history)))
    chosen = logits[said]
    return logits.index_copy(0, said, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What `pick` draws from: (V,) probabilities after temperature, top-k and top-p. Needs a temperature above 0."""
    logits = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p < 1:
        logits = nucleus(logits, sampling.top_p)
    return logits.softmax(-1)


def nucleus(logits: Tensor, mass: float) -> Tensor:
    """Logits (V,), all but the fewest likeliest tokens that together hold `mass` at minus infinity (Holtzman et al. 2020)."""
    ordered, order = logits.sort(descending=True, stable=True)
    shares = ordered.softmax(-1)
    beyond = shares.cumsum(-1) - shares >= mass
    return logits.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -math.inf)
