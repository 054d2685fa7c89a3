"""MLflow and Prefect away, slow, or killed: the build does not need them, and MLflow's log catches up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from drills.ground import Ground, Outcome, line_with, repro
from pipelines.servers import free_port, running

if TYPE_CHECKING:
    from mlflow.entities import Run

FIRST, NEXT = "train@bigram", "train@mlp"
"""The node whose log has to wait, and the one after it, with which it is delivered."""
REACHING = 180  # seconds until a node on a busy machine has a run in MLflow
DELAY = 2.0  # seconds that the slow one takes for each request


def mlflow_down(ground: Ground) -> Outcome:
    """No server answers while a node runs; then there is one."""
    port = free_port()
    with ground.copy() as clone:
        clone.stale(FIRST, NEXT)
        said = clone.must(*repro(FIRST), **told(port))
        with mlflow(clone.root, port):
            clone.must(*repro(NEXT), **told(port))
            return ground.outcome(clone, line_with(said, "MLflow"), repro(NEXT), *models(), remark=delivered(port))


def mlflow_killed(ground: Ground) -> Outcome:
    """The server gets SIGKILL while a node runs, and is started again later."""
    port = free_port()
    with ground.copy() as clone:
        clone.stale(FIRST, NEXT)
        with mlflow(clone.root, port) as server:
            process = clone.start(*repro(FIRST), **told(port))
            wait_for(lambda: FIRST in runs(port) or process.poll() is not None)
            os.killpg(server.pid, signal.SIGKILL)
            said = process.communicate()[0].splitlines()
        assert process.returncode == 0, said
        with mlflow(clone.root, port):
            clone.must(*repro(NEXT), **told(port))
            return ground.outcome(clone, line_with(said, "MLflow"), repro(NEXT), *models(), remark=delivered(port))


def mlflow_slow(ground: Ground) -> Outcome:
    """Each request takes seconds. The node may take ten seconds longer for it, and no more; what was cut off is delivered later."""
    port, slow = free_port(), free_port()
    with ground.copy() as clone, mlflow(clone.root, port), late(slow, port, DELAY):
        clone.stale(FIRST, NEXT)
        started = time.monotonic()
        said = clone.must(*repro(FIRST), **told(slow))
        took = time.monotonic() - started
        clone.must(*repro(NEXT), **told(port))
        remark = f"{took:.0f} s in place of {ground.seconds.get(FIRST, 0):.0f}; {delivered(port)}"
        return ground.outcome(clone, line_with(said, "MLflow"), repro(NEXT), *models(), remark=remark)


def prefect_down(ground: Ground) -> Outcome:
    """The flow cannot reach its server; DVC builds the same without."""
    with ground.copy() as clone:
        clone.stale(FIRST)
        away = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", "PREFECT_HOME": str(clone.root / "var/prefect")}
        status, said = clone.run(sys.executable, "-m", "pipelines", "rebuild", **away)
        assert status, "the flow ran without its server"
        clone.must(*repro(FIRST), **away)
        return ground.outcome(clone, line_with(said, "pipelines rebuild:"), repro(FIRST), "models/bigram")


def models() -> tuple[str, ...]:
    return tuple(f"models/{node.split('@')[1]}" for node in (FIRST, NEXT))


def told(port: int) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}", "REBUILD_ID": "drill"}


def delivered(port: int) -> str:
    """That the first node's run is in MLflow, whole. Raises RuntimeError where it is not."""
    from mlflow import MlflowClient

    found = runs(port)
    if FIRST not in found or found[FIRST].info.status != "FINISHED":
        raise RuntimeError(f"{FIRST} did not reach MLflow; it has {', '.join(found) or 'nothing'}")
    client, run = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}"), found[FIRST]
    points = sum(len(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics)
    if not points:
        raise RuntimeError(f"{FIRST} reached MLflow without its metrics")
    return f"later MLflow has the run, finished, with {points} points of {len(run.data.metrics)} metrics"


def runs(port: int) -> dict[str, Run]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {str(run.info.run_name): run for run in client.search_runs(experiments)}


def mlflow(folder: Path, port: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A real server on sqlite."""
    (folder / "var").mkdir(exist_ok=True)
    store = f"sqlite:///{folder}/var/mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    settings = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return running(command, f"http://127.0.0.1:{port}/health", log=folder / "var/mlflow.log", environment=settings, folder=folder)


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + REACHING
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing came of it in {REACHING} s")
        time.sleep(0.1)


@contextmanager
def late(port: int, target: int, delay: float) -> Iterator[None]:
    """What goes into `port` comes out at `target`, each piece of a request `delay` seconds later."""
    listening = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        while True:
            try:
                near = listening.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", target))
            threading.Thread(target=pour, args=(near, far, delay), daemon=True).start()
            threading.Thread(target=pour, args=(far, near, 0.0), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        listening.close()


def pour(source: socket.socket, sink: socket.socket, delay: float) -> None:
    try:
        while piece := source.recv(1 << 16):
            time.sleep(delay)
            sink.sendall(piece)
    except OSError:
        pass
    finally:
        for end in (source, sink):
            end.close()
