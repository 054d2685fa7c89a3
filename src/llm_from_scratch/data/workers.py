"""All cores of this machine: batches go out to processes, and what is made of them comes back in order.

Processes, because threads pay only on long texts: tiktoken lets go of Python's lock inside a text, and between texts its threads wait for
one another. Memory stays flat as the corpus grows, because only a few batches are on their way at a time.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeVar

Batch = TypeVar("Batch")
Made = TypeVar("Made")

FEW = 8  # batches: done here while processes start, and if there are no more, instead
AHEAD = 2  # batches a process that wait for it


def across_processes(work: Callable[[Batch], Made], batches: Iterable[Batch], processes: int) -> Iterator[Made]:
    """`map(work, batches)` over that many processes; `work` is sent to each of them once, and must be picklable.

    Raises what `work` raises, and ChildProcessError where a process was killed.
    """
    waiting = iter(batches)
    first = list(islice(waiting, FEW))
    if processes == 1 or len(first) < FEW:
        yield from map(work, chain(first, waiting))
        return
    # Spawned, not forked: a copy of a process that runs threads may hang on a lock that one of them held.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _prepare, (work,))
    try:
        sent = deque(pool.submit(_do, batch) for batch in islice(waiting, AHEAD * processes))
        yield from map(work, first)
        yield from _in_order(pool, sent, waiting)
    except BrokenProcessPool:
        raise ChildProcessError("a process that encodes was killed; if memory ran out, run with less beside it, then go on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, sent: deque[Future[Any]], batches: Iterable[Any]) -> Iterator[Any]:
    """What becomes of the batches that are `sent` and of those that follow, one sent on for each that is done."""
    for batch in batches:
        sent.append(pool.submit(_do, batch))
        yield sent.popleft().result()
    while sent:
        yield sent.popleft().result()


_work: Callable[[Any], Any]


def _prepare(work: Callable[[Any], Any]) -> None:
    """Once in each process. Ctrl-C is for the parent, which then stops them all."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _do(batch: Any) -> Any:
    return _work(batch)
