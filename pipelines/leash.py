"""Run a command that must not outlive who started it: `python leash.py COMMAND…`, with a pipe as its standard input.

The kernel closes the pipe when whoever holds its other end dies, by SIGKILL too. Then the command and all that it started are ended.
Without this, the training of a killed flow would go on with the card and DVC's paths in its hands, while the flow's lease runs out.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL."""


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


def _end_with_input(group: int, cut: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    cut.set()
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end:
            time.sleep(0.1)
            os.killpg(group, 0)  # raises once nobody is left
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
