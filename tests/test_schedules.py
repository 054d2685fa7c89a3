"""Workers of a real Prefect server: one card for two workspaces, other stages beside it, and a training whose worker is killed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.request import urlopen
from uuid import uuid4

import psutil
import pytest
from prefect import get_client
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from ruamel.yaml import YAML

from llm_from_scratch import bundle
from llm_from_scratch.evaluation.promotion import Scores
from pipelines import deploy, flows, gpu, leash, notify, process, rebuild
from tests.prefect_runs import ROOT, alive, artifacts, environment, project, story, tasks, waited
from tests.tiny import tiny_model

GRAPH = """\
stages:
  download:
    matrix: {source: [a]}
    cmd: "echo text > raw"
    outs: [raw]
  train:
    foreach: {b: {}}
    do:
      cmd: python train.py
      deps: [raw, train.py]
      outs: [model]
  index:
    cmd: "cp raw index"
    deps: [raw]
    outs: [index]
  evaluate:
    cmd: "mkdir -p reports; echo '# It works' > reports/report.md; cp toy.json reports/metrics.json; cp none.json reports/verdict.json"
    deps: [model, index]
    outs: [reports]
"""
TRAIN = """\
\"""Learns until somebody says that it is enough. Each step is written down with the time, and after a kill it goes on from the last.\"""
import os, pathlib, time

runs, enough = pathlib.Path("runs"), pathlib.Path("enough")
runs.mkdir(exist_ok=True)
step = len(list(runs.iterdir()))
while not enough.exists():
    pathlib.Path("step").write_text(f"{time.time()} {os.getpid()}")
    os.replace("step", runs / f"{step:06d}")
    step += 1
    time.sleep(0.1)
pathlib.Path("model").write_text(f"after {step} steps of {os.environ['REBUILD_ID']}")
"""
FILES = {
    "train.py": TRAIN,
    "toy.json": json.dumps({"ladder": {"b": {"val_bpb": 2.0}}}),
    "none.json": json.dumps({"candidates": []}),
}
BUSY_SECONDS = 180
"""For anything that takes some seconds on a machine that has nothing else to do."""


def steps(workspace: Path) -> list[tuple[float, int]]:
    """When each step was done, and by which process."""
    written = [path.read_text().split() for path in sorted((workspace / "runs").glob("*"))]
    return [(float(when), int(process)) for when, process in written]


