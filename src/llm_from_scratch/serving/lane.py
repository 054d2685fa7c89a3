"""Where requests wait for the model: as many are worked on as the engine has slots, the rest stand in line, and the line has an end.

The event loop never generates, and a worker never waits for a client: an answer goes into a list that holds all of it, so a slow reader
holds up nobody. A job may have several parts (choices of one request), each in a slot of its own. Which of them share a step of the model
is not decided here: the engine puts together whatever is asked of it at the same time.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

from llm_from_scratch.serving.errors import ApiError

T = TypeVar("T")

Check = Callable[[], None]
"""Raises when nobody waits for the answer any more; long work calls it now and then."""

Produce = Callable[[Check], Iterable[T]]

LONGEST_RETRY = 60
"""Seconds: whoever is sent away should not have to guess for longer."""


def quiet() -> None:
    """Nobody is told."""


class Job(Generic[T]):
    """An answer in the making, in one part or more: iterate it once for (part, item), `stop` it when nobody wants them any more."""

    def __init__(self, parts: tuple[Produce[T], ...], deadline_seconds: float) -> None:
        self._parts = parts
        self._loop = asyncio.get_running_loop()
        self._deadline_seconds = deadline_seconds
        self._deadline = self._loop.time() + deadline_seconds
        self._ready: deque[tuple[int, T]] = deque()
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._told = False
        self._stop = threading.Event()
        self._change = threading.Lock()
        self._waiting = self._unfinished = len(parts)

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    @property
    def waiting(self) -> int:
        """How many parts stand in line and are still wanted."""
        return 0 if self.stopped else self._waiting

    @property
    def running(self) -> int:
        """How many parts are being worked on."""
        return self._unfinished - self._waiting

    @property
    def unfinished(self) -> int:
        """How many parts are not complete yet."""
        return self._unfinished

    @property
    def done(self) -> bool:
        return self._unfinished == 0

    def stop(self) -> None:
        """Ends the work before its next item, or before it begins. From any thread, at any time."""
        self._stop.set()
        self._tell()

    async def __aiter__(self) -> AsyncIterator[tuple[int, T]]:
        """Item by item; else as `batches`."""
        async for batch in self.batches():
            for item in batch:
                yield item

    async def batches(self) -> AsyncIterator[list[tuple[int, T]]]:
        """(part, item) as they come, all that are ready at once: a loop that falls behind catches up in fewer, longer steps.

        Raises ApiError 503 at the deadline, 499 when stopped, and whatever the work raised.
        """
        try:
            while True:
                done = self.done  # asked first: what was made before the end is then in `_ready`
                if batch := [self._ready.popleft() for _ in range(len(self._ready))]:
                    yield batch
                if done or self.stopped:
                    break
                await self._more()
            if self._error is not None:
                raise self._error
            if not done:
                raise _left()
        finally:
            self.stop()

    def work(self, part: int) -> None:
        """Makes the items of a part, in a worker's thread. What goes wrong in one part ends the others."""
        with self._change:
            self._waiting -= 1
        try:
            self._check()
            for item in self._parts[part](self._check):
                self._ready.append((part, item))
                self._tell()
                self._check()
        except Exception as error:
            with self._change:
                self._error = self._error or error
            self.stop()
        finally:
            with self._change:
                self._unfinished -= 1
            self._tell()

    async def _more(self) -> None:
        """Waits for news until the deadline."""
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._news.wait()
        except TimeoutError:
            pass
        if self._loop.time() >= self._deadline and not self.done:
            message = f"no complete answer after {self._deadline_seconds:g} s; ask for fewer tokens, or again when it is quieter"
            raise ApiError(503, message, "deadline_exceeded", retry_after=1)
        self._news.clear()

    def _check(self) -> None:
        if self.stopped:
            raise _left()

    def _tell(self) -> None:
        """Wakes the reader: once for all that is ready when it comes round."""
        if not self._told and not self._loop.is_closed():
            self._told = True
            self._loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        self._told = False
        self._news.set()


class Lane:
    """Where jobs are taken in, first come, first served, `workers` at a time."""

    def __init__(self, workers: int, maximum_waiting: int, deadline_seconds: float, changed: Callable[[], None] = quiet) -> None:
        """`changed` is called from any thread when somebody came or is done."""
        self._workers = workers
        self._maximum_waiting = maximum_waiting
        self._deadline_seconds = deadline_seconds
        self._threads = ThreadPoolExecutor(workers, "generate", torch.set_num_threads, (torch.get_num_threads(),))
        self._jobs: set[Job[Any]] = set()
        self._last_seconds = 0.0
        self._draining = False
        self._changed = changed

    @property
    def waiting(self) -> int:
        return sum(job.waiting for job in list(self._jobs))

    @property
    def running(self) -> int:
        return sum(job.running for job in list(self._jobs))

    @property
    def draining(self) -> bool:
        return self._draining

    def submit(self, *parts: Produce[T]) -> Job[T]:
        """A job for what `parts` yield, each begun when its turn comes; all of them or none are taken in.

        Raises ApiError 429 when the line is full, and 503 when the server is going down.
        """
        if self._draining:
            raise ApiError(503, "the server is going down; send it again in a moment, or to another", "shutting_down", retry_after=1)
        wanted = sum(job.unfinished for job in list(self._jobs) if not job.stopped)
        if wanted + len(parts) > self._workers + self._maximum_waiting:
            waiting = max(0, wanted - self._workers)
            message = f"{waiting} answers are waiting already, and no more than {self._maximum_waiting} may; send it again later"
            raise ApiError(429, message, "too_many_waiting", retry_after=self._retry_after(waiting))
        job = Job(parts, self._deadline_seconds)
        self._jobs.add(job)
        for part in range(len(parts)):
            self._threads.submit(self._run, job, part)
        self._changed()
        return job

    def drain(self) -> None:
        """Takes in nothing more; what was taken in goes on."""
        self._draining = True

    async def idle(self) -> None:
        """Returns once no job is left."""
        while self._jobs:
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Stops all jobs and waits for the workers to end."""
        for job in list(self._jobs):
            job.stop()
        self._threads.shutdown(cancel_futures=True)
        self._changed = quiet

    def _run(self, job: Job[Any], part: int) -> None:
        begin = time.monotonic()
        job.work(part)
        if job.done:
            self._jobs.discard(job)
        self._last_seconds = time.monotonic() - begin
        self._changed()

    def _retry_after(self, waiting: int) -> int:
        """Seconds until the line has moved on, if the others take as long as the last one."""
        return min(LONGEST_RETRY, max(1, math.ceil(self._last_seconds * waiting / self._workers)))


def _left() -> ApiError:
    return ApiError(499, "the client left before the answer was complete", "client_closed_request")
