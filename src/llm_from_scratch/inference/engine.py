"""Text in, text out: a model and its tokenizer behind one door, for any rung and any number of threads.

Requests to a gpt or llama share their steps (`batching`). The other rungs keep nothing between tokens that could be shared: their requests
take turns, a token each. What the engine cannot do is time out or refuse on load; that is `serving`'s business.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.inference.batching import CLOSED, Batcher, Batching, Drawn, Stats
from llm_from_scratch.inference.decoding import decoder, prompt_limit
from llm_from_scratch.inference.quantize import KINDS, load_bundle
from llm_from_scratch.inference.sampling import Sampling, TokenLogprob, drawn, log_probability
from llm_from_scratch.inference.streaming import TextStream
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.tokenizer.chat import Message, render

ALONE = Batching(slots=1, prefill_chunk=512)
"""One request at a time, the others wait: what stages and notebooks need."""


class PromptTooLong(ValueError):
    """A prompt of `found` tokens for a model that reads `limit`."""

    def __init__(self, found: int, limit: int) -> None:
        super().__init__(f"the prompt is {found} tokens, the model reads at most {limit}; shorten it")
        self.found = found
        self.limit = limit


@dataclass(frozen=True)
class Piece:
    """Text that is final, and the tokens read since the last piece. Only the last piece of an answer has a `finish_reason`.

    `completion_tokens` counts all tokens of the answer so far, those whose text was cut off with a stop string too. `logprobs` holds one
    for each of `token_ids` where the request asks for them, and nothing otherwise.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"] | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


class Engine:
    """Completes prompts. Every special token ends an answer: a text never contains one, and a next turn is not ours to write."""

    def __init__(self, model: nn.Module | NGram, tokenizer: Tokenizer, batching: Batching | None = None) -> None:
        if model.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"the model has {model.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; open both from the same bundle"
            )
        self.model = model.eval() if isinstance(model, nn.Module) else model
        self.tokenizer = tokenizer
        self._ends = frozenset(tokenizer.special.values())
        self._writer: Batcher | _Turns
        if isinstance(model, nn.Module) and getattr(model, "supports_cache", False):
            self._writer = Batcher(model, batching or ALONE)
        else:
            self._writer = _Turns(model)

    @classmethod
    def open(cls, folder: Path, verify: bool = True, batching: Batching | None = None) -> Engine:
        """The engine of a bundle, whose model learns no more. `verify` reads every byte first; leave it out only where that was just done.

        Raises BundleError.
        """
        if verify:
            bundle.verify(folder, *KINDS)
        model = load_bundle(folder)
        return cls(model.requires_grad_(False) if isinstance(model, nn.Module) else model, tokenizer.load(folder), batching)

    @property
    def prompt_limit(self) -> int | None:
        """How long a prompt may be, in tokens: the model's context, or what a slot holds; None for an n-gram, which reads its end only."""
        return self._writer.limit

    def complete(self, prompt: str | Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """What follows `prompt` (text or token ids), piece by piece; from any number of threads. Closing the iterator ends the work.

        At the call, before any work, it raises PromptTooLong, and ValueError for ids that are no tokens.
        """
        ids = self._checked(self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt))
        self._check_tokens([token for token, _ in sampling.logit_bias])
        return self._pieces(ids, sampling)

    def score(self, ids: Sequence[int], top: int = 0) -> list[TokenLogprob | None]:
        """For each token of a text its log probability given those before, and the `top` likeliest in its place; None for the first.

        Raises PromptTooLong, and ValueError for ids that are no tokens.
        """
        return [None, *self._writer.scores(checked, top)] if (checked := self._checked(list(ids))) else []

    def stats(self) -> Stats:
        """How busy the engine is now."""
        return self._writer.stats()

    def close(self) -> None:
        """Breaks off all requests with an error, and takes no more."""
        self._writer.close()

    def chat(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[Piece]:
        """The assistant's answer to `messages`. Raises PromptTooLong at the call."""
        ids, _ = render(messages, self.tokenizer, prompt=True)
        return self.complete(ids, sampling)

    def _checked(self, ids: list[int]) -> list[int]:
        self._check_tokens(ids)
        limit = self._writer.limit
        if limit is not None and len(ids) > limit:
            raise PromptTooLong(len(ids), limit)
        return ids

    def _check_tokens(self, ids: Sequence[int]) -> None:
        if odd := [token for token in ids if not 0 <= token < self.tokenizer.vocab_size]:
            raise ValueError(f"token id {odd[0]} is not one of the vocabulary's {self.tokenizer.vocab_size}; encode with this tokenizer")

    def _pieces(self, prompt: list[int], sampling: Sampling) -> Iterator[Piece]:
        stream = TextStream(sampling.stop)
        fresh: list[int] = []
        logprobs: list[TokenLogprob] = []
        done = 0
        rest = ""
        with closing(self._writer.tokens(prompt or [self.tokenizer.eot], sampling, self._ends)) as tokens:
            for token, logprob in tokens:
                done += 1
                fresh.append(token)
                logprobs += [] if logprob is None else [logprob]
                text = stream.feed(self.tokenizer.bytes_of(token))
                if stream.stopped:
                    rest = text
                    break
                if text:
                    yield Piece(text, tuple(fresh), None, len(prompt), done, tuple(logprobs))
                    fresh, logprobs = [], []
        rest += stream.finish()
        ended = stream.stopped or done < sampling.max_tokens
        yield Piece(rest, tuple(fresh), "stop" if ended else "length", len(prompt), done, tuple(logprobs))


class _Turns:
    """What a Batcher is, for models that keep nothing between tokens: one step at a time holds the lock, each of one request."""

    def __init__(self, model: nn.Module | NGram) -> None:
        self.model = model
        self.limit = prompt_limit(model)
        self._turn = threading.Lock()
        self._running = 0
        self._generated = 0
        self._closed = False

    def tokens(self, ids: Sequence[int], sampling: Sampling, ends: Collection[int]) -> Generator[Drawn]:
        tokens = drawn(self.model, ids, sampling, ends)
        with self._turn:
            self._running += 1
        try:
            while (found := self._next(tokens)) is not None:
                yield found
        finally:
            with self._turn:
                self._running -= 1

    def scores(self, ids: Sequence[int], top: int) -> list[TokenLogprob]:
        next_logits = decoder(self.model, len(ids))
        with self._turn:
            return [log_probability(next_logits(ids[:place]), ids[place], top) for place in range(1, len(ids))]

    def stats(self) -> Stats:
        return Stats(self._running, 0, 0, 0, self._generated)

    def close(self) -> None:
        self._closed = True

    def _next(self, tokens: Iterator[Drawn]) -> Drawn | None:
        with self._turn:
            if self._closed:
                raise RuntimeError(CLOSED)
            found = next(tokens, None)
            self._generated += found is not None
            return found