@contextmanager
def worker(pool: str, folder: Path) -> Iterator[psutil.Process]:
    """`prefect worker start`, with all that it started killed at the end."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    with (folder / f"{pool}.log").open("a") as log:
        started = psutil.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield started
    finally:
        kill(started)


def kill(started: psutil.Process) -> None:
    """SIGKILL for it and the flow runs that it started. What these started is left alone."""
    with suppress(psutil.NoSuchProcess):
        flow_runs = [child for child in started.children(recursive=True) if "prefect" in " ".join(child.cmdline())]
        for victim in (started, *flow_runs):
            victim.kill()
        psutil.wait_procs([started, *flow_runs], timeout=30)


def settled(run: FlowRun, seconds: float = BUSY_SECONDS) -> FlowRun:
    """`run`, once it has ended."""

    def look() -> FlowRun | None:
        with get_client(sync_client=True) as client:
            found = client.read_flow_run(run.id)
        return found if found.state and found.state.is_final() else None

    return waited(look, seconds, f"{run.name} had not ended")


def trainings() -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("train/gpu")
        return [run for run in client.read_flow_runs() if run.deployment_id == deployment.id]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workspaces_take_turns_with_the_card_and_a_killed_worker_gives_it_back(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training, by hand, holds the card. A rebuild in another workspace runs beside it all that needs no card, and trains after it;
    then its worker is killed in the middle of a step, and another one goes on where that was.
    """
    ours, theirs = (project(tmp_path / name, GRAPH, **FILES) for name in ("ours", "theirs"))
    shutil.copyfile(ours / "toy.json", theirs / "raw")
    monkeypatch.chdir(ours)
    said = list(deploy.deploy(suffix="", notify="", kubernetes=False, lost_seconds=45))
    assert "pool gpu: made, of kind process" in said
    by_hand = subprocess.Popen(
        [sys.executable, "-c", "from pipelines.rebuild import train; train('train@b')"], cwd=theirs, env=environment()
    )
    try:
        waited(lambda: steps(theirs), BUSY_SECONDS, "no training by hand")
        with worker("local", tmp_path), worker("gpu", tmp_path) as first:
            with get_client(sync_client=True) as client:
                nightly = client.read_deployment_by_name("rebuild/nightly")
                quiet = {"env": nightly.job_variables["env"] | {"MLFLOW_TRACKING_URI": ""}}
                run = client.create_flow_run_from_deployment(nightly.id, job_variables=quiet)
            waited(lambda: (ours / "index").exists(), BUSY_SECONDS, "what needs no card did not run beside the training")
            waited(lambda: [asking for asking in trainings() if asking.state and asking.state.is_running()], BUSY_SECONDS, "nobody waits")
            (theirs / "enough").touch()
            assert by_hand.wait(BUSY_SECONDS) == 0
            waited(lambda: len(steps(ours)) > 5, BUSY_SECONDS, "the card was not handed on")
            assert steps(ours)[0][0] > steps(theirs)[-1][0] > (ours / "index").stat().st_mtime

            kill(first)
            killed = time.time()
            (learner,) = {pid for _, pid in steps(ours)}
            waited(lambda: not alive(learner), 20, "the training outlived its flow")
            with worker("gpu", tmp_path):
                waited(lambda: len({pid for _, pid in steps(ours)}) == 2, 180, "nobody went on")
                (ours / "enough").touch()
                run = settled(run)
    finally:
        by_hand.kill()
    _, lines = story(run.id)
    assert run.state is not None
    assert run.state.is_completed(), lines
    resumed = next(when for when, pid in steps(ours) if pid != learner)
    assert resumed - killed < gpu.LEASE_SECONDS + 45 + BUSY_SECONDS / 2
    print(f"the card was used again {resumed - killed:.0f} s after the kill")
    assert (ours / "model").read_text() == f"after {len(steps(ours))} steps of {run.name}-{str(run.id)[:8]}"
    assert sorted(str(again.state and again.state.name) for again in trainings()) == ["Completed", "Crashed"]
    assert {"download@a", "index", "train@b", "evaluate", "readme", "register"} <= set(tasks(run))
    assert artifacts(run)["report"] == "# It works\n"


