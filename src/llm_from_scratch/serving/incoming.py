"""What every route does with a request: finds its model, reads its body, and notices that its client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.lane import Job
from llm_from_scratch.serving.responder import Responder


def responder_of(request: Request) -> Responder:
    """Every way to the model leads through here. Raises ApiError 503 before there is one."""
    responder = getattr(request.state, "responder", None)
    if not isinstance(responder, Responder):
        raise ApiError(503, "the model is still loading; ask again in a moment", "not_ready", retry_after=1)
    return responder


async def body_of(request: Request) -> bytes:
    """The body, read no further than the limit. Raises ApiError 413, and 499 where the client leaves before it is whole."""
    limit = responder_of(request).limits.maximum_body_bytes
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
async def stopped_when_gone(request: Request, job: Job[Any]) -> AsyncIterator[None]:
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
