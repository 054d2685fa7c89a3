"""From a prompt to the deltas of its answer: the engine's pieces, with the prompt before them where it is echoed."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from llm_from_scratch.inference.engine import Engine, Piece
from llm_from_scratch.inference.sampling import Sampling, TokenLogprob
from llm_from_scratch.serving.lane import Check
from llm_from_scratch.serving.replies import Delta


@dataclass(frozen=True)
class Prompt:
    """Ids to continue: `echo` puts their text before the answer, and without `written` that is all there is."""

    ids: list[int]
    echo: bool = False
    written: bool = True


class Interruptible(Engine):
    """The same engine, breaking off in the middle of an answer when `check` raises."""

    def __init__(self, engine: Engine, check: Check) -> None:
        vars(self).update(vars(engine))  # and not what Engine does, which would take a cache's memory again
        self._check = check

    def complete(self, prompt: str | Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        with closed_after(super().complete(prompt, sampling)) as pieces:
            for piece in pieces:
                self._check()
                yield piece


def continued(engine: Engine, prompt: Prompt, sampling: Sampling, check: Check) -> Iterator[Delta]:
    """What the engine says after `prompt`, a delta a piece."""
    offset = 0
    if prompt.echo:
        echoed = _echoed(engine, prompt.ids, sampling.logprobs)
        offset = len(echoed.text)
        yield echoed if prompt.written else Delta(echoed.text, 0, echoed.tokens, "length", len(prompt.ids), 0)
    if not prompt.written:
        return
    said: list[int] = []
    with closed_after(engine.complete(prompt.ids, sampling)) as pieces:
        for piece in pieces:
            said += piece.token_ids
            tokens: tuple[tuple[int, TokenLogprob | None], ...] = tuple((drawn.token_id, drawn) for drawn in piece.logprobs)
            if piece.finish_reason == "stop" and prompt.echo and sampling.logprobs is not None and not sampling.stop:
                tokens += (_end(engine, [*prompt.ids, *said], sampling.logprobs),)
            yield Delta(piece.text, offset, tokens, piece.finish_reason, piece.prompt_tokens, piece.completion_tokens)
            offset += len(piece.text)


def closed_after(pieces: Iterator[Piece]) -> closing[Generator[Piece, None, None]]:
    """For a `with`: the engine's slot is free as soon as it ends, and not when the iterator is collected."""
    assert isinstance(pieces, Generator)
    return closing(pieces)


def _echoed(engine: Engine, ids: list[int], alternatives: int | None) -> Delta:
    tokens = () if alternatives is None else tuple(zip(ids, engine.score(ids, alternatives), strict=True))
    return Delta(engine.tokenizer.decode(ids), 0, tokens, None, len(ids), 0)


def _end(engine: Engine, ids: list[int], alternatives: int) -> tuple[int, TokenLogprob | None]:
    """The end of the text as a token of its own: who scores a text by its echo counts on the answer to have as many tokens as asked for."""
    whole = [*ids, engine.tokenizer.eot]
    return engine.tokenizer.eot, engine.score(whole[-(engine.prompt_limit or len(whole)) :], alternatives)[-1]