@pytest.mark.slow
def test_a_source_that_changed_starts_one_rebuild_that_downloads_it_anew_however_often_one_looks(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC alone does not see that files of a folder changed, so the rebuild is told which downloads to run all the same."""
    monkeypatch.chdir(project(tmp_path / "project", GRAPH))
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow_from_name("rebuild"), "of-a-test")
        for _ in range(2):
            flows.data_changed("rebuild/of-a-test")
        (started,) = [run for run in client.read_flow_runs() if run.deployment_id == deployment]
    sources = YAML(typ="safe").load(ROOT / "params.yaml")["download"]["fetch"]
    assert sorted(started.parameters["again"]) == sorted(f"download@{name}" for name in sources)
    assert started.tags == ["data-changed"]


@pytest.mark.slow
def test_promotion_as_a_deployment_moves_the_champion_in_the_store_that_deploy_was_told(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    root = project(tmp_path / "project", GRAPH, **FILES)
    digest = bundle.read_manifest(tiny_model(root / "artifacts/models/tiny")).digest
    scores = Scores("val_bpb", {f"u{place}": (2.0, 1.0) for place in range(60)}).to_json()
    entry = {
        "name": "llm-from-scratch-tiny",
        "folder": "artifacts/models/tiny",
        "digest": digest,
        "card": "card.md",
        "metrics": {"val_bpb": 2.0},
        "facts": {"kind": "model", "made_by": "train@tiny", "asked": "text"},
        "beside": {},
        "scores": {"file": "scores.json", "sha256": hashlib.sha256(scores.encode()).hexdigest()},
    }
    verdict = {"rule": {"minimum_gain": 0.0, "minimum_units": 20, "resamples": 100, "confidence": 0.95, "seed": 1}, "candidates": [entry]}
    (root / "reports").mkdir()
    for name, text in {
        "card.md": "---\ntags: [tiny]\n---\n# tiny\n",
        "scores.json": scores,
        "reports/verdict.json": json.dumps(verdict),
        "reports/report.md": "# It works\n",
        "reports/metrics.json": "{}",
    }.items():
        (root / name).write_text(text)
    monkeypatch.chdir(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{tmp_path}/elsewhere.db")
    list(deploy.deploy(suffix="-p", notify="", kubernetes=False))
    with worker("local", tmp_path), get_client(sync_client=True) as client:
        run = settled(client.create_flow_run_from_deployment(client.read_deployment_by_name("promote/promote-p").id))
        _, lines = story(run.id)  # the last of them come after the end, from the process of the run
    assert "llm-from-scratch-tiny: version 1 is now champion: the first version" in lines
    store = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert store.get_model_version_by_alias("llm-from-scratch-tiny", "champion").tags["digest"] == digest


class Heard(BaseHTTPRequestHandler):
    """A chat that keeps what it is told."""

    words: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.words.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def chat() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Heard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_failure_is_told_through_the_block_that_the_run_names_and_to_nobody_where_it_names_none(
    prefect_server: str, chat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project(tmp_path / "project", "stages: [none]\n"))
    block = CustomWebhookNotificationBlock(name="ops", url=chat, json_data={"title": "{{subject}}", "text": "{{body}}"})
    block.save("ops", overwrite=True)
    for told in ("", "custom-webhook/ops"):
        state = rebuild.rebuild(notify=told, return_state=True)
        assert state.is_failed()
    crashed = SimpleNamespace(id="1", name="a-run", parameters={"notify": "custom-webhook/ops"})
    # By keyword, as a worker does it whose run is gone. Of such nobody was told.
    notify.tell(flow=flows.sweep, flow_run=crashed, state=SimpleNamespace(name="Crashed", message="killed"))
    word, of_the_worker = Heard.words
    assert word["title"].startswith("rebuild ")
    assert word["title"].endswith(": Failed")
    assert "dvc dag" in word["text"]
    assert of_the_worker["title"] == "sweep a-run: Crashed"


def deployments(suffix: str = "", notify: str = "", tracking_uri: str = "") -> dict[str, dict[str, Any]]:
    tree = YAML(typ="safe").load(ROOT / "pipelines/prefect.yaml")
    return {entry["name"]: entry for entry in deploy.named(tree, suffix, notify, tracking_uri)["deployments"]}


def test_what_is_deployed_has_an_entrypoint_that_is_there_and_parameters_that_it_takes() -> None:
    found = deployments()
    assert list(found) == ["nightly", "gpu", "watch", "sweep", "promote", "serve-smoke"]
    modules = {"pipelines/rebuild.py": rebuild, "pipelines/flows.py": flows}
    for entry in found.values():
        file, _, name = entry["entrypoint"].partition(":")
        flow = getattr(modules[file], name)
        flow.validate_parameters(({"node": "train@base"} if flow is rebuild.train else {}) | entry["parameters"])
        assert entry["work_pool"]["name"] == ("gpu" if "gpu" in entry.get("tags", []) else "local")
    assert found["nightly"]["schedules"][0]["cron"] == "0 3 * * *"


def test_a_second_clone_has_deployments_of_its_own_that_know_each_other() -> None:
    found = deployments(suffix="-b", notify="slack-webhook/ops", tracking_uri="http://mlflow:5000")
    assert found["nightly-b"]["parameters"] == {"trainer": "train/gpu-b", "beside": 1, "notify": "slack-webhook/ops"}
    assert found["watch-b"]["parameters"] == {"rebuild": "rebuild/nightly-b", "notify": "slack-webhook/ops"}
    assert found["gpu-b"]["parameters"] == {}
    assert {entry["work_pool"]["job_variables"]["env"]["MLFLOW_TRACKING_URI"] for entry in found.values()} == {"http://mlflow:5000"}


@pytest.mark.parametrize("script", ["sleep 2; touch {late}", "set -m; (sleep 2; touch {late}) & (exec sleep 60)"], ids=["child", "orphan"])
def test_what_a_flow_started_ends_when_the_flow_is_killed(script: str, tmp_path: Path) -> None:
    """It used to go on with the card; and where it had a process group of its own, as the workers of DVC's queue have, it still did."""
    leash = [*process.LEASH, "bash", "-c", script.format(late=tmp_path / "late")]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, *leash], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"started\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    time.sleep(3)
    assert not (tmp_path / "late").exists()


