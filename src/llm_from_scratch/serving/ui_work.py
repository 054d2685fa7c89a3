"""What the page asks of the model. Every question is a job in the lane, with its deadline, like any other request.

Nothing here knows Gradio or HTML: each function gives an async generator of what is known so far, and closing it stops the work.
What a reader has to be told comes as an ApiError or a ValueError of one line.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from llm_from_scratch.evaluation.heatmaps import attention_of
from llm_from_scratch.inference.decoding import prompt_limit
from llm_from_scratch.inference.engine import Engine, Piece
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.retrieval.index import Hit, Mode
from llm_from_scratch.retrieval.rag import Citation, answering
from llm_from_scratch.serving.answers import Interruptible
from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.lane import Check, Lane, Produce
from llm_from_scratch.serving.responder import Responder
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.tokenizer.chat import Message, render

if TYPE_CHECKING:
    from llm_from_scratch.inference.sampling import TokenLogprob

ALTERNATIVES = 5  # shown for each token
DRAWN_TOKENS = 64  # of attention: more cells than these squared cannot be told apart
PAUSE_SECONDS = 0.05  # between two drawings: each replaces the last one whole, and a browser has to keep up
RANKED = 100  # how far down the other rankings a passage is looked for

T = TypeVar("T")


@dataclass(frozen=True)
class Said:
    """An answer so far, and the passages that support it. `unsupported`: it was to be read from passages, and none says so."""

    text: str
    citations: tuple[Citation, ...] = ()
    unsupported: bool = False


@dataclass(frozen=True)
class Token:
    """A token of an answer: how it reads, its probability, and the likeliest ones at its place, best first."""

    text: str
    probability: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Found:
    """A hit, and the rank that each search alone gives its passage; None below the first `RANKED`."""

    hit: Hit
    dense_rank: int | None
    bm25_rank: int | None


@dataclass(frozen=True)
class Attention:
    """What each of the T tokens looks at in one head: `weights` (T, T), a row a query, rows sum to 1."""

    tokens: list[str]
    weights: NDArray[np.float32]


def chat(responder: Responder, turns: Sequence[Message], documents: bool, sampling: Sampling) -> AsyncGenerator[Said, None]:
    """The answer to the last of `turns`. With `documents` it is read from the index, asked alone; once it is complete it is known what it
    cites.
    """
    engine = responder.engine
    question = str(turns[-1]["content"])
    if not question.strip():
        raise ValueError("the message is empty; write something")

    def read(check: Check) -> Iterator[Said]:
        passages = responder.limits.passages
        with closing(answering(Interruptible(engine, check), responder.index, question, passages, sampling)) as growing:
            for found in growing:
                complete = found.finish_reason is not None
                if complete:
                    responder.meter.answered(found.prompt_tokens, found.completion_tokens)
                yield Said(found.text, found.citations, complete and found.found and not found.citations)

    def talk(check: Check) -> Iterator[Said]:
        text = ""
        for piece in _counted(responder, engine.chat(_newest(turns, engine, sampling.max_tokens), sampling)):
            text += piece.text
            yield Said(text)

    return _items(responder.lane, read if documents else talk)


def complete(responder: Responder, prompt: str, sampling: Sampling) -> AsyncGenerator[list[Token], None]:
    """All tokens after `prompt` so far. `sampling.logprobs` says how many alternatives each comes with."""
    engine = responder.engine
    _require_room(responder, prompt)

    def produce() -> Iterator[list[Token]]:
        tokens: list[Token] = []
        for piece in _counted(responder, engine.complete(prompt, sampling)):
            tokens += [_token(drawn, engine.tokenizer) for drawn in piece.logprobs]
            yield list(tokens)

    return _items(responder.lane, lambda check: produce())


def retrieve(responder: Responder, query: str, mode: Mode, k: int) -> AsyncGenerator[list[Found], None]:
    """One item: the best `k` passages for `query`."""
    if not query.strip():
        raise ValueError("the query is empty; write what to look for")
    index = responder.index

    def produce() -> Iterator[list[Found]]:
        dense, bm25 = ({hit.passage.id: hit.rank for hit in index.search(query, RANKED, alone)} for alone in ("dense", "bm25"))
        yield [Found(hit, dense.get(hit.passage.id), bm25.get(hit.passage.id)) for hit in index.search(query, k, mode)]

    return _items(responder.search_lane, lambda check: produce())


def attend(responder: Responder, text: str, layer: int, head: int) -> AsyncGenerator[Attention, None]:
    """One item: what the tokens of `text` look at in `layer` and `head`, both from 1."""
    engine = responder.engine
    found = len(engine.tokenizer.encode(text))
    if not 0 < found <= DRAWN_TOKENS:
        raise ValueError(f"the text is {found} tokens, and 1 to {DRAWN_TOKENS} can be drawn; write {'less' if found else 'something'}")

    def produce() -> Iterator[Attention]:
        maps, tokens = attention_of(engine, text)
        if layer > len(maps) or head > len(maps[0]):
            raise ValueError(f"no head {head} in layer {layer}: this model has {len(maps)} layers of {len(maps[0])}; choose others")
        yield Attention(tokens, maps[layer - 1, head - 1])

    return _items(responder.lane, lambda check: produce())


def heads(responder: Responder) -> tuple[int, int] | None:
    """(layers, heads) of the served model's attention; None where it has none to look at."""
    try:
        layers, heads, *_ = attention_of(responder.engine, "a")[0].shape
    except ValueError:
        return None
    return layers, heads


