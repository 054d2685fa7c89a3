"""What every test starts from: nothing of this machine's runs is written to, and nothing leaves it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch, mlflow, prefect or great_expectations is imported anywhere.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
for name, value in {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "2000",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}.items():
    os.environ.setdefault(name, value)
os.environ.pop("MLFLOW_TRACKING_URI", None)
if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores, so that none waits for threads of another
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))

# Before pip, whose finder the download stage uses, takes away the shim through which setuptools, and so torch.compile, finds distutils.
import setuptools  # noqa: E402, F401

LONGEST = ("test_pipeline.py", "test_schedules.py", "test_pipelines.py", "test_benchmarks_training.py", "test_service.py")
"""Files to begin with, where several processes take a file each: begun last, one would keep the others waiting."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the tests marked long too: more of what the others show on an example")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long; make test-long runs it"))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real one, for all tests of a session: it takes half a minute to start."""
    from tests.prefect_runs import real_server

    with real_server(tmp_path_factory.mktemp("prefect")) as address:
        yield address
