"""The rebuild as a flow on a real Prefect server, the GPU limit, promotion and profiles. Workers and schedules: test_schedules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Set
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
from prefect import flow, get_client
from ruamel.yaml import YAML
from zc.lockfile import LockFile

from llm_from_scratch import bundle, registry, tracking
from llm_from_scratch.evaluation.promotion import Scores
from pipelines import __main__ as commands
from pipelines import bento, dvc, gpu, process, profiles, promote, rebuild, servers, sweep
from pipelines.graph import parse, touched, walk
from tests.prefect_runs import alive, artifacts, environment, project, story, tasks, waited

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


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own with a graph of three nodes, and the flows of ours."""
    ladder, nothing = json.dumps({"ladder": {"b": {"val_bpb": 2.0}}}), json.dumps({"candidates": []})
    files = {"fault": "none\n", "toy.json": ladder, "none.json": nothing}
    root = project(tmp_path / "project", TOY % {"net": tmp_path / "network"}, **files)
    monkeypatch.chdir(root)
    monkeypatch.delenv("REBUILD_ID", raising=False)
    monkeypatch.setitem(rebuild.FLAKY, "download", [0.1])
    return root


DOT = """strict digraph {
"evaluate";
"train@a" -> "quantize@a";
"tokenize" -> "train@a";
"quantize@a" -> "evaluate";
"index" -> "evaluate";
}"""


def walked(dot: str, beside: int, fails: str = "") -> list[set[str]]:
    """What was under way each time that a node was waited for, those that were started last ending first."""
    seen: list[set[str]] = []

    def start(node: str) -> Future[str]:
        future: Future[str] = Future()
        future.node = node  # type: ignore[attr-defined]
        if node == fails:
            future.set_exception(ValueError(f"{node} broke"))
        else:
            future.set_result(node)
        return future

    def first(running: Set[Future[str]]) -> Future[str]:
        seen.append({future.node for future in running})  # type: ignore[attr-defined]
        return list(running)[-1]

    try:
        walk(parse(dot), start, first, beside)
    except ValueError as error:
        seen.append({str(error)})
    return seen


def test_one_at_a_time_each_node_comes_after_what_it_stands_on() -> None:
    order = [node for running in walked(DOT, beside=0) for node in running]
    assert sorted(order) == sorted(parse(DOT))
    for node, below in parse(DOT).items():
        assert all(order.index(other) < order.index(node) for other in below)


def test_beside_what_trains_others_run_but_not_more_of_them_than_may() -> None:
    seen = walked(DOT.replace("}", '"train@b";\n"train@c";\n"download";\n}'), beside=1)
    assert seen[0] == {"tokenize", "train@b", "train@c"} or seen[0] == {"index", "train@b", "train@c"}
    assert all(sum(not node.startswith("train") for node in running) <= 1 for running in seen)


def test_after_a_node_that_fails_none_is_started_and_those_under_way_end_first() -> None:
    seen = walked('"train@a";\n"train@b";\n"train@b" -> "index"', beside=1, fails="train@b")
    assert seen == [{"train@a", "train@b"}, {"train@a"}, {"train@b broke"}]


def test_what_stands_on_a_change_may_be_stale_too() -> None:
    assert touched(parse(DOT), ["train@a"]) == {"train@a", "quantize@a", "evaluate"}


def test_the_real_graph_is_ordered_from_download_to_evaluate() -> None:
    order = [node for running in walked(dvc.output("dag", "--dot"), beside=0) for node in running]
    assert order.index("finetune@sft") < order.index("quantize@chat_int8") < order.index("evaluate")
    assert order[-1] == "evaluate"
    assert sorted(order) == sorted(set(order))


def test_only_training_queues_for_the_gpu() -> None:
    assert [node for node in ("download@x", "train@gpt", "finetune@sft", "index") if gpu.GPU in rebuild.tags(node)] == [
        "train@gpt",
        "finetune@sft",
    ]


