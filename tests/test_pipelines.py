"""A real Prefect server: the deployment with its schedule, the GPU limit, and one flow run through a worker's hands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow, get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness
from ruamel.yaml import YAML

from llm_from_scratch import bundle, registry
from llm_from_scratch.evaluation.promotion import Scores
from pipelines import bento, dvc, profiles, promote, rebuild, sweep

ROOT = Path(__file__).parent.parent


TOY = """\
stages:
  download:
    matrix: {source: [a]}
    cmd: "echo fetching ${item.source}; test -e %(net)s || { touch %(net)s; echo no network; exit 1; }; echo text > raw"
    outs: [raw]
  train:
    foreach: {b: {}}
    do:
      cmd: "echo learning for $REBUILD_ID; cat raw fault > model && ! grep broken model"
      deps: [raw, fault]
      outs: [model]
  evaluate:
    cmd: "mkdir -p reports; echo '# It works' > reports/report.md; cp toy.json reports/metrics.json; cp none.json reports/verdict.json"
    deps: [model]
    outs: [reports]
"""
"""A graph as ours in small. The first download of all fails, as networks do; what `fault` holds breaks the training."""


README_STAGE = """\
def run(params, name, root):
    (root / "README.md").write_text((root / "reports" / "metrics.json").read_text())
