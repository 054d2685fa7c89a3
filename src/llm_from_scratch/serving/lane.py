"""One model, one thread, one answer at a time: the rest wait in line, and the line has an end.

The event loop never generates, and the thread never waits for a client: an answer goes into a queue that holds all of it, so a
slow reader does not hold up the line. What it cannot do is answer two at once; batching belongs in the engine.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from llm_from_scratch.serving.errors import ApiError

T = TypeVar("T")

Check = Callable[[], None]
"""Raises when nobody waits for the answer any more; long work calls it now and then."""

Produce = Callable[[Check], Iterable[T]]


class _End:
    """The last thing a job says: it is done, or this went wrong."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error


class Job(Generic[T]):
    """An answer in the making: iterate it once for its items, `stop` it when nobody wants them any more."""

    def __init__(self, produce: Produce[T], deadline_seconds: float) -> None:
        self._produce = produce
        self._loop = asyncio.get_running_loop()
        self._deadline_seconds = deadline_seconds
        self._deadline = self._loop.time() + deadline_seconds
        self._items: asyncio.Queue[T | _End] = asyncio.Queue()
        self._stop = threading.Event()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """Ends the work before its next item, or before it begins. From any thread, at any time."""
        self._stop.set()

    async def __aiter__(self) -> AsyncIterator[T]:
        """The items as they come. Raises ApiError 503 at the deadline, 499 when stopped, and whatever the work raised."""
        try:
            while not isinstance(item := await self._next(), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            self.stop()

    def work(self) -> None:
        """Makes the items, in the lane's thread."""
        end = _End(None)
        try:
            self._check()
            for item in self._produce(self._check):
                self._put(item)
                self._check()
        except Exception as error:
            end = _End(error)
        self._put(end)

    async def _next(self) -> T | _End:
        try:
            return await asyncio.wait_for(self._items.get(), self._deadline - self._loop.time())
        except TimeoutError:
            message = f"no complete answer after {self._deadline_seconds:g} s; ask for fewer tokens, or again when it is quieter"
            raise ApiError(503, message, "deadline_exceeded", retry_after=1) from None

    def _check(self) -> None:
        if self.stopped:
            raise ApiError(499, "the client left before the answer was complete", "client_closed_request")

    def _put(self, item: T | _End) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


class Lane:
    """Where jobs are taken in, first come, first served."""

    def __init__(self, maximum_waiting: int, deadline_seconds: float) -> None:
        self._maximum_waiting = maximum_waiting
        self._deadline_seconds = deadline_seconds
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        self._jobs: set[Job[Any]] = set()
        self._last_seconds = 0.0

    def submit(self, produce: Produce[T]) -> Job[T]:
        """A job for what `produce` yields, begun when its turn comes. Raises ApiError 429 when the line is full."""
        wanted = sum(not job.stopped for job in list(self._jobs))
        if wanted > self._maximum_waiting:
            message = f"{wanted - 1} requests are waiting already, and no more than {self._maximum_waiting} may; send it again later"
            raise ApiError(429, message, "too_many_waiting", retry_after=max(1, math.ceil(self._last_seconds)))
        job = Job(produce, self._deadline_seconds)
        self._jobs.add(job)
        self._thread.submit(self._run, job)
        return job

    def close(self) -> None:
        """Stops all jobs and waits for the thread to end."""
        for job in list(self._jobs):
            job.stop()
        self._thread.shutdown(cancel_futures=True)

    def _run(self, job: Job[Any]) -> None:
        begin = time.monotonic()
        try:
            job.work()
        finally:
            self._jobs.discard(job)
            self._last_seconds = time.monotonic() - begin
