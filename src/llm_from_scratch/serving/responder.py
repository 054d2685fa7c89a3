"""The model behind the API: requests become jobs in the lane, with every limit checked before the work begins.

It knows nothing of HTTP. One answer is made at a time; see `lane`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_from_scratch import bundle
from llm_from_scratch.inference.decoding import prompt_limit
from llm_from_scratch.inference.engine import Engine, Piece
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.retrieval.rag import answer, prompt_tokens
from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.lane import Check, Job, Lane
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.serving.openai import ChatRequest, CompletionRequest
from llm_from_scratch.tokenizer.chat import render

MODEL, INDEX, EMBEDDER, SERVING = "model", "index", "embedder", "serving.json"
"""What a packaged folder holds: three bundles, and the limits with the digests of the bundles."""


class Responder:
    """Answers requests from one engine and one index. `fingerprint` names the exact weights, as a seed holds only for those."""

    def __init__(self, engine: Engine, index: Index, limits: ServeParams, fingerprint: str) -> None:
        self.engine = engine
        self.index = index
        self.limits = limits
        self.fingerprint = fingerprint
        self.lane = Lane(limits.maximum_waiting, limits.deadline_seconds)
        self._prompt_limit = limits.maximum_prompt_tokens
        self._question_limit = limits.maximum_prompt_tokens
        if (reads := prompt_limit(engine.model)) is not None:
            self._prompt_limit = min(reads, self._prompt_limit)
            self._question_limit = min(reads - limits.default_new_tokens, self._prompt_limit)
        if self._question_limit < 1:
            raise ValueError(
                f"serve.default_new_tokens is {limits.default_new_tokens}, which leaves no room for a question in the {reads} tokens "
                "that the model reads; lower it"
            )

    @classmethod
    def open(cls, folder: Path) -> Responder:
        """The responder of a packaged folder. Raises BundleError as `check_package` does."""
        limits, digests = check_package(folder)
        index = Index.open(folder / INDEX, Embedder.open(folder / EMBEDDER))
        return cls(Engine.open(folder / MODEL, verify=False), index, limits, f"fp_{digests[MODEL][:12]}")

    async def respond(self, request: CompletionRequest | ChatRequest) -> Job[Piece]:
        """The answer to `request`, in the making. Raises ApiError when it asks for too much, or too many are waiting."""
        if request.model != self.limits.model_name:
            raise unknown_model(request.model, self.limits.model_name)
        sampling = request.sampling(self.limits)
        prompt = await asyncio.to_thread(self._prompt, request)
        _check_length(len(prompt), self._prompt_limit)
        return self.lane.submit(lambda check: self.engine.complete(prompt, sampling))

    async def ask(self, question: str) -> Job[dict[str, Any]]:
        """One item, the body of the answer to `question`: the text, the passages it was read from, the model's name.

        Raises ApiError as `respond` does.
        """
        _check_length(await asyncio.to_thread(prompt_tokens, question, [], self.engine.tokenizer), self._question_limit)
        return self.lane.submit(lambda check: self._cited(question, check))

    def close(self) -> None:
        """Breaks off all answers."""
        self.lane.close()

    def _prompt(self, request: CompletionRequest | ChatRequest) -> Sequence[int]:
        tokenizer = self.engine.tokenizer
        if isinstance(request, ChatRequest):
            ids, _ = render([{"role": said.speaker, "content": said.content} for said in request.messages], tokenizer, prompt=True)
            return ids
        if request.prompt is None or isinstance(request.prompt, str):
            return tokenizer.encode(request.prompt or "")
        if wrong := [token for token in request.prompt if not 0 <= token < tokenizer.vocab_size]:
            message = f"prompt: found token {wrong[0]}; this model's tokens are 0 to {tokenizer.vocab_size - 1}"
            raise ApiError(400, message, "invalid_value", param="prompt")
        return request.prompt

    def _cited(self, question: str, check: Check) -> Iterator[dict[str, Any]]:
        sampling = Sampling(temperature=0.0, max_tokens=self.limits.default_new_tokens)
        found = answer(_Interruptible(self.engine, check), self.index, question, self.limits.passages, sampling)
        yield {"answer": found.text, "citations": [asdict(source) for source in found.citations], "model": self.limits.model_name}


class _Interruptible(Engine):
    """The same engine, breaking off in the middle of an answer when `check` raises."""

    def __init__(self, engine: Engine, check: Check) -> None:
        super().__init__(engine.model, engine.tokenizer)
        self._engine = engine
        self._check = check

    def complete(self, prompt: str | Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        for piece in self._engine.complete(prompt, sampling):
            self._check()
            yield piece


def check_package(folder: Path) -> tuple[ServeParams, dict[str, str]]:
    """The limits and the digests of the parts, as `package` wrote them, after reading every byte of every part.

    Raises BundleError when a part is missing, damaged, or not the one that was packaged.
    """
    try:
        fields = json.loads((folder / SERVING).read_text(encoding="utf-8"))
        limits, digests = ServeParams.model_validate(fields["serve"]), {part: fields["digests"][part] for part in (MODEL, INDEX, EMBEDDER)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise bundle.BundleError(f"{folder / SERVING}: not what package writes ({error}); package it again") from None
    for part, digest in digests.items():
        if (found := bundle.verify(folder / part).digest) != digest:
            raise bundle.BundleError(f"{folder / part}: found {found[:12]}…, but {digest[:12]}… was packaged; package it again")
    return limits, digests


def unknown_model(found: str, served: str) -> ApiError:
    """For a request that names a model which is not here."""
    return ApiError(404, f"no model {found[:60]!r} here; there is '{served}'", "model_not_found", param="model")


def _check_length(found: int, limit: int) -> None:
    if found > limit:
        raise ApiError(400, f"the prompt is {found} tokens, and no more than {limit} are read; shorten it", "context_length_exceeded")
