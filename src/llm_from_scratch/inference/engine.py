"""Text in, text out: a model and its tokenizer behind one door, for any rung and any number of threads.

One model step at a time holds the lock, so requests take turns token by token. `_tokens` is the only place that knows it: continuous
batching can take its place (all waiting requests in one step) and nothing outside will notice. What it cannot do is wait in line,
time out or refuse on load; that is `serving`'s business.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.inference.decoding import prompt_limit
from llm_from_scratch.inference.quantize import KINDS, load_bundle
from llm_from_scratch.inference.sampling import Sampling, generate
from llm_from_scratch.inference.streaming import TextStream
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.tokenizer import Tokenizer
from llm_from_scratch.tokenizer.chat import Message, render


class PromptTooLong(ValueError):
    """A prompt of `found` tokens for a model that reads `limit`."""

    def __init__(self, found: int, limit: int) -> None:
        super().__init__(f"the prompt is {found} tokens, the model reads at most {limit}; shorten it")
        self.found = found
        self.limit = limit


@dataclass(frozen=True)
class Piece:
    """Text that is final, and the tokens read since the last piece. Only the last piece of an answer has a `finish_reason`.

    `completion_tokens` counts all tokens of the answer so far, those whose text was cut off with a stop string too.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"] | None
    prompt_tokens: int
    completion_tokens: int


class Engine:
    """Completes prompts. Every special token ends an answer: a text never contains one, and a next turn is not ours to write."""

    def __init__(self, model: nn.Module | NGram, tokenizer: Tokenizer) -> None:
        if model.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"the model has {model.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; open both from the same bundle"
            )
        self.model = model.eval() if isinstance(model, nn.Module) else model
        self.tokenizer = tokenizer
        self._ends = frozenset(tokenizer.special.values())
        self._turn = threading.Lock()

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> Engine:
        """The engine of a bundle. `verify` reads every byte first; leave it out only where that was just done. Raises BundleError."""
        if verify:
            bundle.verify(folder, *KINDS)
        return cls(load_bundle(folder), tokenizer.load(folder))

    def complete(self, prompt: str | Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """What follows `prompt` (text or token ids), piece by piece. At the call, before any work, it raises PromptTooLong, and ValueError
        for ids that are no tokens.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if odd := [token for token in ids if not 0 <= token < self.tokenizer.vocab_size]:
            raise ValueError(f"token id {odd[0]} is not one of the vocabulary's {self.tokenizer.vocab_size}; encode with this tokenizer")
        limit = prompt_limit(self.model)
        if limit is not None and len(ids) > limit:
            raise PromptTooLong(len(ids), limit)
        return self._pieces(ids, sampling)

    def chat(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[Piece]:
        """The assistant's answer to `messages`. Raises PromptTooLong at the call."""
        ids, _ = render(messages, self.tokenizer, prompt=True)
        return self.complete(ids, sampling)

    def _pieces(self, prompt: list[int], sampling: Sampling) -> Iterator[Piece]:
        stream = TextStream(sampling.stop)
        fresh: list[int] = []
        done = 0
        rest = ""
        for token in self._tokens(prompt, sampling):
            done += 1
            fresh.append(token)
            text = stream.feed(self.tokenizer.bytes_of(token))
            if stream.stopped:
                rest = text
                break
            if text:
                yield Piece(text, tuple(fresh), None, len(prompt), done)
                fresh = []
        rest += stream.finish()
        ended = stream.stopped or done < sampling.max_tokens
        yield Piece(rest, tuple(fresh), "stop" if ended else "length", len(prompt), done)

    def _tokens(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        tokens = generate(self.model, prompt, sampling, self.tokenizer.eot, self._ends)
        while True:
            with self._turn:
                token = next(tokens, None)
            if token is None:
                return
            yield token