@pytest.mark.slow
def test_the_gpu_limit_is_made_once_and_left_as_a_person_set_it(prefect_server: str) -> None:
    gpu.ensure_limit(slots=1)
    with get_client(sync_client=True) as client:
        client.update_global_concurrency_limit(gpu.GPU, _limit(2))
        gpu.ensure_limit(slots=1)
        found = client.read_global_concurrency_limit_by_name(gpu.GPU)
        assert found.limit == 2
        client.update_global_concurrency_limit(gpu.GPU, _limit(1))


def _limit(slots: int):
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    return GlobalConcurrencyLimitUpdate(limit=slots)


@pytest.mark.slow
def test_a_gpu_stage_holds_the_slot_while_it_works_and_gives_it_back(prefect_server: str) -> None:
    gpu.ensure_limit()
    seen: list[int] = []

    @flow
    def watch() -> None:
        with gpu.lease(), get_client(sync_client=True) as client:
            seen.append(client.read_global_concurrency_limit_by_name(gpu.GPU).active_slots)

    watch()
    with get_client(sync_client=True) as client:
        seen.append(client.read_global_concurrency_limit_by_name(gpu.GPU).active_slots)
    assert seen == [1, 0]


SIDE_BY_SIDE = """\
stages:
  slow: {cmd: "touch started; while ! test -e enough; do sleep 0.1; done; echo 1 > slow", outs: [slow]}
  fast: {cmd: "echo 1 > fast", outs: [fast]}
"""


@pytest.mark.slow
def test_two_nodes_of_a_workspace_run_side_by_side_and_the_end_of_one_waits_for_dvcs_lock(tmp_path: Path) -> None:
    """DVC lets go of its lock around a command. When it wanted it back and another had it for 3 s, what the command made was lost."""
    root = project(tmp_path / "project", SIDE_BY_SIDE)
    with subprocess.Popen(dvc.command("repro", "--single-item", "slow"), cwd=root, env=dvc.environment()) as slow:
        waited((root / "started").exists, 60, "the command did not run")
        subprocess.run(dvc.command("repro", "--single-item", "fast"), cwd=root, env=dvc.environment(), check=True)
        held = LockFile(str(root / ".dvc/tmp/lock"))
        (root / "enough").touch()
        time.sleep(5)
        held.close()
    assert slow.returncode == 0
    assert (root / "dvc.lock").read_text().count("md5: ") == 2


@pytest.mark.slow
def test_a_rebuild_runs_each_node_after_what_it_stands_on_and_a_second_one_runs_none(prefect_server: str, toy: Path) -> None:
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
def test_a_node_that_fails_stops_the_rebuild_and_says_why_and_the_next_one_goes_on_from_there(prefect_server: str, toy: Path) -> None:
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
def test_a_failed_rebuild_is_no_traceback_for_who_called_it(prefect_server: str, toy: Path) -> None:
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

    monkeypatch.setattr(process, "get_run_logger", Cancelled)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        process.stream(["sh", "-c", f"(sleep 2; touch {tmp_path}/late) & echo working; sleep 60"])
    assert time.monotonic() - begin < 30
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_a_last_line_that_says_exit_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status used to be read from the lines themselves."""

    class Silent:
        def info(self, line: str) -> None:
            pass

    monkeypatch.setattr(process, "get_run_logger", Silent)
    assert process.stream(["echo", "exit 1"]) == (0, ["exit 1"])
    assert process.stream(["sh", "-c", "for line in $(seq 30); do echo $line; done; exit 3"]) == (3, [str(n) for n in range(19, 31)])


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
    assert tracking.rebuild_address("http://mlflow:5000/").startswith("http://mlflow:5000/#/experiments/")
    assert promote.promote(toy) == ["tiny: version 1 is the champion already"]
    with bundle.writing(toy / "tiny") as folder:
        bundle.seal(folder, "model", "train@tiny")
    with pytest.raises(ValueError, match=r"is about another tiny than the one here; dvc repro evaluate"):
        promote.promote(toy)


def test_nothing_is_promoted_where_dvc_cannot_say_where_its_cache_is(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was asked last, and its error used to take the place of the lines on what had become champion."""
    write_verdict(toy)
    (toy / "dvc.lock").write_text(json.dumps({"stages": {"a": {"outs": [{"path": "artifacts/a", "md5": "11"}]}}}))
    (toy / ".dvc/config").write_text("[no section")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{toy}/mlflow.db")
    with pytest.raises(ValueError, match=r"^dvc cache: "):
        promote.promote(toy)
    assert registry.champion_of("tiny") is None


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


