"""The API on plain FastAPI: bytes in, bytes out, and every refusal in OpenAI's shape.

Bodies are read by hand, with a limit, because a framework's own errors have another shape. BentoML wants the app before there is a
model, so the responder may come later: `app.state.responder`. So may the API key that requests must bear: `app.state.key`, "" for none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llm_from_scratch.inference.engine import Piece
from llm_from_scratch.serving.auth import require_key
from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.lane import Job
from llm_from_scratch.serving.openai import Ask, ChatRequest, CompletionRequest, parse
from llm_from_scratch.serving.replies import Reply, frame, model_card, usage
from llm_from_scratch.serving.responder import Responder, unknown_model

ROUTES = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models and POST /ask"
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""For proxies in between, which would keep a stream until it is complete."""


def create_app(responder: Responder | None = None, key: str = "") -> FastAPI:
    """The API. Without a responder it answers 503 until `app.state.responder` is set."""
    app = FastAPI(title="llm-from-scratch", lifespan=_lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.responder = responder
    app.state.key = key
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    app.add_api_route("/", landing_page, methods=["GET"])
    app.add_api_route("/ask", ask, methods=["POST"])
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", get_model, methods=["GET"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_api_route("/v1/{path:path}", unknown_route, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    return app


async def landing_page() -> Response:
    return HTMLResponse(files("llm_from_scratch.serving").joinpath("landing.html").read_text(encoding="utf-8"))


async def list_models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [model_card(_responder(request).limits.model_name)]})


async def get_model(request: Request, name: str) -> Response:
    served = _responder(request).limits.model_name
    if name != served:
        raise unknown_model(name, served)
    return JSONResponse(model_card(served))


async def completions(request: Request) -> Response:
    return await _generate(request, parse(await _body(request), CompletionRequest))


async def chat_completions(request: Request) -> Response:
    return await _generate(request, parse(await _body(request), ChatRequest))


async def ask(request: Request) -> Response:
    question = parse(await _body(request), Ask).question
    job = await _responder(request).ask(question)
    async with _stopped_when_gone(request, job):
        return JSONResponse(await anext(aiter(job)))


async def unknown_route(request: Request) -> Response:
    raise ApiError(404, f"no {request.method} {request.url.path} here; there is {ROUTES}", "unknown_url")


async def _generate(request: Request, asked: CompletionRequest | ChatRequest) -> Response:
    responder = _responder(request)
    job = await responder.respond(asked)
    reply = Reply("chat" if isinstance(asked, ChatRequest) else "completion", asked.model, responder.fingerprint)
    pieces = aiter(job)
    async with _stopped_when_gone(request, job):
        # Whatever fails before the first piece still has a status of its own, in a stream too.
        first = await anext(pieces)
        if not asked.stream:
            return await _whole(reply, first, pieces)
    frames = _frames(reply, first, pieces, asked.include_usage)
    # The task runs when the client left in the middle of a frame: the generator is then not closed until it is collected.
    return StreamingResponse(frames, media_type="text/event-stream", headers=UNBUFFERED, background=BackgroundTask(job.stop))


async def _whole(reply: Reply, first: Piece, rest: AsyncIterator[Piece]) -> Response:
    pieces = [first, *[piece async for piece in rest]]
    last = pieces[-1]
    assert last.finish_reason is not None
    tokens = usage(last.prompt_tokens, last.completion_tokens)
    return JSONResponse(reply.whole("".join(piece.text for piece in pieces), last.finish_reason, tokens))


async def _frames(reply: Reply, first: Piece, rest: AsyncIterator[Piece], include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. An error after the first piece is a frame, and then there is no [DONE]."""
    for opening in reply.opening():
        yield opening
    piece: Piece | None = first
    try:
        while piece is not None:
            if piece.text:
                yield reply.text(piece.text)
            if piece.finish_reason is not None:
                tokens = usage(piece.prompt_tokens, piece.completion_tokens)
                for closing in reply.closing(piece.finish_reason, tokens if include_usage else None):
                    yield closing
            piece = await anext(rest, None)
    except ApiError as error:
        yield frame(error.body())


async def _body(request: Request) -> bytes:
    """The body, read no further than the limit. Raises ApiError 413, and 499 where the client leaves before it is whole."""
    limit = _responder(request).limits.maximum_body_bytes
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise ApiError(413, f"the body is longer than {limit} bytes; send less", "request_too_large")
            parts.append(part)
    except ClientDisconnect:
        raise ApiError(499, "the client left before its request was complete", "client_closed_request") from None
    return b"".join(parts)


@asynccontextmanager
async def _stopped_when_gone(request: Request, job: Job[Any]) -> AsyncIterator[None]:
    """Stops the job when the client hangs up while the block runs; the body must have been read."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.stop()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


def _responder(request: Request) -> Responder:
    """Every way to the model leads through here, and past the key. Raises ApiError 401, and 503 before there is a model."""
    require_key(request.headers.get("Authorization", ""), request.app.state.key)
    responder = request.app.state.responder
    if not isinstance(responder, Responder):
        raise ApiError(503, "the model is still loading; ask again in a moment", "not_ready", retry_after=1)
    return responder


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    if app.state.responder is not None:
        await asyncio.to_thread(app.state.responder.close)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", "http_error")
    return JSONResponse(refusal.body(), error.status_code)


async def _unexpected(request: Request, error: Exception) -> Response:
    """The client learns nothing of our insides; the server's log has the traceback."""
    return JSONResponse(ApiError(500, "the server failed at this request; its log says why", "internal_error").body(), 500)
