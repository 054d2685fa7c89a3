"""Which token comes next: the logits of a model, filtered and drawn from.

The order is that of transformers, so the same settings mean the same distribution: logit bias, repetition penalty, temperature, top-k,
top-p, min-p; OpenAI's penalties for what was generated come before the temperature. It looks at one place at a time, so it cannot take a
token back (beam search can). How logits come about is `decoding`'s business.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llm_from_scratch.inference.decoding import decoder

if TYPE_CHECKING:
    from llm_from_scratch.model.ngram import NGram

LIKELIEST = 512
"""Tokens that usually hold the whole nucleus: finding them takes a tenth of the time of sorting a vocabulary of 50,000."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw. Every filter is off unless asked for; `temperature` 0 takes the likeliest token and draws nothing.

    `top_k` 0 keeps all tokens, `top_p` 1 all of the mass; `min_p` keeps those at least that share as likely as the likeliest (Nguyen et al.
    2024). `repetition_penalty` 1 leaves what was said before alone, prompt and all (Keskar et al. 2019, CTRL). `presence_penalty` is taken
    once off the logit of every token generated so far, `frequency_penalty` as often as it was; `logit_bias` holds (token id, what is added
    to its logit), as OpenAI defines all three. `stop` holds strings that end the text and are no part of it. `logprobs` asks for the log
    probability of each token, and of so many alternatives. Raises ValueError.
    """

    temperature: float
    max_tokens: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        wanted = {
            "temperature": (0 <= self.temperature < math.inf, "a number from 0 (greedy) up"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a number above 0; 1 is off"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a number; 0 is off"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a number; 0 is off"),
            "logit_bias": (_is_bias(self.logit_bias), "a tuple of pairs, each a token id and a number"),
            "stop": (isinstance(self.stop, tuple) and all(self.stop), "a tuple of strings, none of them empty"),
            "seed": (0 <= self.seed < 2**63, "from 0 up to 2**63 - 1"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "None (off), or how many alternatives, from 0 up"),
        }
        for name, (fits, what) in wanted.items():
            if not fits:
                raise ValueError(f"sampling.{name}: found {getattr(self, name)!r}, wanted {what}")

    @cached_property
    def biases(self) -> tuple[Tensor, Tensor]:
        """The ids and what is added to their logits, made into tensors once for all tokens."""
        return torch.tensor([token for token, _ in self.logit_bias]), torch.tensor(
            [bias for _, bias in self.logit_bias], dtype=torch.float32
        )

    @property
    def plain(self) -> bool:
        """The likeliest token by the model's own logits, and nothing asked about it."""
        adjusted = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.temperature == 0 and not adjusted and self.logprobs is None


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log of the model's own probability of a token: of softmax(logits), before bias, penalties, temperature and filters, which is
    what OpenAI's API gives. `top` holds (token id, the same of it) of the likeliest tokens, best first, whether the token is one or not.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def generate(
    model: nn.Module | NGram, prompt_ids: Sequence[int], sampling: Sampling, eot: int, stop_ids: Collection[int] = ()
) -> Iterator[int]:
    """New ids after `prompt_ids`, for any rung, until `max_tokens` of them, `eot` or one of `stop_ids` (which is not yielded).

    An empty prompt is the beginning of a document. Once the text outgrows the model's context, it goes on from the newest part.
    The same seed gives the same ids, whatever else is drawn at the time.
    """
    for token, _ in drawn(model, list(prompt_ids) or [eot], sampling, {eot, *stop_ids}):
        yield token