def test_a_command_that_make_did_not_call_finds_the_stores_where_make_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`reload` used to store into ~/bentoml, where no server of `make serve` looks, and `rollback` knew no registry."""
    (tmp_path / "var").mkdir()
    (tmp_path / "var/mlflow.db").touch()
    monkeypatch.chdir(tmp_path)

    def settled(*words: str, **given: str) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", given)
        commands._settle(commands._parser().parse_args(words))
        return given

    stores = {"BENTOML_HOME": f"{tmp_path}/var/bentoml"}
    assert settled("reload") == stores
    for words in (["rollback", "served"], ["restore", "5e1f"], ["serve", "--champion"]):
        assert settled(*words) == {**stores, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/var/mlflow.db"}
    others = {"BENTOML_HOME": "/elsewhere", "MLFLOW_TRACKING_URI": ""}
    assert settled("restore", "5e1f", **others) == others


def test_a_server_that_does_not_stop_is_killed_with_its_family() -> None:
    """A worker with a process group of its own, as BentoML's have, used to stay behind."""
    worker = "import subprocess, time; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        left = int(server.stdout.readline())
        servers.end(server)
    waited(lambda: not alive(left), 10, "the worker lives on")


def test_what_a_server_started_before_it_died_is_ended_too(tmp_path: Path) -> None:
    """It used to keep the port: of a server that had died by itself nobody looked for the family."""
    dies = [sys.executable, "-c", "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"]
    nobody = f"http://127.0.0.1:{servers.free_port()}"
    with (
        pytest.raises(ValueError, match=r"nobody answers at .*; the server said: \d+\n$"),
        servers.running(dies, nobody, log=tmp_path / "log"),
    ):
        pass
    left = int((tmp_path / "log").read_text())
    waited(lambda: not alive(left), 10, "its child lives on")


def test_a_server_ends_with_the_flow_that_was_killed_while_it_ran(tmp_path: Path) -> None:
    """In a session of its own it would go on with the port, and nobody would know."""
    address = f"http://127.0.0.1:{(port := servers.free_port())}"
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    holder = f"import time; from pipelines.servers import running\nwith running({command}, '{address}'): time.sleep(60)"
    flow = subprocess.Popen([*process.LEASH, sys.executable, "-c", holder], stdin=subprocess.PIPE, cwd=ROOT)
    assert flow.stdin is not None
    waited(lambda: servers.answers(address), 60, "no server")
    flow.stdin.close()  # as the kernel does for who is killed
    flow.wait(30)
    assert not servers.answers(address)


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
    assert done.stderr.strip() == "pipelines experiment: no profile 'smok'; there is cluster, gpu, own_documents, smoke"


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


def test_what_a_killed_sweep_left_as_running_is_told_from_what_a_worker_of_this_workspace_runs(tmp_path: Path) -> None:
    """DVC followed the log of such an experiment for ever, and the next sweep never came to its end."""
    status = """\
Task     Name         Created    Status
573515a  long-1       11:06 AM   Running
2c55779  Running-2    11:11 AM   Success
fa77c88               11:13 AM   Running

Worker status: 0 active, 0 idle
"""
    assert sweep.running(status) == ["573515a", "fa77c88"]
    words = [sys.executable, "-c", "import time; time.sleep(60)", "exp", "queue-worker", "dvc-exp-1@localhost"]
    with subprocess.Popen(words, cwd=tmp_path) as worker:
        found = [one for one in psutil.process_iter(["cmdline", "cwd"]) if one.pid == worker.pid]
        assert [sweep.is_worker(found[0], folder) for folder in (tmp_path, ROOT)] == [True, False]
        worker.kill()


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
