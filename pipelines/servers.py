"""What a finished build can be looked at in: the site, MLflow, Prefect and the service, each for a while on a free port of the loopback."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.bento import package, serving

READY_SECONDS = 240


@dataclass(frozen=True)
class Places:
    """Where what is shown can be reached."""

    site: str
    mlflow: str
    prefect: str
    service: str


@contextmanager
def served(root: Path) -> Iterator[Places]:
    """All four, until the block ends. Raises ValueError where one of them does not come up, and the package's own errors."""
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "NO_MKDOCS_2_WARNING": "1"}
    os.environ.update(settings)
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/var/mlflow.db"
    os.environ.setdefault("PREFECT_HOME", f"{root}/var/prefect")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet"], cwd=root, check=True)
    with (
        answering(["http.server", "--bind", "127.0.0.1", "--directory", f"{root}/var/site"], [], "/index.html") as site,
        answering(["mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1"], ["--port"], "/health") as mlflow,
        answering(["prefect", "server", "start", "--host", "127.0.0.1"], ["--port"], "/api/health") as prefect,
        serving(package(root, "")) as service,
    ):
        yield Places(site, mlflow, prefect, service)


@contextmanager
def answering(module: Sequence[str], port_option: Sequence[str], health: str) -> Iterator[str]:
    """The address at which `python -m MODULE` answers, until the block ends: it and all that it started are stopped then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", *module, *port_option, str(port)]
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        wait(f"http://127.0.0.1:{port}{health}", module[0], server)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """The server and all that it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, how)
        except ProcessLookupError:
            break
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            continue
    server.wait()


def wait(address: str, name: str, server: subprocess.Popen[bytes]) -> None:
    """Until it answers. Raises ValueError where it does not."""
    end = time.monotonic() + READY_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            time.sleep(0.5)
    raise ValueError(f"{name} did not answer at {address} within {READY_SECONDS} s; start it by hand to see what it says")
