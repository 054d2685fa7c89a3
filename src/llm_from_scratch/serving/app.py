"""The API on plain FastAPI: bytes in, bytes out, and every refusal in OpenAI's shape.

Bodies are read by hand, with a limit, because a framework's own errors have another shape. BentoML wants the app before there is a
model, so the responder may come later: `app.state.served`. So may the API key that requests must bear: `app.state.key`, "" for none.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from llm_from_scratch.serving import embedding
from llm_from_scratch.serving.auth import Guard, require_owner
from llm_from_scratch.serving.draining import finish_first
from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.incoming import body_of, responder_of, stopped_when_gone
from llm_from_scratch.serving.lane import Job
from llm_from_scratch.serving.logprobs import Names
from llm_from_scratch.serving.openai import Ask, ChatRequest, CompletionRequest, EmbeddingRequest, Reload, Retrieve
from llm_from_scratch.serving.openapi import document
from llm_from_scratch.serving.parsing import parse
from llm_from_scratch.serving.reloading import OneForAll, Open, Served
from llm_from_scratch.serving.replies import Delta, Reply, frame, merged, model_card
from llm_from_scratch.serving.responder import EMBEDDER, INDEX, MODEL, Responder, unknown_model

ROUTES = "POST /v1/chat/completions, /v1/completions and /v1/embeddings, GET /v1/models, POST /ask and /retrieve, and GET /openapi.json"
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""For proxies in between, which would keep a stream until it is complete."""

log = logging.getLogger(__name__)

INTERNAL = ApiError(500, "the server failed at this request; its log says why", "internal_error")


