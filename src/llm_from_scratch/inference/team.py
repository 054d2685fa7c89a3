"""Threads that share the work of a forward, one a core.

OpenMP gives every thread that asks a team of its own, and the teams of sixteen callers would take turns on the same two cores.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

Meeting = NDArray[np.int64]
"""Where cores meet (see `kernels`): 0, and 0 as long as all go on."""


class Team:
    """Threads that do a piece of work together with the one that asks for it, one piece at a time."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._others: list[SimpleQueue[Callable[[], None]]] = []

    def run(self, work: Callable[[int, Meeting], None], cores: int) -> None:
        """`work` with the number of each core and where they meet. Raises what any of them raised."""
        meeting = np.zeros(2, np.int64)
        if cores == 1:
            return work(0, meeting)
        errors, done = list[BaseException](), SimpleQueue[int]()

        def take_part(core: int) -> None:
            try:
                work(core, meeting)
            except BaseException as error:
                errors.append(error)
                meeting[1] = 1
            done.put(core)

        with self._turn:
            while len(self._others) < cores - 1:
                self._hire()
            try:
                for core, other in enumerate(self._others[: cores - 1], 1):
                    other.put(partial(take_part, core))
                take_part(0)
            finally:
                meeting[1] = 1  # whatever happened, nobody waits for this core any more
            if errors:
                for _ in range(cores):
                    done.get()  # or the next forward would write where somebody still reads
                raise errors[0]

    def _hire(self) -> None:
        jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=_serve, args=(jobs,), name="core", daemon=True).start()
        self._others.append(jobs)


TEAM = Team()
"""Of this process."""
if os.name == "posix":  # threads stay behind when a process forks, and nobody would come
    os.register_at_fork(after_in_child=lambda: Team.__init__(TEAM))


def _serve(jobs: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        jobs.get()()
