"""Which model answers, and how another takes its place with nobody cut off.

The new one is opened beside the old one, which answers meanwhile. What comes after that is the new one's; what has begun ends on the old
one, which is closed once nobody holds it any more. For that while both are in memory, and never a third: who asks for one has to wait.
Of an index, an embedder or a rung that is the same in both, one is in memory (`Responder.open`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context

from starlette.types import ASGIApp, Receive, Scope, Send

from llm_from_scratch.serving.errors import ApiError
from llm_from_scratch.serving.lane import Lane
from llm_from_scratch.serving.responder import Responder

Open = Callable[[str | None], Responder]
"""Opens a stored model by its tag, None for the one stored last. Raises ApiError or ValueError in one line."""


class Served:
    """The responder that answers `now`, None before there is one, and the one that leaves. `open_stored` where there are others to take."""

    def __init__(self, now: Responder | None = None, open_stored: Open | None = None) -> None:
        self.now = now
        self.open_stored = open_stored
        self._leaving: Responder | None = None
        self._opening = False
        self._parting: asyncio.Task[None] | None = None

    def lanes(self) -> list[Lane]:
        """Where somebody may be waiting."""
        here = [responder for responder in (self.now, self._leaving) if responder is not None]
        return [lane for responder in here for lane in (responder.lane, responder.search_lane)]

    @contextmanager
    def use(self) -> Iterator[Responder]:
        """The responder that answers now, which is not closed before the block ends. Raises ApiError 503 where there is none yet."""
        if (responder := self.now) is None:
            raise ApiError(503, "the model is still loading; ask again in a moment", "not_ready", retry_after=1)
        responder.users += 1
        try:
            yield responder
        finally:
            responder.users -= 1

    async def reload(self, tag: str | None) -> tuple[Responder, Responder]:
        """Puts the stored model `tag` in the place of the one that answers; returns the old one and the new one.

        Raises ApiError, 409 while the last reload is not over, and what `open_stored` raises; the old one then answers as before.
        """
        if (old := self.now) is None or self.open_stored is None:
            raise ApiError(404, "there is no store of models behind this server; python -m pipelines serve has one", "no_store")
        if self._opening or self._leaving is not None:
            message = "another reload is going on, or answers of the model before it are; send it again in a moment"
            raise ApiError(409, message, "reload_in_progress", retry_after=1)
        self._opening = True
        try:
            new = await asyncio.to_thread(self.open_stored, tag)
        finally:
            self._opening = False
        if old.lane.draining:
            new.close()
            raise ApiError(503, "the server is going down and takes no other model", "shutting_down", retry_after=1)
        new.meter = old.meter
        self.now, self._leaving = new, old
        new.report()
        # In a context of its own: that of the request leads to the model that leaves, and a task keeps its context.
        self._parting = asyncio.get_running_loop().create_task(self._part(), context=Context())
        return old, new

    def close(self) -> None:
        """Breaks off all answers."""
        for responder in (self.now, self._leaving):
            if responder is not None:
                responder.close()

    async def _part(self) -> None:
        """Closes the one that leaves once its last answer is read, or was made long ago: by twice its deadline they all are."""
        assert self._leaving is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(2 * self._leaving.limits.deadline_seconds):
                while self._leaving.users:
                    await asyncio.sleep(0.05)
                for lane in (self._leaving.lane, self._leaving.search_lane):
                    await lane.idle()
        await asyncio.to_thread(self._leaving.close)
        self._leaving = None
        if self.now is not None:
            self.now.report()  # without the one that is gone


class OneForAll:
    """ASGI middleware: a request sees one responder from its first byte to the last of its answer, at `request.state.responder`."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self.app = app
        self.served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.served.now is None:
            return await self.app(scope, receive, send)
        with self.served.use() as responder:
            state = scope.setdefault("state", {})
            state["responder"] = responder
            try:
                await self.app(scope, receive, send)
            finally:
                del state["responder"]  # an idle connection keeps the scope of its last request
