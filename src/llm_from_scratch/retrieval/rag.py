"""Retrieval-augmented generation: retrieve, put what was found before the question, generate, and say what was read.

Passages take the form they had in training (`data.chat`): whole sentences that share the room of one passage. What does not fit the model's
context is trimmed or left out, never the question. A small model cannot mark which source a word came from, so the citations are the
passages it was given, numbered in their order, no more and no fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_from_scratch.data.chat import PASSAGE_CHARACTERS, passage, question_messages
from llm_from_scratch.inference.decoding import prompt_limit
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.retrieval.index import Hit, Index
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.tokenizer.chat import render

FEWEST_WORDS = 8  # a passage trimmed below this says too little to be worth its tokens


@dataclass(frozen=True)
class Citation:
    """A source that was in the prompt: its place there, from 1, and `text` as the model read it, trimmed or not."""

    number: int
    title: str
    text: str
    document: str
    score: float


@dataclass(frozen=True)
class Answer:
    """What was generated, and from what. `finish_reason` "length" means it was cut off."""

    text: str
    citations: tuple[Citation, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


def answer(engine: Engine, index: Index, question: str, k: int, sampling: Sampling) -> Answer:
    """The engine's answer to `question`, having read the best `k` passages, or as many as fit beside `sampling.max_tokens`.

    Raises ValueError when the question is empty or alone does not fit.
    """
    hits = index.search(question, k)
    limit = prompt_limit(engine.model)
    room = None if limit is None else limit - sampling.max_tokens
    texts = fit_passages(question, [hit.passage.text for hit in hits], engine.tokenizer, room)
    pieces = list(engine.chat(question_messages(question, texts), sampling))
    last = pieces[-1]
    assert last.finish_reason is not None
    return Answer(
        text="".join(piece.text for piece in pieces).strip(),
        citations=_cited(hits, texts),
        finish_reason=last.finish_reason,
        prompt_tokens=last.prompt_tokens,
        completion_tokens=last.completion_tokens,
    )


def fit_passages(question: str, texts: Sequence[str], tokenizer: Tokenizer, room: int | None) -> list[str]:
    """The first of `texts`, best first, that make a prompt of at most `room` tokens (None: any) with `question`; the last may be trimmed.

    Raises ValueError when the question is empty or alone does not fit.
    """
    if not question.strip():
        raise ValueError("the question is empty; ask something")
    kept = [passage(text, PASSAGE_CHARACTERS // len(texts)) for text in texts]
    if room is None:
        return kept
    while prompt_tokens(question, kept, tokenizer) > room:
        if not kept:
            alone = prompt_tokens(question, [], tokenizer)
            raise ValueError(f"the question is {alone} tokens, but {max(room, 0)} fit before the answer; ask a shorter one, or for less")
        *kept, last = kept
        if trimmed := _trimmed(question, kept, last, tokenizer, room):
            kept.append(trimmed)
    return kept


def prompt_tokens(question: str, texts: Sequence[str], tokenizer: Tokenizer) -> int:
    """How many tokens a prompt with these passages takes."""
    return len(render(question_messages(question, texts), tokenizer, prompt=True)[0])


def _trimmed(question: str, before: list[str], text: str, tokenizer: Tokenizer, room: int) -> str:
    """As many first words of `text` as fit, found by halving; nothing where they would be too few."""
    words = text.split(" ")
    fits, over = 0, len(words)
    while over - fits > 1:
        middle = (fits + over) // 2
        if prompt_tokens(question, [*before, " ".join(words[:middle])], tokenizer) <= room:
            fits = middle
        else:
            over = middle
    return " ".join(words[:fits]) if fits >= FEWEST_WORDS else ""


def _cited(hits: Sequence[Hit], texts: Sequence[str]) -> tuple[Citation, ...]:
    """Only as many as there are `texts`: a hit that did not fit was not read."""
    read = zip(hits, texts, strict=False)
    return tuple(Citation(number, hit.passage.title, text, hit.passage.document, hit.score) for number, (hit, text) in enumerate(read, 1))