def evolve(responder: Responder, rung: str, prompt: str, sampling: Sampling) -> AsyncGenerator[str, None]:
    """What a packaged rung writes after `prompt`, so far: at most as many characters as `sampling.max_tokens`, since those whose tokens
    are words would otherwise say more than those whose tokens are letters. The served model gets the prompt as a question.
    """
    served = rung == responder.limits.model_name
    engine = responder.engine if served else responder.rungs[rung]
    asked = render([{"role": "user", "content": prompt}], engine.tokenizer, prompt=True)[0] if served else engine.tokenizer.encode(prompt)
    window = prompt_limit(engine.model)

    def produce() -> Iterator[str]:
        text = ""
        for piece in _counted(responder, engine.complete(asked[-window:] if window else asked, sampling)):
            text += piece.text
            yield text[: sampling.max_tokens]
            if len(text) >= sampling.max_tokens:
                return

    return _items(responder.lane, lambda check: produce())


async def _items(lane: Lane, produce: Produce[T]) -> AsyncGenerator[T, None]:
    """The newest of what a job says, now and then, to its end; it stops when nobody reads on. Each item must hold those before it."""
    job = lane.submit(produce)
    try:
        async for batch in job.batches():
            yield batch[-1][1]
            await asyncio.sleep(PAUSE_SECONDS)
    finally:
        job.stop()


def _counted(responder: Responder, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same pieces; what they took goes to the meter, also where nobody reads to the end."""
    last: Piece | None = None
    try:
        for last in pieces:
            yield last
    finally:
        if last is not None:
            responder.meter.answered(last.prompt_tokens, last.completion_tokens)


def _newest(turns: Sequence[Message], engine: Engine, new_tokens: int) -> Sequence[Message]:
    """The turns without the oldest pairs that leave no room for `new_tokens` more; the last one always stays."""
    limit = prompt_limit(engine.model)
    room = math.inf if limit is None else limit - new_tokens
    while len(turns) > 2 and len(render(turns, engine.tokenizer, prompt=True)[0]) > room:
        turns = turns[2:]
    return turns


def _require_room(responder: Responder, prompt: str) -> None:
    found, limit = len(responder.engine.tokenizer.encode(prompt)), responder.limits.maximum_prompt_tokens
    if found > limit:
        raise ApiError(400, f"the prompt is {found} tokens, and no more than {limit} are read; shorten it", "context_length_exceeded")


def _token(drawn: TokenLogprob, tokenizer: Tokenizer) -> Token:
    best = tuple((_read(tokenizer, token), math.exp(logprob)) for token, logprob in drawn.top)
    return Token(_read(tokenizer, drawn.token_id), math.exp(drawn.logprob), best)


def _read(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: special ones by name, half characters as the replacement sign."""
    names = {number: name for name, number in tokenizer.special.items()}
    return names.get(token) or tokenizer.bytes_of(token).decode("utf-8", errors="replace")
