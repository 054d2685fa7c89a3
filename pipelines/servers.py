"""A server as a `with` block: started on a free port of the loopback, waited for, and ended with all that it started."""

from __future__ import annotations

import http.client
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

READY_SECONDS = 300
"""A server may take minutes on a busy machine."""


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

    What it says goes into `log`. Raises ValueError with its last words where it does not come up. It stays in the process group of who
    started it: what ends that from outside, as a flow's leash does, ends the server too.
    """
    with log.open("w+b") if log else tempfile.TemporaryFile() as output:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        try:
            until = time.monotonic() + READY_SECONDS
            while not answers(ready):
                if server.poll() is not None or time.monotonic() > until:
                    output.seek(0)
                    raise ValueError(f"nobody answers at {ready}; the server said: {output.read()[-2000:].decode(errors='replace')}")
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
    """A server and its family, asked to stop where there is patience, and after so many seconds killed.

    BentoML's workers have groups of their own, and would outlive their parent.
    """
    if server.poll() is None:
        parent = psutil.Process(server.pid)
        family = [parent, *parent.children(recursive=True)]  # the parent first, as it would start them again
        if patience:
            server.terminate()
            family = psutil.wait_procs(family, timeout=patience)[1]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    server.wait()
