"""Run a command that must not outlive who started it: `python leash.py COMMAND…`, with a pipe as its standard input.

The kernel closes the pipe when whoever holds its other end dies, by SIGKILL too. Then the command and all that it started are ended.
Without this, the training of a killed flow would go on with the card and DVC's paths in its hands, while the flow's lease runs out.

All that it started is its session: the workers of DVC's queue have a process group of their own, and their parent is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

import psutil

GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""
KILL_SECONDS = 10.0
"""For SIGKILL, again and again: who is seen may have started another since."""


def main() -> int:
    """The command's exit status; as a shell has it, 128 and the signal for one that was ended by a signal."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    cut = threading.Event()
    watch = threading.Thread(target=_end_with_input, args=(process.pid, cut), daemon=True)
    watch.start()
    status = process.wait()
    if cut.is_set():
        watch.join()
    return status if status >= 0 else 128 - status


def _end_with_input(session: int, cut: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    cut.set()
    end(session)


def end(session: int) -> None:
    """All that a session has: asked to stop, and after the grace killed, until nobody is left."""
    told = set[psutil.Process]()
    for left in _left(session, GRACE_SECONDS):
        # Once each: a second one may mean more haste. Parents first: when its child ends, DVC writes its lock file, and would die over it.
        _send(signal.SIGTERM, [process for process in left if process not in told])
        told.update(left)
    for left in _left(session, KILL_SECONDS):
        _send(signal.SIGKILL, left)


def _left(session: int, seconds: float) -> Iterator[list[psutil.Process]]:
    """Those of the session that are alive, each time that one looks, while there are any, and for so long."""
    until = time.monotonic() + seconds
    while (alive := _alive(session)) and time.monotonic() < until:
        yield alive
        time.sleep(0.1)


def _send(sent: signal.Signals, processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):  # it has ended, or is not ours to end; the others are
            process.send_signal(sent)


def _alive(session: int) -> list[psutil.Process]:
    """Those of the session that have not ended, the oldest first; one that nobody has waited for yet has."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(main())