HOLDER = """\
import subprocess, sys, time
subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
print("started", flush=True)
time.sleep(60)
"""


def test_the_leash_ends_what_was_started_between_its_look_and_its_kill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SIGKILL used to go once to those that were seen, so that such a one kept the card; and one that may not be ended saved all others."""
    late, ready, send = tmp_path / "late", tmp_path / "ready", psutil.Process.send_signal
    script = f"trap '' TERM; trap 'sleep 60 & echo $! > {late}.new; mv {late}.new {late}' USR1; touch {ready}; while sleep 0.1; do :; done"

    def slow(process: psutil.Process, sent: signal.Signals) -> None:
        if sent == signal.SIGTERM:
            raise psutil.AccessDenied(process.pid)
        if not late.exists():
            os.kill(starting.pid, signal.SIGUSR1)
            waited(late.exists, 10, "nothing was started")
        send(process, sent)

    monkeypatch.setattr(psutil.Process, "send_signal", slow)
    monkeypatch.setattr(leash, "GRACE_SECONDS", 0.5)
    with subprocess.Popen(["bash", "-c", script], start_new_session=True) as starting:
        try:
            waited(ready.exists, 10, "it did not start")
            leash.end(starting.pid)
        finally:
            starting.kill()
    assert not alive(int(late.read_text()))


def kubernetes() -> dict[str, Any]:
    return json.loads((ROOT / deploy.KUBERNETES).read_text(encoding="utf-8"))


def test_the_job_of_a_training_asks_for_cards_and_each_of_its_blanks_has_a_variable() -> None:
    template = kubernetes()
    blanks = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert blanks == set(template["variables"]["properties"])
    (container,) = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"] == "{{ gpus }}"


@pytest.mark.slow
def test_the_page_of_a_server_asks_the_server_that_it_came_from(prefect_server: str) -> None:
    """Whichever port that has: by default it would ask port 4200, and show no runs."""
    with urlopen(prefect_server.removesuffix("api") + "ui-settings", timeout=30) as reply:
        assert json.load(reply)["api_url"] == "/api"


@pytest.mark.slow
def test_a_server_takes_the_pool_of_kubernetes_jobs(prefect_server: str) -> None:
    with get_client(sync_client=True) as client:
        made = client.create_work_pool(WorkPoolCreate(name="cluster", type="kubernetes", base_job_template=kubernetes()))
    assert made.base_job_template["variables"]["properties"]["gpus"]["default"] == 1


@pytest.mark.slow
def test_prefects_kubernetes_worker_makes_a_job_of_the_template(prefect_server: str) -> None:
    """Every field of it is one that Kubernetes knows. Without prefect-kubernetes, which is not in the lock, nobody looks."""
    worker = pytest.importorskip("prefect_kubernetes.worker")
    models = pytest.importorskip("kubernetes_asyncio.client")
    make = worker.KubernetesWorkerJobConfiguration.from_template_and_values
    job = asyncio.run(make(kubernetes(), {"env": {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}, "gpus": 2}))
    job.prepare_for_flow_run(FlowRun(id=uuid4(), name="train", flow_id=uuid4()))

    def check(kind: str, tree: Any) -> None:
        if kind.startswith("list["):
            for entry in tree:
                check(kind[5:-1], entry)
        elif hasattr(models, kind):
            names = {json_name: name for name, json_name in getattr(models, kind).attribute_map.items()}
            assert set(tree) <= set(names), kind
            for key, value in tree.items():
                check(getattr(models, kind).openapi_types[names[key]], value)

    check("V1Job", job.job_manifest)
    (container,) = job.job_manifest["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert {"name": "PYTHONPATH", "value": "/project/src"} in container["env"]
