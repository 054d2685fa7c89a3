"""A real Prefect server, projects with a graph in small, and what the server knows of runs: shared by the tests of flows and schedules."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import psutil
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId, TaskRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from pipelines import dvc
from pipelines.servers import free_port, running

ROOT = Path(__file__).parent.parent
T = TypeVar("T")

README_STAGE = """\
def run(params, name, root):
    (root / "README.md").write_text((root / "reports" / "metrics.json").read_text())
"""


@contextmanager
def real_server(home: Path) -> Iterator[str]:
    """`prefect server start`, as `make prefect` starts it, its state in `home`; the address of its API, which this process uses."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/api"
    settings = os.environ | server_settings() | {"PREFECT_HOME": str(home), "PREFECT_API_URL": address}
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    with (
        running(command, f"{address}/health", log=home / "server.log", environment=settings),
        temporary_settings({PREFECT_API_URL: address, PREFECT_HOME: home}),
    ):
        yield address


def server_settings() -> dict[str, str]:
    """Those that the Makefile gives to its server."""
    return dict(re.findall(r"(PREFECT_SERVER_\w+)=(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8")))


def waited(look: Callable[[], T], seconds: float, complaint: str) -> T:
    """What `look` finds, as soon as that is anything."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.2)
    raise AssertionError(f"{complaint} after {seconds} s")


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def project(root: Path, graph: str, **files: str) -> Path:
    """A workspace of its own with a toy `graph`, and the flows of ours."""
    for code in ("pipelines", "stages"):
        shutil.copytree(ROOT / code, root / code, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
    (root / "stages" / "readme.py").write_text(README_STAGE)
    (root / "stages" / "digests.py").write_text("def main(given):\n    pass\n")  # its reports/ is an output, and stays as it was made
    (root / "dvc.yaml").write_text(graph)
    for name, text in files.items():
        (root / name).write_text(text)
    subprocess.run(dvc.command("init", "--no-scm", "--quiet"), cwd=root, check=True)
    return root


def story(flow_run: UUID | None) -> tuple[FlowRun, list[str]]:
    """A run of a flow as the server knows it, and what was logged for it; logs arrive a moment later."""
    assert flow_run is not None
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run]))
    with get_client(sync_client=True) as client:
        for _ in range(60):
            logs = client.read_logs(wanted, limit=200)
            if any(log.name == "prefect.flow_runs" and "Finished in state" in log.message for log in logs):
                break
            time.sleep(0.5)
        return client.read_flow_run(flow_run), [log.message for log in logs if "Finished in state" not in log.message]


def tasks(run: FlowRun) -> list[str]:
    """The tasks of a run in the order in which they began."""
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])), task_run_filter=TaskRunFilter())
    return [task.name for task in sorted(found, key=lambda task: task.expected_start_time or run.created)]


def artifacts(run: FlowRun) -> dict[str, str]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(), flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    return {str(kept.key): str(kept.data) for kept in found}


def environment() -> dict[str, str]:
    """That of a command which shall find the server of this session."""
    return {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value()), "PREFECT_HOME": str(PREFECT_HOME.value())}
