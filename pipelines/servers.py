"""A server as a `with` block: started on a free port of the loopback, waited for, and ended with all that it started."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

READY_SECONDS = 300
"""A server may take minutes on a busy machine."""
LAST_BYTES = 2000


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str],
    ready: str,
    *,
    patience: float = 0,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """The server that `command` starts in `folder`, once GET `ready` is answered; in the end it is asked to stop, as `end` has it.

    What it says goes into `log`. Raises ValueError with its last words where it does not come up. It stays in the session of who started
    it: what ends that from outside, as a flow's leash does, ends the server too. It leads a group of its own, in which its family is found
    where it has died.
    """
    with log.open("w+b") if log else tempfile.TemporaryFile() as output:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output, process_group=0)
        try:
            until = time.monotonic() + READY_SECONDS
            while not answers(ready):
                if server.poll() is not None or time.monotonic() > until:
                    raise ValueError(f"nobody answers at {ready}; the server said: {_last(output)}")
                time.sleep(0.2)
            yield server
        finally:
            end(server, patience)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False


def end(server: subprocess.Popen[bytes], patience: float = 0) -> None:
    """A server and its family, asked to stop where there is patience, and after so many seconds killed, or where that is broken off.

    BentoML's workers have groups of their own, and would outlive their parent. Of a server that has died, the family is its group.
    """
    if server.poll() is None:
        parent = psutil.Process(server.pid)
        family = [parent, *parent.children(recursive=True)]  # the parent first, as it would start them again
        try:
            if patience:
                server.terminate()
                psutil.wait_procs(family, timeout=patience)
        finally:  # a second Ctrl-C is for this process alone
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
    server.wait()
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def _last(output: IO[bytes]) -> str:
    """What was said last, the place left alone at which the server writes."""
    size = os.fstat(output.fileno()).st_size
    return os.pread(output.fileno(), LAST_BYTES, max(0, size - LAST_BYTES)).decode(errors="replace")
