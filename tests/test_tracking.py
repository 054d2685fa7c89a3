"""A real MLflow store on sqlite: what a rebuild leaves there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from llm_from_scratch import tracking


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MlflowClient]:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking.connect(uri, rebuild="tuesday", revision="abc123", digests={"artifacts/tokens/x": "0123.dir"})
    yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    tracking.connect("", "", "", {})


def test_stages_of_one_rebuild_are_nested_under_one_run(store: MlflowClient) -> None:
    for name in ("gpt", "base"):
        with tracking.stage_run("train", name, {"steps": 3, "model": {"width": 8}}, ["artifacts/tokens/x"]) as log:
            for step in range(3):
                log(step, {"val_bpb": 3.0 - step})

    runs = named_runs(store)
    parent = runs.pop("rebuild tuesday")
    assert set(runs) == {"train@gpt", "train@base"}
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params == {"steps": "3", "model.width": "8"}
        assert {key: value for key, value in run.data.metrics.items() if not key.startswith("system/")} == {"val_bpb": 1.0}
        assert run.inputs.dataset_inputs[0].dataset.digest == "0123"
        assert [point.value for point in store.get_metric_history(run.info.run_id, "val_bpb")] == [3.0, 2.0, 1.0]


def test_a_stage_that_fails_leaves_a_failed_run_and_its_error(store: MlflowClient) -> None:
    with pytest.raises(ValueError, match="on purpose"), tracking.stage_run("train", "gpt", {}):
        raise ValueError("on purpose")
    assert {name: run.info.status for name, run in named_runs(store).items()} == {"train@gpt": "FAILED", "rebuild tuesday": "FAILED"}


def test_a_run_says_how_busy_the_machine_was(store: MlflowClient) -> None:
    """Under MLflow's own names, so that its page has them under System metrics; the shortest run has one reading."""
    with tracking.stage_run("train", "gpt", {}) as log:
        log(0, {"val_bpb": 3.0})
    metrics = named_runs(store)["train@gpt"].data.metrics
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert 0 < metrics["system/process_memory_megabytes"] < metrics["system/system_memory_usage_megabytes"]


def test_a_run_inside_an_experiment_of_dvcs_carries_its_name(store: MlflowClient) -> None:
    tracking.connect(tracking.connected().uri, "sweep", "abc123", {}, experiment="pithy-hawk")
    with tracking.stage_run("train", "base", {"learning_rate": 0.01}):
        pass
    assert named_runs(store)["train@base"].data.tags["experiment"] == "pithy-hawk"


def named_runs(store: MlflowClient) -> dict[str, Run]:
    (experiment,) = [found for found in store.search_experiments() if found.name == tracking.EXPERIMENT]
    return {run.info.run_name: run for run in store.search_runs([experiment.experiment_id])}


def test_a_rebuild_that_had_nothing_to_do_leaves_no_run(store: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("# Report")
    tracking.log_files("report", [tmp_path / "report.md"])
    (experiment,) = [found for found in store.search_experiments() if found.name == tracking.EXPERIMENT]
    assert not store.search_runs([experiment.experiment_id])

    with tracking.stage_run("evaluate", "", {}):
        pass
    tracking.log_files("report", [tmp_path / "report.md"])
    (parent,) = store.search_runs([experiment.experiment_id], "tags.level = 'rebuild'")
    assert [file.path for file in store.list_artifacts(parent.info.run_id, "report")] == ["report/report.md"]


def test_without_a_uri_tracking_is_silent_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracking.connect("", "", "", {})
    with tracking.stage_run("train", "gpt", {"steps": 1}) as log:
        log(0, {"val_bpb": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written_does_not_stop_the_work(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    tracking.connect(f"sqlite:///{tmp_path}/mlflow.db", "tuesday", "", {})
    with pytest.warns(UserWarning, match="the build goes on"), tracking.stage_run("train", "gpt", {}) as log:
        log(0, {"val_bpb": 1.0})
    tracking.connect("", "", "", {})


def test_of_a_server_that_is_not_there_the_first_word_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be the last library's account, cut off before its reason."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking.connect("http://anna:secret@127.0.0.1:9", "tuesday", "", {})  # a password is nobody's to read in a log
    said = r"^MLflow at http://127.0.0.1:9 did not take this \(ConnectionRefusedError: \S+ 111. Connection refused\); the build goes on"
    with pytest.warns(UserWarning, match=said), tracking.stage_run("train", "gpt", {}):
        pass
    tracking.connect("", "", "", {})


def test_what_a_store_missed_is_there_after_the_next_connection(tmp_path: Path) -> None:
    """It used to be lost: a warning was all that remained of it."""
    broken, uri, waiting = f"sqlite:///{tmp_path}/broken.db", f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "spool"
    (tmp_path / "broken.db").write_bytes(b"this is no database" * 100)
    tracking.connect(broken, "tuesday", "abc123", {"artifacts/tokens/x": "0123.dir"}, spool=waiting)
    with pytest.warns(UserWarning, match="the build goes on, and what it missed waits in .*spool") as heard:
        five_hundred_steps()
    assert len(heard) == 1, "once is enough"
    tracking.connect(uri, "wednesday", "abc124", {}, spool=waiting)
    tracking.catch_up()
    tracking.connect("", "", "", {})

    store = MlflowClient(tracking_uri=uri)
    (experiment,) = [found for found in store.search_experiments() if found.name == tracking.EXPERIMENT]
    runs = {run.info.run_name: run for run in store.search_runs([experiment.experiment_id])}
    assert set(runs) == {"rebuild tuesday", "train@gpt"}
    late = runs["train@gpt"]
    assert (late.info.status, late.data.params, late.data.tags["revision"]) == ("FINISHED", {"steps": "3"}, "abc123")
    assert late.inputs.dataset_inputs[0].dataset.digest == "0123"
    points = store.get_metric_history(late.info.run_id, "val_bpb")
    assert [point.step for point in points] == list(range(500))
    assert late.info.start_time <= points[0].timestamp <= points[-1].timestamp <= late.info.end_time
    assert not list(waiting.iterdir())


def five_hundred_steps() -> None:
    with tracking.stage_run("train", "gpt", {"steps": 3}, ["artifacts/tokens/x"]) as log:
        for step in range(500):
            log(step, {"val_bpb": 3.0 - step / 500})


def test_records_that_are_told_twice_are_there_once(store: MlflowClient) -> None:
    with tracking.stage_run("train", "gpt", {"steps": 3}) as log:
        log(1, {"val_bpb": 3.0})
    (experiment,) = [found for found in store.search_experiments() if found.name == tracking.EXPERIMENT]
    (run,) = [found for found in store.search_runs([experiment.experiment_id]) if found.info.run_name == "train@gpt"]
    (point,) = store.get_metric_history(run.info.run_id, "val_bpb")
    begin = {"kind": "begin", "at": 1, "title": "train@gpt", "tags": {"rebuild": "tuesday", "revision": ""}, "params": {"steps": "3"}}
    for record in (begin | {"inputs": {"x": "01"}}, {"kind": "metrics", "points": [["val_bpb", 3.0, point.timestamp, 1]]}):
        for _ in range(2):
            tracking._record(run.data.tags["key"], record)
    assert len(store.search_runs([experiment.experiment_id])) == 2
    assert len(store.get_metric_history(run.info.run_id, "val_bpb")) == 1
    assert len(store.get_run(run.info.run_id).inputs.dataset_inputs) == 1
