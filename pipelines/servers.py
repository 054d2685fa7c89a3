"""All that a finished build can be looked at in: the site, MLflow, Prefect and the service, each served for a while on a free port."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
    """The site, MLflow, Prefect and the service, each on a free port of the loopback, until the end."""
    python, ports = sys.executable, [free_port() for _ in range(4)]
    home = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{root}/var/mlflow.db",
        "PREFECT_HOME": f"{root}/var/prefect",
        "BENTOML_HOME": f"{root}/var/bentoml",
    }
    environment = {**home, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", **os.environ}
    store = environment["MLFLOW_TRACKING_URI"]
    subprocess.run([python, "-m", "mkdocs", "build", "--quiet"], cwd=root, env={**environment, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    commands = [
        [python, "-m", "http.server", str(ports[0]), "--bind", "127.0.0.1", "--directory", "var/site"],
        [python, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(ports[1])],
        [python, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(ports[2])],
        [python, "-m", "pipelines", "serve", "--port", str(ports[3])],
    ]
    addresses = [f"http://127.0.0.1:{port}" for port in ports]
    checks = ("/index.html", "/health", "/api/health", "/readyz")
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            servers.append(
                subprocess.Popen(
                    command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
                )
            )
        for command, address, check, server in zip(commands, addresses, checks, servers, strict=True):
            wait(f"{address}{check}", " ".join(command[2:4]), server)
        yield Places(*addresses)
    finally:
        for server in servers:
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
    raise ValueError(f"{name} was not ready after {READY_SECONDS} s; start it by hand to see what it says")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