"""


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own with a graph of three nodes, and the flows of ours."""
    root = tmp_path / "project"
    for code in ("pipelines", "stages"):
        shutil.copytree(ROOT / code, root / code, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
    (root / "stages" / "readme.py").write_text(README_STAGE)
    (root / "dvc.yaml").write_text(TOY % {"net": tmp_path / "network"})
    (root / "fault").write_text("none\n")
    (root / "toy.json").write_text(json.dumps({"ladder": {"b": {"val_bpb": 2.0}}}))
    (root / "none.json").write_text(json.dumps({"candidates": []}))
    monkeypatch.chdir(root)
    monkeypatch.delenv("REBUILD_ID", raising=False)
    monkeypatch.setitem(rebuild.FLAKY, "download", [0.1])
    dvc.output("init", "--no-scm", "--quiet")
    return root


def test_nodes_come_after_what_they_stand_on() -> None:
    order = rebuild.nodes_in_order(
        'strict digraph {\n"evaluate";\n"train@a" -> "quantize@a";\n"tokenize" -> "train@a";\n"quantize@a" -> "evaluate";\n}'
    )
    assert order == ["tokenize", "train@a", "quantize@a", "evaluate"]


def test_the_real_graph_is_ordered_from_download_to_evaluate() -> None:
    order = rebuild.nodes_in_order(dvc.output("dag", "--dot"))
    assert order.index("finetune@sft") < order.index("quantize@chat_int8") < order.index("evaluate")
    assert order[-1] == "evaluate"
    assert sorted(order) == sorted(set(order))


def test_only_training_queues_for_the_gpu() -> None:
    assert [node for node in ("download@x", "train@gpt", "finetune@sft", "index") if rebuild.GPU in rebuild.tags(node)] == [
        "train@gpt",
        "finetune@sft",
    ]


@pytest.mark.slow
def test_the_gpu_limit_is_made_once_and_left_as_a_person_set_it(server: None) -> None:
    rebuild.ensure_gpu_limit(slots=1)
    with get_client(sync_client=True) as client:
        client.update_global_concurrency_limit(rebuild.GPU, _limit(2))
        rebuild.ensure_gpu_limit(slots=1)
        found = client.read_global_concurrency_limit_by_name(rebuild.GPU)
        assert found.limit == 2
        client.update_global_concurrency_limit(rebuild.GPU, _limit(1))


def _limit(slots: int):
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    return GlobalConcurrencyLimitUpdate(limit=slots)


@pytest.mark.slow
def test_a_gpu_stage_holds_the_slot_while_it_works_and_gives_it_back(server: None) -> None:
    rebuild.ensure_gpu_limit()
    seen: list[int] = []

    @flow
    def watch() -> None:
        with rebuild.lease("train@base"), get_client(sync_client=True) as client:
            seen.append(client.read_global_concurrency_limit_by_name(rebuild.GPU).active_slots)

    watch()
    with get_client(sync_client=True) as client:
        seen.append(client.read_global_concurrency_limit_by_name(rebuild.GPU).active_slots)
    assert seen == [1, 0]


@pytest.mark.slow
def test_a_rebuild_runs_each_node_after_what_it_stands_on_and_a_second_one_runs_none(server: None, toy: Path) -> None:
    first = rebuild.rebuild(return_state=True)
    run, said = story(first.state_details.flow_run_id)
    assert first.is_completed()
    assert tasks(run) == ["download@a", "train@b", "evaluate", "readme", "register"]
    assert said.index("no network") < said.index(f"learning for {run.name}-{str(run.id)[:8]}")
    assert said.count("fetching a") == 2
    assert said[-1] == "no MLFLOW_TRACKING_URI: nothing registered"
    kept = artifacts(run)
    assert kept["report"] == "# It works\n"
    assert json.loads(kept["ladder"]) == [{"rung": "b", "val_bpb": 2.0}]

    run, said = story(rebuild.rebuild(return_state=True).state_details.flow_run_id)
    assert tasks(run) == ["download@a", "train@b", "evaluate", "readme", "register"]
    assert not [line for line in said if line.startswith(("Running", "fetching", "learning"))]
    assert said.count("Data and pipelines are up to date.") == 3


@pytest.mark.slow
def test_a_node_that_fails_stops_the_rebuild_and_says_why_and_the_next_one_goes_on_from_there(server: None, toy: Path) -> None:
    (toy / "fault").write_text("broken wire\n")
    failed = rebuild.rebuild(return_state=True)
    run, _ = story(failed.state_details.flow_run_id)
    assert failed.is_failed()
    assert tasks(run) == ["download@a", "train@b"]
    assert str(failed.result(raise_on_failure=False)).startswith("train@b ended with ")
    assert "\nbroken wire\n" in str(failed.result(raise_on_failure=False))
    assert not (toy / "reports").exists()

    (toy / "fault").write_text("none\n")
    mended = rebuild.rebuild(return_state=True)
    run, said = story(mended.state_details.flow_run_id)
    assert mended.is_completed()
    assert "fetching a" not in said


@pytest.mark.slow
def test_a_failed_rebuild_is_no_traceback_for_who_called_it(server: None, toy: Path) -> None:
    (toy / "dvc.yaml").write_text("stages: [none]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "rebuild"], cwd=toy, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("pipelines rebuild: dvc dag: ")


def test_a_prefect_server_that_is_not_there_is_one_line_after_what_prefect_says(toy: Path) -> None:
    """RuntimeError used to go past the command's own handling, as a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "rebuild"],
        cwd=toy,
        env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("pipelines rebuild: Failed to reach API at http://127.0.0.1:9/api/; start it with")
    )


def test_a_rebuild_that_is_broken_off_ends_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to wait for the stage, or leave it behind with DVC's lock."""

    class Cancelled:
        def info(self, line: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(rebuild, "get_run_logger", Cancelled)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        rebuild.stream(["sh", "-c", f"(sleep 2; touch {tmp_path}/late) & echo working; sleep 60"])
    assert time.monotonic() - begin < 30
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_a_last_line_that_says_exit_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status used to be read from the lines themselves."""

    class Silent:
        def info(self, line: str) -> None:
            pass

    monkeypatch.setattr(rebuild, "get_run_logger", Silent)
    assert rebuild.stream(["echo", "exit 1"]) == (0, ["exit 1"])
    assert rebuild.stream(["sh", "-c", "for line in $(seq 30); do echo $line; done; exit 3"]) == (3, [str(n) for n in range(19, 31)])


@pytest.mark.slow
def test_the_nightly_deployment_is_scheduled_and_a_worker_runs_it_in_its_folder(server: None, toy: Path) -> None:
    prefect("work-pool", "create", "--type", "process", "local", cwd=toy)
    prefect("--no-prompt", "deploy", "--prefect-file", "pipelines/prefect.yaml", "--all", cwd=toy)
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("rebuild/nightly")
        assert deployment.work_pool_name == "local"
        assert [schedule.schedule.cron for schedule in deployment.schedules] == ["0 3 * * *"]
        assert deployment.entrypoint == "pipelines/rebuild.py:rebuild"
        assert deployment.job_variables["env"]["MLFLOW_TRACKING_URI"] == "sqlite:///var/mlflow.db"
        quiet = {"env": {"MLFLOW_TRACKING_URI": ""}}
        (toy.parent / "network").touch()
        ordered = client.create_flow_run_from_deployment(deployment.id, job_variables=quiet)
    prefect("worker", "start", "--pool", "local", "--run-once", cwd=toy.parent)
    run, said = story(ordered.id)
    assert run.state_type == StateType.COMPLETED, said
    assert (toy / "reports" / "report.md").exists()


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
    return {**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())}


def prefect(*arguments: str, cwd: Path) -> None:
    """The real command against the server of this session."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_promoted_carries_the_commit_of_its_code(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tag used to be empty."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "fault"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    write_verdict(toy)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{toy}/mlflow.db")

    assert promote.promote(toy) == ["tiny: version 1 is now champion: the first version"]
    champion = registry.champion_of("tiny")
    assert champion is not None
    assert champion.tags["revision"] == commit
    assert champion.description == "# A card\n\n## Promotion\n\nPromoted: the first version."
    assert promote.promote(toy) == ["tiny: version 1 is the champion already"]
    with bundle.writing(toy / "tiny") as folder:
        bundle.seal(folder, "model", "train@tiny")
    with pytest.raises(ValueError, match=r"is about another tiny than the one here; dvc repro evaluate"):
        promote.promote(toy)


def test_a_registry_that_cannot_be_read_is_one_line(toy: Path) -> None:
    write_verdict(toy)
    (toy / "mlflow.db").write_bytes(b"this is no database" * 100)
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{toy}/mlflow.db"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "promote"], cwd=toy, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("pipelines promote: MLflow at sqlite:///")


def write_verdict(root: Path) -> None:
    """One candidate, as evaluate leaves it."""
    with bundle.writing(root / "tiny") as folder:
        (folder / "weights").write_text("1 2 3")
        digest = bundle.seal(folder, "model", "train@tiny").digest
    (root / "reports").mkdir()
    (root / "card.md").write_text("# A card")
    (root / "scores.json").write_text(Scores("val_bpb", {"a": (2.0, 1.0)}).to_json())
    for name in ("report.md", "metrics.json"):
        (root / "reports" / name).write_text("{}")
    entry = {"name": "tiny", "folder": "tiny", "card": "card.md", "digest": digest, "metrics": {"val_bpb": 2.0}, "beside": {}}
    entry["facts"] = {"kind": "model", "made_by": "train@tiny", "asked": "text"}
    entry["scores"] = {"file": "scores.json", "sha256": bundle.file_digest(root / "scores.json")}
    rule = {"minimum_gain": 0.01, "minimum_units": 20, "resamples": 500, "confidence": 0.95, "seed": 1}
    (root / "reports" / "verdict.json").write_text(json.dumps({"rule": rule, "candidates": [entry]}))


def test_packaging_reads_params_as_strictly_as_a_stage(tmp_path: Path) -> None:
    """A wrong key used to be a page of pydantic's, a missing section a KeyError, a stray bracket a traceback."""
    told = (ROOT / "params.yaml").read_text(encoding="utf-8")
    for wrong, complaint in {
        told.replace("deadline_seconds", "deadline"): r"^params.yaml: serve.deadline",
        told.replace("\nserve:", "\nsurf:"): r"^params.yaml: serve: missing",
        told + "]": r"^params.yaml: while parsing",
    }.items():
        (tmp_path / "params.yaml").write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match=complaint):
            bento.package(tmp_path, "")


def test_a_profile_becomes_settings_that_dvc_understands() -> None:
    overlay = {"train": {"base": {"steps": 3, "model": {"width": 8}}}, "download": {"mirror": ""}}
    assert list(profiles.settings(overlay)) == ["train.base.steps=3", "train.base.model.width=8", 'download.mirror=""']


def test_an_unknown_profile_is_one_line_with_those_there_are() -> None:
    done = subprocess.run([sys.executable, "-m", "pipelines", "experiment", "smok"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "pipelines experiment: no profile 'smok'; there is cluster, gpu, smoke"


def test_a_grid_is_lists_of_what_is_tried_in_the_form_that_dvc_combines() -> None:
    grid = {"train": {"base": {"learning_rate": [0.01, 0.02], "optimizer": ["muon", "adamw"], "steps": 3}}}
    assert list(sweep.choices(grid)) == [
        "train.base.learning_rate=0.01,0.02",
        'train.base.optimizer="muon","adamw"',
        "train.base.steps=3",
    ]


def test_the_shipped_grid_tries_what_params_has() -> None:
    shipped = YAML(typ="safe").load(ROOT / "params.yaml")
    for path in (ROOT / "profiles" / "grids").glob("*.yaml"):
        for choice in sweep.choices(YAML(typ="safe").load(path)):
            value = shipped
            for step in choice.split("=")[0].split("."):
                value = value[step]
            assert not isinstance(value, dict)


def test_a_sweep_of_nothing_or_by_no_name_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles" / "grids").mkdir(parents=True)
    (tmp_path / "profiles" / "grids" / "dull.yaml").write_text("train: {base: {steps: 3}}")
    with pytest.raises(ValueError, match="no grid 'bse'; there is dull"):
        sweep.sweep(tmp_path, "bse", "", [], "x", 1)
    with pytest.raises(ValueError, match=r"profiles/grids/dull.yaml tries nothing: wanted a list of values somewhere"):
        sweep.sweep(tmp_path, "dull", "", [], "x", 1)


def test_of_what_dvc_shows_a_sweep_keeps_its_own_rows_and_what_differs() -> None:
    shown = """\
Experiment,rev,typ,Created,parent,State,Executor,seconds,val_bpb,steps,learning_rate
,master,baseline,2026-01-01T00:00:00,,,,9.1,2.5,3,0.01
grid-a-10,9568,branch_commit,2026-01-01T00:00:01,,Success,Dvc-task,9.2,2.4,3,0.02
grid-a-9,dc7e,branch_base,2026-01-01T00:00:02,,Success,Dvc-task,9.3,2.5,3,0.01
grid-b-1,dc7f,branch_base,2026-01-01T00:00:03,,Success,Dvc-task,9.4,2.6,3,0.04
"""
    assert sweep.table(shown, "grid-a").splitlines() == [
        "| Experiment | val_bpb | learning_rate |",
        "| --- | --- | --- |",
        "| grid-a-9 | 2.5 | 0.01 |",
        "| grid-a-10 | 2.4 | 0.02 |",
    ]
