"""The rebuild as a Prefect flow: one task a node of the graph, in graph order, each `dvc repro --single-item`.

DVC still decides what is stale; Prefect decides when, retries what touches the world, leases the GPU, streams the log and keeps the report.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from graphlib import TopologicalSorter
from pathlib import Path

from prefect import flow, get_client, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from pipelines import dvc
from pipelines.promote import promote

GPU = "gpu"
GPU_STAGES = {"train", "finetune"}
FLAKY = {"download": [10.0, 30.0, 60.0]}  # seconds before each retry of what touches the network

LAST_LINES = 12  # of a node that failed, kept in its error

EDGE = re.compile(r'"(?P<one>[^"]+)"(?:\s*->\s*"(?P<other>[^"]+)")?')


def nodes_in_order(dot: str) -> list[str]:
    """The nodes of `dvc dag --dot`, each after all that it stands on."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for edge in EDGE.finditer(dot):
        sorter.add(edge["other"] or edge["one"], *([edge["one"]] if edge["other"] else []))
    return list(sorter.static_order())


def ensure_gpu_limit(slots: int = 1) -> None:
    """The limit that GPU stages queue for; one that a person has set already stays as it is."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(GPU)
        except ObjectNotFound:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU, limit=slots))


class NodeFailed(ValueError):
    """A node of the graph did not come to its end; the message holds the last lines that it said."""


@task(cache_policy=NO_CACHE, task_run_name="{node}")
def reproduce(node: str) -> None:
    """One node, if it is stale. Raises NodeFailed."""
    with lease(node):
        status, said = stream(dvc.command("repro", "--single-item", node))
    if status:
        raise NodeFailed(f"{node} ended with {status}:\n" + "\n".join(said))


@task(cache_policy=NO_CACHE, task_run_name="register")
def register() -> None:
    """Apply evaluate's verdict to the model registry."""
    for line in promote(Path.cwd()):
        get_run_logger().info(line)


@task(cache_policy=NO_CACHE, task_run_name="readme")
def fill_readme() -> None:
    """README.md's tables and SUMMARY.md, from the numbers of this run. Raises NodeFailed."""
    status, said = stream([sys.executable, "-m", "stages", "readme"])
    if status:
        raise NodeFailed(f"readme ended with {status}:\n" + "\n".join(said))


@flow(name="rebuild", log_prints=True)
def rebuild() -> None:
    """Every node of the graph, then the report and the registry. Stops at the first node that fails; a rerun goes on from there."""
    os.environ["REBUILD_ID"] = f"{flow_run.get_name()}-{str(flow_run.get_id())[:8]}"  # a name alone comes up again after some hundred runs
    ensure_gpu_limit()
    for node in nodes_in_order(dvc.output("dag", "--dot")):
        delays = FLAKY.get(node.split("@")[0], [])
        reproduce.with_options(retries=len(delays), retry_delay_seconds=delays or None, tags=tags(node))(node)
    keep_report(Path("reports"))
    fill_readme()
    register()


def tags(node: str) -> list[str]:
    """A GPU stage is tagged so, for the dashboard's filter."""
    stage = node.split("@")[0]
    return [stage, GPU] if stage in GPU_STAGES else [stage]


def lease(node: str) -> AbstractContextManager[None]:
    """The GPU for a stage that may use it, nothing for the others. `strict`: a missing limit is an error, not a warning."""
    if GPU in tags(node):
        return concurrency(GPU, occupy=1, strict=True, raise_on_lease_renewal_failure=False)
    return nullcontext()


def stream(command: list[str]) -> tuple[int, list[str]]:
    """Run `command`, each line it says sent to the run's log as it comes; its exit status and the last of the lines.

    Whatever breaks this off, a cancelled run too, ends the command with all that it started: DVC's lock is free for the next one.
    """
    log = get_run_logger()
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=dvc.environment() | {"PYTHONUNBUFFERED": "1"},  # a pipe would keep a stage's lines until it ends
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in filter(None, map(str.strip, process.stdout)):
                log.info(line)
                last.append(line)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    return process.returncode, list(last)


def keep_report(folder: Path) -> None:
    """The report and the ladder as artifacts of this run, to be read in the dashboard."""
    create_markdown_artifact((folder / "report.md").read_text(encoding="utf-8"), key="report", description="What this rebuild built")
    ladder = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["ladder"]
    create_table_artifact([{"rung": rung, **numbers} for rung, numbers in ladder.items()], key="ladder", description="Bits per byte")