def create_app(responder: Responder | None = None, key: str = "", open_stored: Open | None = None) -> FastAPI:
    """The API. Without a responder it answers 503 until `app.state.served` has one; `open_stored` is what a reload takes it from."""
    app = FastAPI(title="llm-from-scratch", lifespan=_lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.served = Served(responder, open_stored)
    app.state.key = key
    app.add_middleware(OneForAll, served=app.state.served)
    app.add_middleware(Guard, key=lambda: app.state.key)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    app.add_api_route("/", landing_page, methods=["GET"])
    app.add_api_route("/openapi.json", openapi, methods=["GET"])
    app.add_api_route("/ask", ask, methods=["POST"])
    app.add_api_route("/retrieve", retrieve, methods=["POST"])
    app.add_api_route("/admin/reload", reload, methods=["POST"])
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", get_model, methods=["GET"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_api_route("/v1/embeddings", embeddings, methods=["POST"])
    app.add_api_route("/v1/{path:path}", unknown_route, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    return app


async def landing_page() -> Response:
    return HTMLResponse(files("llm_from_scratch.serving").joinpath("landing.html").read_text(encoding="utf-8"))


async def openapi(request: Request) -> Response:
    return JSONResponse(document(bool(request.app.state.key)))


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": list(_models(responder_of(request)).values())})


async def get_model(request: Request, name: str) -> Response:
    responder = responder_of(request)
    if (card := _models(responder).get(name)) is None:
        raise unknown_model(name, responder.limits.model_name)
    return JSONResponse(card)


async def completions(request: Request) -> Response:
    asked = parse(await body_of(request), CompletionRequest)
    responder = responder_of(request)
    return await _generate(request, asked, responder, await responder.complete(asked), MODEL)


async def chat_completions(request: Request) -> Response:
    asked = parse(await body_of(request), ChatRequest)
    responder = responder_of(request)
    read = (MODEL, INDEX) if asked.documents else (MODEL,)
    return await _generate(request, asked, responder, await responder.chat(asked), *read)


async def ask(request: Request) -> Response:
    question = parse(await body_of(request), Ask).question
    responder = responder_of(request)
    return JSONResponse(await _only(request, await responder.ask(question)), headers=responder.origin(MODEL, INDEX))


async def retrieve(request: Request) -> Response:
    asked = parse(await body_of(request), Retrieve)
    responder = responder_of(request)
    found = await _only(request, await responder.retrieve(asked))
    return JSONResponse({"object": "list", "data": found}, headers=responder.origin(INDEX))


async def embeddings(request: Request) -> Response:
    asked = parse(await body_of(request), EmbeddingRequest)
    responder = responder_of(request)
    vectors, tokens = await _only(request, await responder.embed(asked))
    responder.meter.answered(tokens, 0)
    body = embedding.reply(vectors, tokens, asked.model, asked.encoding_format or "float")
    return JSONResponse(body, headers=responder.origin(EMBEDDER))


async def reload(request: Request) -> Response:
    require_owner(request)
    asked = parse(await body_of(request), Reload)
    try:
        old, new = await request.app.state.served.reload(asked.model)
    except ValueError as error:
        raise ApiError(400, str(error), "invalid_value", param="model") from None
    digests = [responder.digests.get(MODEL) for responder in (new, old)]
    body = {"object": "reload", "digest": digests[0], "previous": digests[1], "changed": new.digests != old.digests}
    return JSONResponse(body, headers=new.origin(MODEL, INDEX))


async def unknown_route(request: Request) -> Response:
    raise ApiError(404, f"no {request.method} {request.url.path} here; there is {ROUTES}", "unknown_url")


async def _generate(
    request: Request, asked: CompletionRequest | ChatRequest, responder: Responder, job: Job[Delta], *read: str
) -> Response:
    """The answer, whole or as a stream; `read` are the parts of the package that it comes from."""
    origin = responder.origin(*read)
    reply = Reply(
        "chat" if isinstance(asked, ChatRequest) else "completion",
        asked.model,
        responder.fingerprint,
        choices=asked.n or 1,
        names=None if asked.alternatives is None else Names(responder.engine.tokenizer),
        include_usage=asked.include_usage,
    )
    batches = _metered(responder, reply, job)
    async with stopped_when_gone(request, job):
        # Whatever fails before the first piece still has a status of its own, in a stream too.
        first = await anext(batches)
        if not asked.stream:
            return JSONResponse(reply.whole(await _whole(first, batches)), headers=origin)
    # The task runs when the client left in the middle of a frame: the generator is then not closed until it is collected.
    frames = _frames(responder, reply, first, batches)
    return StreamingResponse(frames, media_type="text/event-stream", headers=UNBUFFERED | origin, background=BackgroundTask(job.stop))


Batch = dict[int, Delta]
"""What is new of each part, by its place."""


async def _metered(responder: Responder, reply: Reply, job: Job[Delta]) -> AsyncIterator[Batch]:
    """What the job says, all that is ready at once as one delta a part; and what it took, to the meter."""
    began = time.monotonic()
    last: dict[int, float] = {}
    told: Batch = {}
    async for items in job.batches():
        now = time.monotonic()
        batch = {place: merged([delta for part, delta in items if part == place]) for place in dict(items)}
        for place, delta in batch.items():
            if new := delta.completion_tokens - (told[place].completion_tokens if place in told else 0):
                if place in last:
                    responder.meter.next_tokens(now - last[place], new)
                else:
                    responder.meter.first_token(now - began)
                last[place] = now
        told |= batch
        yield batch
    used = reply.counted([told[place] for place in sorted(told)])
    responder.meter.answered(used["prompt_tokens"], used["completion_tokens"])


async def _whole(first: Batch, rest: AsyncIterator[Batch]) -> list[Delta]:
    """All that is said of each part, in their order."""
    said = {place: [delta] for place, delta in first.items()}
    async for batch in rest:
        for place, delta in batch.items():
            said.setdefault(place, []).append(delta)
    return [merged(said[place]) for place in sorted(said)]


async def _frames(responder: Responder, reply: Reply, first: Batch, rest: AsyncIterator[Batch]) -> AsyncIterator[str]:
    """Server-sent events. An error after the first piece is a frame, and then there is nothing more."""
    last: Batch = {}
    batch: Batch | None = first
    try:
        while batch is not None:
            yield "".join(("" if place in last else reply.opening(place)) + reply.more(place, delta) for place, delta in batch.items())
            last |= batch
            batch = await anext(rest, None)
        yield reply.closing([last[place] for place in sorted(last)])
    except ApiError as error:
        responder.meter.refused(error.code)
        yield frame(error.body())
    except Exception:
        log.exception("a stream broke off")
        responder.meter.refused(INTERNAL.code)
        yield frame(INTERNAL.body())


def _models(responder: Responder) -> dict[str, dict[str, Any]]:
    """What is served, by name."""
    parts = {responder.limits.model_name: MODEL, responder.limits.embedding_name: EMBEDDER}
    return {name: model_card(name, responder.digests.get(part)) for name, part in parts.items()}


async def _only(request: Request, job: Job[Any]) -> Any:
    """The one item of a job."""
    async with stopped_when_gone(request, job):
        _, item = await anext(aiter(job))
        return item


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    if threading.current_thread() is threading.main_thread():
        finish_first(app.state.served.lanes)
    yield
    await asyncio.to_thread(app.state.served.close)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    _refused(request, error)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", "http_error")
    return JSONResponse(refusal.body(), error.status_code)


async def _unexpected(request: Request, error: Exception) -> Response:
    """The client learns nothing of our insides; the server's log has the traceback."""
    _refused(request, INTERNAL)
    return JSONResponse(INTERNAL.body(), INTERNAL.status)


def _refused(request: Request, error: ApiError) -> None:
    if (responder := request.app.state.served.now) is not None:
        responder.meter.refused(error.code)
