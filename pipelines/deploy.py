"""What a Prefect server must have before anything is scheduled, in one go, as often as you like: pools, limit, automation, deployments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker
from ruamel.yaml import YAML

from pipelines import gpu
from pipelines.notify import load

FILE = Path("pipelines/prefect.yaml")
KUBERNETES = Path("pipelines/kubernetes.json")
"""The job template of a GPU pool whose runs are Kubernetes jobs."""
TAG = "llm-from-scratch"
"""On all that is deployed here. Runs of others may send heartbeats more rarely, or none."""
LOST = "a run without a heartbeat has crashed"
LOST_SECONDS = 90  # three heartbeats


def deploy(suffix: str, notify: str, kubernetes: bool, lost_seconds: int = LOST_SECONDS) -> Iterator[str]:
    """A line for each thing, made or there already. Deployments are as prefect.yaml has them, their names with `suffix` added.

    `notify` is the block, TYPE/NAME, that hears of failures. Raises ValueError where it is none, or a pool is of another kind.
    """
    block = load(notify)._block_document_id if notify else None
    with get_client(sync_client=True) as client:
        yield _pool(client, "local", "process", ProcessWorker.get_default_base_job_template())
        template = json.loads(KUBERNETES.read_text(encoding="utf-8")) if kubernetes else ProcessWorker.get_default_base_job_template()
        yield _pool(client, gpu.GPU, "kubernetes" if kubernetes else "process", template)
        yield f"limit {gpu.GPU}: {'made, of one slot' if gpu.ensure_limit() else 'there already'}"
        yield _automation(client, lost(block, lost_seconds))
    tree = named(YAML(typ="safe").load(FILE), suffix, notify, os.environ.get("MLFLOW_TRACKING_URI", ""))
    _deploy(tree)
    yield from (f"deployment {entry['name']}: as in {FILE}" for entry in tree["deployments"])


def named(tree: dict[str, Any], suffix: str, notify: str, tracking_uri: str) -> dict[str, Any]:
    """prefect.yaml's `tree` for this folder: names end in `suffix`, and so do those that parameters hold of deployments."""
    known = {entry["name"] for entry in tree["deployments"]}
    tree["pull"] = [{"prefect.deployments.steps.set_working_directory": {"directory": str(Path.cwd())}}]
    for entry in tree["deployments"]:
        entry["name"] += suffix
        entry["tags"] = [*entry.get("tags", []), TAG]
        given = entry.setdefault("parameters", {})
        for key, value in given.items():
            if isinstance(value, str) and value.rpartition("/")[2] in known:
                given[key] = value + suffix
        if notify and entry["entrypoint"].rpartition(":")[2] != "train":  # the rebuild that waits for it tells
            given["notify"] = notify
        if tracking_uri:
            entry["work_pool"]["job_variables"]["env"] = entry["work_pool"]["job_variables"]["env"] | {"MLFLOW_TRACKING_URI": tracking_uri}
    return tree


def lost(block: Any, seconds: int) -> AutomationCore:
    """Mark a run whose process is gone as crashed, so that who waits for it, and `block`, hear of it."""
    heartbeat, over = "prefect.flow-run.heartbeat", ("Completed", "Failed", "Cancelled", "Crashed")
    message = f"no heartbeat for {seconds} s: its process, or the machine, is gone"
    subject = "{{ flow.name }} {{ flow_run.name }}: Crashed"
    tell = [SendNotification(block_document_id=block, subject=subject, body=message)] if block else []
    return AutomationCore(
        name=LOST,
        trigger=EventTrigger(
            posture=Posture.Proactive,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"},
            for_each={"prefect.resource.id"},
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{state}" for state in over)},
            threshold=1,
            within=timedelta(seconds=seconds),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message), *tell],
    )


def _pool(client: SyncPrefectClient, name: str, kind: str, template: dict[str, Any]) -> str:
    try:
        found = client.read_work_pool(name).type
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
        return f"pool {name}: made, of kind {kind}"
    if found != kind:
        raise ValueError(f"pool {name} is of kind {found}, wanted {kind}; prefect work-pool delete {name}, then deploy again")
    return f"pool {name}: there already"


def _automation(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    if found := client.read_automations_by_name(wanted.name):
        client.update_automation(found[0].id, wanted)
    else:
        client.create_automation(wanted)
    return f"automation: {wanted.name}"


def _deploy(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefect.yaml"
        YAML(typ="safe").dump(tree, file)
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(file), "--all"]
        environment = os.environ | get_current_settings().to_environment_variables(exclude_unset=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"prefect deploy: {' '.join((done.stdout + done.stderr).split())[-600:]}")
