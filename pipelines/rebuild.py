"""The rebuild as a Prefect flow: one task a node of the graph, in graph order, each `dvc repro --single-item`.

DVC still decides what is stale; Prefect decides when and where, retries what touches the world, leases the GPU, streams the log and keeps
the report. A node that trains runs here, or where there is a deployment for it (`trainer`), in a run of its own on a worker with a card.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from prefect import flow, get_client, get_run_logger, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.futures import PrefectFuture, as_completed
from prefect.runtime import flow_run
from prefect.states import Cancelling

from llm_from_scratch import tracking
from pipelines import dvc, gpu
from pipelines.graph import Graph, parse, touched, walk
from pipelines.notify import tell
from pipelines.process import CommandFailed, end_all, require, until
from pipelines.promote import promote

FLAKY = {"download": [10.0, 30.0, 60.0]}  # seconds before each retry of what touches the network
LIVES = 3  # of a training whose worker is lost; each goes on where the last was
POLL_SECONDS = 2.0
MLFLOW_PAGE = "http://127.0.0.1:5000"  # make mlflow


@flow(name="rebuild", log_prints=True, on_failure=[tell], on_crashed=[tell])
def rebuild(trainer: str = "", beside: int = 0, again: tuple[str, ...] = (), notify: str = "", mlflow_page: str = MLFLOW_PAGE) -> None:
    """Every node of the graph, then the report and the registry. Starts nothing after a node that fails; a rerun goes on from there.

    `trainer` is the deployment that stale nodes which train are sent to (train/gpu); empty, they run here. `beside` others run at a time
    next to one that trains; 0: one node at a time, where there is no card. Nodes in `again` run though DVC sees no change. `notify`: see
    notify.py.
    """
    os.environ["REBUILD_ID"] = f"{flow_run.get_name()}-{str(flow_run.get_id())[:8]}"  # a name alone comes up again after some hundred runs
    gpu.ensure_limit()
    graph = parse(dvc.output("dag", "--dot"))
    if unknown := sorted(set(again) - set(graph)):
        raise ValueError(f"again: no node '{unknown[0]}'; the graph has {', '.join(graph)}")
    stale = stale_nodes(graph) | touched(graph, again)

    def start(node: str) -> PrefectFuture[None]:
        delays = FLAKY.get(node.split("@")[0], [])
        made = reproduce.with_options(retries=len(delays), retry_delay_seconds=delays or None, tags=tags(node))
        return made.submit(node, node in stale, trainer, node in again)

    try:
        walk(graph, start, first, beside)
    except BaseException:
        end_all()
        raise
    keep_report(Path("reports"))
    fill_readme()
    register(mlflow_page)


@flow(name="train", flow_run_name="{node}", log_prints=True)
def train(node: str, rebuild: str = "by-hand", force: bool = False) -> None:
    """One node, under the GPU's lease: as the pool of machines with cards runs it. `rebuild` is the id of the rebuild it is part of."""
    os.environ["REBUILD_ID"] = rebuild
    gpu.ensure_limit()
    with gpu.lease():
        repro(node, force)


@task(cache_policy=NO_CACHE, task_run_name="{node}")
def reproduce(node: str, stale: bool, trainer: str, force: bool) -> None:
    """One node, if it is stale. Waits for the card, or sends to `trainer`, only what is. Raises CommandFailed."""
    leased = stale and gpu.uses_gpu(node)
    if leased and trainer:
        train_elsewhere(node, trainer, force)
        return
    with gpu.lease() if leased else nullcontext():
        repro(node, force)


@task(cache_policy=NO_CACHE, task_run_name="register")
def register(mlflow_page: str) -> None:
    """Apply evaluate's verdict to the model registry, and link to what MLflow has of this rebuild."""
    for line in promote(Path.cwd()):
        get_run_logger().info(line)
    if address := tracking.rebuild_address(mlflow_page):
        create_link_artifact(address, link_text="MLflow", key="mlflow", description="Curves, numbers and models of this rebuild")


@task(cache_policy=NO_CACHE, task_run_name="readme")
def fill_readme() -> None:
    """README.md's tables and SUMMARY.md, from the numbers of this run, and its digests held against the committed. Raises CommandFailed."""
    for what in ("readme", "digests"):
        require(what, [sys.executable, "-m", "stages", what])


def repro(node: str, force: bool) -> None:
    require(node, dvc.command("repro", "--single-item", *(["--force"] if force else []), node))


def train_elsewhere(node: str, trainer: str, force: bool) -> None:
    """Run deployment `trainer` for `node` and wait; again, where its worker is lost. Raises CommandFailed."""
    parameters = {"node": node, "rebuild": os.environ["REBUILD_ID"], "force": force}
    for _ in range(LIVES):
        state = outcome(run_deployment(trainer, parameters=parameters, timeout=0).id)
        if state.is_completed():
            return
        if not state.is_crashed():
            break
        get_run_logger().warning("%s: its worker was lost (%s); once more", node, state.message)
    raise CommandFailed(f"{node}: {trainer} ended as {state.name}: {state.message}")


def outcome(run: Any) -> State:
    """The final state of flow run `run`. Where this run is cancelled first, that one is too."""
    stopped = threading.Event()
    with get_client(sync_client=True) as client, until(stopped.set):
        while not stopped.wait(POLL_SECONDS):
            state = client.read_flow_run(run).state
            if state is not None and state.is_final():
                return state
        return client.set_flow_run_state(run, Cancelling(message="the rebuild that started it was ended")).state


def first(running: Set[PrefectFuture[None]]) -> PrefectFuture[None]:
    return next(as_completed(list(running)))


def stale_nodes(graph: Graph) -> set[str]:
    """What DVC would run, or may have to once that is done: all, where DVC cannot say, as another process trains in this workspace."""
    try:
        return touched(graph, json.loads(dvc.output("status", "--json")))
    except ValueError as busy:
        get_run_logger().warning("%s; so everything may be stale", busy)
        return set(graph)


def tags(node: str) -> list[str]:
    """A GPU stage is tagged so, for the dashboard's filter."""
    stage = node.split("@")[0]
    return [stage, gpu.GPU] if gpu.uses_gpu(node) else [stage]


def keep_report(folder: Path) -> None:
    """The report and the ladder as artifacts of this run, to be read in the dashboard."""
    create_markdown_artifact((folder / "report.md").read_text(encoding="utf-8"), key="report", description="What this rebuild built")
    ladder = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["ladder"]
    create_table_artifact([{"rung": rung, **numbers} for rung, numbers in ladder.items()], key="ladder", description="Bits per byte")
