"""Going down without cutting anybody off: at SIGTERM the lane takes in nothing more, and the server ends once it is empty.

Until then the server still listens, so that who comes now gets a 503 with Retry-After instead of a connection that nobody answers:
bentoml's parent process keeps the socket open, and what it accepts for a worker that no longer does would hang.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from types import FrameType

from llm_from_scratch.serving.lane import Lane


def finish_first(lanes: Callable[[], Sequence[Lane]]) -> None:
    """From now on SIGTERM drains the lanes that there are then, before the handler that is there now is called.

    In the main thread, within its event loop.
    """
    loop = asyncio.get_running_loop()
    end = signal.getsignal(signal.SIGTERM)

    def begin(number: int, frame: FrameType | None) -> None:
        if not tasks:
            for lane in lanes():
                lane.drain()
            loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(finish())))

    async def finish() -> None:
        for lane in lanes():
            await lane.idle()
        if callable(end):
            end(signal.SIGTERM, None)

    tasks: list[asyncio.Task[None]] = []  # the loop itself holds its tasks only weakly
    if callable(end):
        signal.signal(signal.SIGTERM, begin)
