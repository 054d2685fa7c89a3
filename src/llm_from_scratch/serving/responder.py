"""The model behind the API: requests become jobs in a lane, with every limit checked before the work begins.

It knows nothing of HTTP. Answers are made in one lane, `slots` at a time; passages are looked up and texts embedded in another, one at a
time, so that a search does not wait for somebody's long answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from llm_from_scratch import bundle
from llm_from_scratch.inference.batching import Batching
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.retrieval.embed import Vectors
from llm_from_scratch.retrieval.index import Hit, Index
from llm_from_scratch.retrieval.rag import answer, answering, form_of, prompt_tokens
from llm_from_scratch.serving.answers import Interruptible, Prompt, continued
from llm_from_scratch.serving.documents import annotations_of, citations_of, hits_of
from llm_from_scratch.serving.embedding import SharedEmbedder, counted
from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.lane import Check, Job, Lane
from llm_from_scratch.serving.limits import ServeParams
from llm_from_scratch.serving.metrics import Meter
from llm_from_scratch.serving.openai import ChatRequest, CompletionRequest, EmbeddingRequest, Retrieve
from llm_from_scratch.serving.replies import Delta
from llm_from_scratch.tokenizer.chat import render

MODEL, INDEX, EMBEDDER, RUNGS, SERVING = "model", "index", "embedder", "rungs", "serving.json"
"""What a packaged folder holds: three bundles, the smaller models of the ladder, and the limits with the digests of the bundles."""

ORIGIN = {MODEL: "X-Bundle-Digest", INDEX: "X-Index-Digest", EMBEDDER: "X-Embedder-Digest"}
"""The response headers that say which bundles an answer came from; `python -m stages whence` takes what is in them."""


class Responder:
    """Answers requests from one engine and one index. `fingerprint` names the exact weights, as a seed holds only for those.

    `rungs` are the models of the ladder that came with it, for the page to show, in their order. `digests` are those of the parts that were
    packaged; parts without one are served without saying where they come from.
    """

    def __init__(
        self,
        engine: Engine,
        index: Index,
        limits: ServeParams,
        fingerprint: str,
        rungs: Mapping[str, Engine] | None = None,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self.index = index
        self.limits = limits
        self.fingerprint = fingerprint
        self.rungs = dict(rungs or {})
        self.digests = dict(digests or {})
        self.meter = Meter()
        self.users = 0  # requests that hold it: it is not closed under them
        self.lane = Lane(limits.slots, limits.maximum_waiting, limits.deadline_seconds, self.report)
        self.search_lane = Lane(1, limits.maximum_waiting, limits.deadline_seconds)
        self._prompt_limit = limits.maximum_prompt_tokens
        self._question_limit = limits.maximum_prompt_tokens
        if (reads := engine.prompt_limit) is not None:
            self._prompt_limit = min(reads, self._prompt_limit)
            self._question_limit = min(reads - limits.default_new_tokens, self._prompt_limit)
        if self._question_limit < 1:
            raise ValueError(
                f"serve.default_new_tokens is {limits.default_new_tokens}, which leaves no room for a question in the {reads} tokens "
                "that the model reads; lower it"
            )

    @classmethod
    def open(cls, folder: Path, beside: Responder | None = None) -> Responder:
        """The responder of a packaged folder; of index, embedder and rungs, what is the same in `beside`, by digest, is not opened again.

        Raises BundleError as `check_package` does.
        """
        limits, digests = check_package(folder)
        same = {part for part, digest in digests.items() if beside and beside.digests.get(part) == digest}
        embedder = beside.index.embedder if beside and EMBEDDER in same else SharedEmbedder.open(folder / EMBEDDER)
        index = beside.index if beside and {INDEX, EMBEDDER} <= same else Index.open(folder / INDEX, embedder)
        rungs = {
            name: beside.rungs[name] if beside and part in same else Engine.open(folder / part, verify=False)
            for part in digests
            if (name := part.removeprefix(f"{RUNGS}/")) != part
        }
        engine = Engine.open(folder / MODEL, verify=False, batching=Batching(slots=limits.slots, prefill_chunk=limits.prefill_chunk))
        return cls(engine, index, limits, f"fp_{digests[MODEL][:12]}", rungs, digests)

    def origin(self, *parts: str) -> dict[str, str]:
        """Response headers: the digests of the `parts` (MODEL, INDEX, EMBEDDER) that an answer came from."""
        return {ORIGIN[part]: self.digests[part] for part in parts if part in self.digests}

    async def complete(self, request: CompletionRequest) -> Job[Delta]:
        """A part for each prompt and each of its `n` answers. Raises ApiError when it asks for too much, or too many are waiting."""
        self._check_model(request.model, self.limits.model_name)
        samplings = request.sampling(self.limits)
        if (wanted := len(request.prompt) * len(samplings)) > self.limits.maximum_choices:
            message = f"{wanted} answers are wanted, more than the {self.limits.maximum_choices} of one request; send fewer prompts"
            raise ApiError(400, message, "invalid_value", param="prompt")
        prompts = await asyncio.to_thread(lambda: [self._prompt(prompt) for prompt in request.prompt])
        echo, written = bool(request.echo), request.max_tokens != 0
        return self._submit([Prompt(ids, echo, written) for ids in prompts], samplings)

    async def chat(self, request: ChatRequest) -> Job[Delta]:
        """A part for each of the `n` answers. Raises ApiError as `complete` does."""
        self._check_model(request.model, self.limits.model_name)
        samplings = request.sampling(self.limits)
        if request.documents:
            return await self._read(request.messages[-1].content, samplings[0])
        messages = [{"role": said.speaker, "content": said.content} for said in request.messages]
        ids, _ = await asyncio.to_thread(render, messages, self.engine.tokenizer, prompt=True)
        return self._submit([Prompt(ids)], samplings)

    async def ask(self, question: str) -> Job[dict[str, Any]]:
        """One item, the body of the answer to `question`: the text, whether it is in the documents, what it cites, the model's name.

        Raises ApiError as `complete` does.
        """
        await self._check_question(question, self.limits.default_new_tokens)
        sampling = Sampling(temperature=0.0, max_tokens=self.limits.default_new_tokens)
        return self.lane.submit(lambda check: self._asked(question, sampling, check))

    async def retrieve(self, request: Retrieve) -> Job[list[dict[str, Any]]]:
        """One item, the passages. Raises ApiError as `complete` does."""
        k = request.k or self.limits.passages
        if k > self.limits.maximum_passages:
            message = f"k is {k}, more than the {self.limits.maximum_passages} passages that this server gives; ask for fewer"
            raise ApiError(400, message, "invalid_value", param="k")
        return self.search_lane.submit(lambda check: [hits_of(self._found(request, k))])

    async def embed(self, request: EmbeddingRequest) -> Job[tuple[Vectors, int]]:
        """One item: a unit vector for each text, and how many tokens they are. Raises ApiError as `complete` does."""
        self._check_model(request.model, self.limits.embedding_name)
        if len(request.input) > self.limits.maximum_inputs:
            message = f"found {len(request.input)} texts, more than the {self.limits.maximum_inputs} of one request; send them in parts"
            raise ApiError(400, message, "invalid_value", param="input")
        return self.search_lane.submit(lambda check: [self._embedded(request.input, check)])

    def close(self) -> None:
        """Breaks off all answers."""
        self.lane.close()
        self.search_lane.close()

    def report(self) -> None:
        """Tells the meter how busy it is; the lane asks for it whenever somebody came or is done."""
        self.meter.load(self, self.lane.waiting, self.engine.stats())

    def _submit(self, prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> Job[Delta]:
        words = self.engine.tokenizer.vocab_size
        for token, _ in samplings[0].logit_bias:
            if token >= words:
                message = f"logit_bias: found token {token}; this model's tokens are 0 to {words - 1}"
                raise ApiError(400, message, "invalid_value", param="logit_bias")
        for prompt in prompts:
            _check_length(len(prompt.ids), self._prompt_limit)
        return self.lane.submit(*(partial(continued, self.engine, prompt, sampling) for prompt in prompts for sampling in samplings))

    async def _read(self, question: str, sampling: Sampling) -> Job[Delta]:
        await self._check_question(question, sampling.max_tokens)
        return self.lane.submit(lambda check: self._annotated(question, sampling, check))

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self.engine.tokenizer
        if isinstance(prompt, str):
            return tokenizer.encode(prompt)
        if wrong := [token for token in prompt if token >= tokenizer.vocab_size]:
            message = f"prompt: found token {wrong[0]}; this model's tokens are 0 to {tokenizer.vocab_size - 1}"
            raise ApiError(400, message, "invalid_value", param="prompt")
        return prompt

    def _asked(self, question: str, sampling: Sampling, check: Check) -> Iterator[dict[str, Any]]:
        given = answer(Interruptible(self.engine, check), self.index, question, self.limits.passages, sampling)
        self.meter.answered(given.prompt_tokens, given.completion_tokens)
        cited = citations_of(given.citations)
        yield {"answer": given.text, "found": given.found, "citations": cited, "model": self.limits.model_name}

    def _annotated(self, question: str, sampling: Sampling, check: Check) -> Iterator[Delta]:
        """The answer, of which each delta is final; what it cites is known once it is complete, so the last one has that."""
        said = 0
        with closing(answering(Interruptible(self.engine, check), self.index, question, self.limits.passages, sampling)) as growing:
            for given in growing:
                yield Delta(
                    text=given.text[said:],
                    offset=said,
                    finish_reason=given.finish_reason,
                    prompt_tokens=given.prompt_tokens,
                    completion_tokens=given.completion_tokens,
                    annotations=annotations_of(given.text, given.citations) if given.finish_reason else None,
                )
                said = len(given.text)

    def _found(self, request: Retrieve, k: int) -> list[Hit]:
        try:
            return self.index.search(request.query, k, request.mode or "fused", request.filters)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value", param="filters") from None

    def _embedded(self, texts: Sequence[str], check: Check) -> tuple[Vectors, int]:
        embedder = self.index.embedder
        tokens = counted(embedder, texts)
        return embedder.embed(texts, progress=lambda done: check()), tokens

    def _check_model(self, found: str, served: str) -> None:
        if found != served:
            raise unknown_model(found, served)

    async def _check_question(self, question: str, new_tokens: int) -> None:
        """The question is held against what the server takes, and with all that goes around it against what the model reads."""
        reads, tokenizer = self.engine.prompt_limit, self.engine.tokenizer
        _check_length(await asyncio.to_thread(prompt_tokens, question, [], tokenizer), self._prompt_limit)
        if reads is not None:
            _check_length(await asyncio.to_thread(prompt_tokens, question, [], tokenizer, form_of(tokenizer)), reads - new_tokens)


def check_package(folder: Path) -> tuple[ServeParams, dict[str, str]]:
    """The limits and the digests of the parts, as `package` wrote them, after reading every byte of every part.

    Raises BundleError when a part is missing, damaged, or not the one that was packaged.
    """
    try:
        fields = json.loads((folder / SERVING).read_text(encoding="utf-8"))
        limits = ServeParams.model_validate(fields["serve"])
        digests = {str(part): str(digest) for part, digest in fields["digests"].items()}
        if missing := {MODEL, INDEX, EMBEDDER} - set(digests):
            raise ValueError(f"it names no {min(missing)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
