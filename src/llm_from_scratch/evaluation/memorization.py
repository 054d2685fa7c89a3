"""How much does the model know by heart? What it writes, searched for in what it read.

Two looks. Sampled: it goes on from the beginnings of texts that it never saw, and the share of its runs of words that stand verbatim in
training text is counted, beside the same share of how those texts really go on: people repeat common phrases too, and only what is above
them is copying. Extracted: it goes on greedily from the beginnings of training texts, and it is counted how often the next tokens come out
exactly (Carlini et al. 2022, arXiv:2202.07646), beside the same for texts it never saw.

It finds what is copied to the letter. What a model has learned and says in other words, it does not see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from llm_from_scratch.inference.batched import draw
from llm_from_scratch.section import Section
from llm_from_scratch.tokenizer.base import Tokenizer

_WORDS = re.compile(r"\w+")


class MemorizationParams(Section):
    """`prompts` texts of each kind, their first `prompt_tokens`, gone on with for `new_tokens` at `temperature`; `run_words` make a run.

    `exact_tokens` have to come out as they stand for a text to count as extracted.
    """

    prompts: int = Field(ge=1)
    prompt_tokens: int = Field(ge=1)
    new_tokens: int = Field(ge=1)
    temperature: float = Field(gt=0)
    run_words: int = Field(ge=1)
    exact_tokens: int = Field(ge=1)


def runs(text: str, length: int) -> Iterator[int]:
    """The hash of each run of `length` words, in lower case and without punctuation."""
    words = _WORDS.findall(text.casefold())
    return map(hash, zip(*(words[start:] for start in range(length)), strict=False))


def runs_of(texts: Iterable[str], length: int) -> frozenset[int]:
    """All runs of a corpus."""
    return frozenset(run for text in texts for run in runs(text, length))


def repeated(texts: Iterable[str], known: frozenset[int], length: int) -> float:
    """The share of the runs in `texts` that are among the `known`; 0 where there is no run."""
    found = [run in known for text in texts for run in runs(text, length)]
    return sum(found) / max(1, len(found))


def memorization(
    model: nn.Module,
    tokenizer: Tokenizer,
    trained: Sequence[str],
    held_out: Sequence[str],
    known: frozenset[int],
    params: MemorizationParams,
    seed: int,
) -> dict[str, Any]:
    """Shares of runs that stand in training text, `sampled` and of the `held_out` continuations; of texts `extracted` from training, and
    `guessed` of those that were held out; and `prompts`, how many of each there were.

    `known` are the `runs_of` all training text. Texts too short to go on for `new_tokens` are left out; where all are, shares are 0, of 0.
    """
    seen, unseen = (beginnings(tokenizer, texts, params) for texts in (trained, held_out))
    if not (prompts := min(len(seen), len(unseen))):
        return {"sampled": 0.0, "held_out": 0.0, "extracted": 0.0, "guessed": 0.0, "prompts": 0}
    drawn = continued(model, tokenizer, unseen[:, : params.prompt_tokens], params, params.temperature, seed)
    really = [tokenizer.decode(row) for row in unseen[:, params.prompt_tokens :].tolist()]
    return {
        "sampled": repeated(drawn, known, params.run_words),
        "held_out": repeated(really, known, params.run_words),
        "extracted": exactly(model, tokenizer, seen, params),
        "guessed": exactly(model, tokenizer, unseen, params),
        "prompts": prompts,
    }


def beginnings(tokenizer: Tokenizer, texts: Sequence[str], params: MemorizationParams) -> Tensor:
    """(B, prompt_tokens + new_tokens): how the first texts that are long enough begin; B is 0 where none is."""
    wanted = params.prompt_tokens + params.new_tokens
    rows = [ids[:wanted] for ids in map(tokenizer.encode, texts) if len(ids) >= wanted][: params.prompts]
    return torch.tensor(rows, dtype=torch.long).view(-1, wanted)


def continued(
    model: nn.Module, tokenizer: Tokenizer, prompts: Tensor, params: MemorizationParams, temperature: float, seed: int
) -> list[str]:
    """What the model writes behind each of `prompts` (B, P)."""
    ends = frozenset(tokenizer.special.values())
    ids, _ = draw(model, prompts, params.new_tokens, ends, torch.Generator().manual_seed(seed), temperature)
    return [tokenizer.decode(row) for row in ids.tolist()]  # special tokens, which fill a row behind its end, spell nothing


def exactly(model: nn.Module, tokenizer: Tokenizer, texts: Tensor, params: MemorizationParams) -> float:
    """The share of `texts` (B, T) whose `exact_tokens` after the prompt come out greedily, one for one."""
    begun, wanted = texts[:, : params.prompt_tokens], texts[:, params.prompt_tokens :]
    length = min(params.exact_tokens, wanted.size(1))
    ids, _ = draw(model, begun, length, frozenset(tokenizer.special.values()), torch.Generator(), 0)
    return float((ids == wanted[:, :length]).all(1).double().mean())
