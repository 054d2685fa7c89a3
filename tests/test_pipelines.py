"""A real Prefect server: the deployment with its schedule, the GPU limit, and one flow run through a worker's hands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow, get_client
from prefect.testing.utilities import prefect_test_harness

from pipelines import dvc, profiles, rebuild

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


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
def test_the_nightly_deployment_has_its_schedule_and_pool(server: None) -> None:
    prefect("work-pool", "create", "--type", "process", "local")
    prefect("--no-prompt", "deploy", "--prefect-file", "pipelines/prefect.yaml", "--all")
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("rebuild/nightly")
    assert deployment.work_pool_name == "local"
    assert [schedule.schedule.cron for schedule in deployment.schedules] == ["0 3 * * *"]
    assert deployment.entrypoint == "pipelines/rebuild.py:rebuild"


def prefect(*arguments: str) -> None:
    """The real command against the server of this session."""
    import os

    from prefect.settings import PREFECT_API_URL

    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=ROOT,
        env={**os.environ, "PREFECT_API_URL": str(PREFECT_API_URL.value())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_profile_becomes_settings_that_dvc_understands() -> None:
    overlay = {"train": {"base": {"steps": 3, "model": {"width": 8}}}, "download": {"mirror": ""}}
    assert list(profiles.settings(overlay)) == ["train.base.steps=3", "train.base.model.width=8", 'download.mirror=""']


def test_an_unknown_profile_is_one_line_with_those_there_are() -> None:
    done = subprocess.run([sys.executable, "-m", "pipelines", "experiment", "smok"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "pipelines experiment: no profile 'smok'; there is gpu, smoke"