def drawn(
    model: nn.Module | NGram, prompt_ids: Sequence[int], sampling: Sampling, ends: Collection[int]
) -> Iterator[tuple[int, TokenLogprob | None]]:
    """What `generate` yields, and its log probability where `sampling` asks for it. The prompt is not empty."""
    ids = list(prompt_ids)
    next_logits = decoder(model, len(ids) + sampling.max_tokens)
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(sampling.max_tokens):
        logits = next_logits(ids)
        token = pick(logits, sampling, generator, ids, len(prompt_ids))
        if token in ends:
            return
        ids.append(token)
        yield token, None if sampling.logprobs is None else log_probability(logits, token, sampling.logprobs)


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator, history: Sequence[int], prompt: int | None = None) -> int:
    """One token id from logits (V,), given the ids so far, the first `prompt` of which (None: all) were not generated."""
    logits = logits.float().cpu()
    if sampling.logit_bias:
        logits = logits.index_add(0, *sampling.biases)
    logits = penalized(logits, sampling.repetition_penalty, history)
    if sampling.presence_penalty or sampling.frequency_penalty:
        generated = history[len(history) if prompt is None else prompt :]
        logits = discouraged(logits, sampling.presence_penalty, sampling.frequency_penalty, generated)
    if sampling.temperature == 0:
        return likeliest(logits[None])[0]
    # Where a uniform number falls in the sums of the probabilities. torch.multinomial draws a number for every token of the vocabulary.
    sums = probabilities(logits, sampling).cumsum(-1)
    place = torch.rand(1, generator=generator) * sums[-1]
    return min(int(torch.searchsorted(sums, place, right=True)), int(torch.searchsorted(sums, sums[-1:])))


def likeliest(logits: Tensor) -> list[int]:
    """The best of each row, (B, V) to B ids. On a CPU numpy finds it ten times as fast as torch."""
    rows = logits.detach().float().numpy() if logits.device.type == "cpu" else logits
    found: list[int] = rows.argmax(-1).tolist()
    return found


def penalized(logits: Tensor, penalty: float, history: Sequence[int]) -> Tensor:
    """Logits (V,) with every token of `history` made less likely: a positive logit divided by `penalty`, a negative one multiplied."""
    if penalty == 1 or not history:
        return logits
    said = torch.tensor(sorted(set(history)))
    chosen = logits[said]
    return logits.index_copy(0, said, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def discouraged(logits: Tensor, presence: float, frequency: float, generated: Sequence[int]) -> Tensor:
    """Logits (V,) less `presence` for every token of `generated`, and less `frequency` each time it is there (OpenAI's API reference)."""
    if not generated:
        return logits
    tokens, counts = zip(*Counter(generated).items(), strict=True)
    return logits.index_add(0, torch.tensor(tokens), -presence - frequency * torch.tensor(counts, dtype=torch.float32))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What `pick` draws from: (V,) probabilities after temperature, top-k, top-p and min-p. Needs a temperature above 0."""
    logits = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p < 1:
        logits = nucleus(logits, sampling.top_p)
    chances = logits.softmax(-1)
    if sampling.min_p:
        chances = logits.masked_fill(chances < sampling.min_p * chances.max(), -math.inf).softmax(-1)
    return chances


def nucleus(logits: Tensor, mass: float) -> Tensor:
    """Logits (V,), all but the fewest likeliest tokens that together hold `mass` at minus infinity (Holtzman et al. 2020)."""
    shares = logits.softmax(-1)
    ordered, order = shares.topk(min(LIKELIEST, len(shares)))
    sums = ordered.cumsum(-1)
    if sums[-1] < mass:
        ordered, order = shares.sort(descending=True, stable=True)
        sums = ordered.cumsum(-1)
    kept = order[sums - ordered < mass]
    return torch.full_like(logits, -math.inf).index_copy(0, kept, logits[kept])


def log_probability(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Of `token`, and of the `top` likeliest, by the model's own logits (V,)."""
    values = logits.float().cpu().log_softmax(-1)
    best = values.topk(min(top, len(values)))
    return TokenLogprob(token, float(values[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def _is_bias(found: object) -> bool:
    """Whether this is (token id, finite number) pairs."""
    return isinstance(found, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], int) and pair[0] >= 0 and math.isfinite(pair[1])
        for pair in found
    )
