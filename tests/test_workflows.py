"""What GitHub runs: pinned, with the least rights, and only what a person can run here; and the hooks that run before a commit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
HERE = Path(sys.executable).parent
PIN = re.compile(r"uses: (?P<action>[\w./-]+)@(?P<commit>[0-9a-f]{40}) # (?P<version>v\d+\.\d+\.\d+)$")

by_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    return loaded


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(path)["jobs"]
    return found


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(path).values():
        yield from job["steps"]


def commands(path: Path) -> list[str]:
    """Each command of each `run`: lines, and what `&&` or `|` joins on one."""
    lines = [line for step in steps(path) for line in step.get("run", "").splitlines()]
    return [part.strip().removesuffix("&").strip() for line in lines for part in re.split(r" && | \| ", line)]


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here; make workflows brings it")
    return found


def pinned_tools() -> dict[str, str]:
    lines = (GITHUB / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


# What others' code may do.


@by_workflow
def test_every_action_is_pinned_to_a_commit_and_says_which_version_that_is(path: Path) -> None:
    used = [line.strip().removeprefix("- ") for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"\s*(- )?uses:", line)]

    assert len(used) == len([step for step in steps(path) if "uses" in step])
    assert [line for line in used if not PIN.match(line)] == []


def test_one_action_is_one_commit_everywhere() -> None:
    pins = {found.groups() for path in WORKFLOWS for line in path.read_text(encoding="utf-8").splitlines() if (found := PIN.search(line))}

    assert len(pins) == len({action for action, _, _ in pins})


@by_workflow
def test_a_workflow_may_do_nothing_and_each_of_its_jobs_says_what_it_may(path: Path) -> None:
    assert read(path)["permissions"] == {}
    for name, job in jobs(path).items():
        may = job["permissions"]
        assert isinstance(may, dict), name
        assert set(may.values()) <= {"read"} or (path.stem, name) == ("release", "publish")


@by_workflow
def test_every_job_ends_in_time_and_a_newer_run_is_told_from_an_older(path: Path) -> None:
    assert "concurrency" in read(path)
    for name, job in jobs(path).items():
        assert job["timeout-minutes"] <= 120, name


@by_workflow
def test_no_job_sees_a_secret_and_no_checkout_leaves_its_token_behind(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert not {"pull_request_target", "workflow_run"} & set(read(path)["on"])
    assert "secrets." not in text
    assert path.stem != "ci" or "github.token" not in text
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_what_is_released_comes_out_of_no_cache_and_the_job_that_publishes_runs_no_code_of_ours() -> None:
    release = next(path for path in WORKFLOWS if path.stem == "release")

    assert "actions/cache" not in release.read_text(encoding="utf-8")
    assert [step["uses"].split("@")[0] for step in jobs(release)["publish"]["steps"] if "uses" in step] == [
        "actions/download-artifact",
        "actions/attest",
    ]


@by_workflow
def test_no_expression_is_pasted_into_a_script(path: Path) -> None:
    """A branch can be named `$(rm -rf .)`: what comes from outside goes through the environment, where no shell reads it as code."""
    assert [step["run"] for step in steps(path) if "${{" in step.get("run", "")] == []


# What is run is here.


@by_workflow
def test_a_workflow_makes_only_what_the_makefile_has(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    made = {target for command in commands(path) if command.startswith("make ") for target in command.split()[1:]}

    assert made <= targets


@by_workflow
def test_a_workflow_calls_only_what_the_environment_and_this_folder_have(path: Path) -> None:
    for command in commands(path):
        for script in re.findall(r"(?<![\w/])\.github/\w+\.sh", command):
            assert os.access(ROOT / script, os.X_OK), script
        for name in re.findall(r"\.venv/bin/(\w+)", command):
            assert (HERE / name).exists(), name
        for module in re.findall(r"python -m (\w+)", command):
            assert (ROOT / module).is_dir() or (HERE / module).exists(), module


def test_together_the_jobs_run_all_that_the_test_target_runs() -> None:
    """`make test` is lint, types and all tests; the notebooks' tests are left out of one job because another has them."""
    ran = commands(next(path for path in WORKFLOWS if path.stem == "ci"))

    assert {
        "make lint types",
        "make notebooks",
        "make docs",
        ".venv/bin/python -m pytest --numprocesses auto --dist loadfile --ignore=tests/test_notebooks.py",
    } <= set(ran)


def test_dependabot_watches_the_packages_the_actions_and_the_image() -> None:
    watched = {one["package-ecosystem"]: one for one in read(GITHUB / "dependabot.yml")["updates"]}

    assert set(watched) == {"pip", "github-actions", "docker"}
    for folder in watched["pip"]["directories"]:
        assert any((ROOT / folder.lstrip("/") / name).exists() for name in ("pyproject.toml", "requirements.txt"))


# The hooks.


def test_the_hooks_run_the_tools_of_this_environment_and_others_at_the_one_pinned_version() -> None:
    hooks = [hook for repository in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    brought = {line for hook in hooks for line in hook.get("additional_dependencies", [])}

    assert brought <= {f"{name}=={version}" for name, version in pinned_tools().items()}
    for hook in hooks:
        if hook["language"] == "system":
            assert (HERE / hook["entry"].split()[0].removeprefix(".venv/bin/")).exists(), hook["id"]
    assert {"ruff-check", "ruff-format", "mypy", "zizmor", "actionlint"} <= {hook["id"] for hook in hooks}


# What the tools say.


def test_zizmor_finds_nothing() -> None:
    done = subprocess.run(
        [tool("zizmor"), "--offline", "--persona", "pedantic", "--format", "json", "--no-exit-codes", "."],
        cwd=GITHUB,
        capture_output=True,
        text=True,
        check=True,
    )

    assert json.loads(done.stdout) == []


def test_actionlint_finds_nothing() -> None:
    done = subprocess.run([tool("actionlint"), "-no-color", *WORKFLOWS], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run([tool("shellcheck"), *sorted(GITHUB.glob("*.sh"))], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "")


# The summary of a toy rebuild.


GRAPH = """\
stages:
  evaluate:
    cmd: python evaluate.py
    params: [train.steps]
    deps: [evaluate.py]
    outs: [reports/report.md: {cache: false}]
    metrics: [reports/metrics.json: {cache: false}]
"""
EVALUATE = """\
import json, pathlib, ruamel.yaml
steps = ruamel.yaml.YAML().load(pathlib.Path("params.yaml"))["train"]["steps"]
pathlib.Path("reports/report.md").write_text(f"# After {steps} steps")
pathlib.Path("reports/metrics.json").write_text(json.dumps({"ladder": {"gpt": {"val_bpb": %s / steps}}}))
"""


def sh(project: Path, *command: str) -> str:
    environment = {**os.environ, "PATH": f"{HERE}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commit(project: Path, learns: int) -> str:
    """The commit of a project whose full rebuild, of 100 steps, was run and committed."""
    (project / "evaluate.py").write_text(EVALUATE % learns)
    sh(project, sys.executable, "evaluate.py")
    sh(project, "git", "add", "--all")
    sh(project, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "--message", "full rebuild")
    return sh(project, "git", "rev-parse", "HEAD").strip()


@pytest.mark.slow
def test_the_summary_compares_toy_numbers_with_toy_numbers_and_full_ones_with_full_ones(tmp_path: Path) -> None:
    for code in ("pipelines", "stages"):
        shutil.copytree(ROOT / code, tmp_path / code, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(GITHUB / "summary.sh", tmp_path / "summary.sh")
    (tmp_path / "reports").mkdir()
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "smoke.yaml").write_text("train: {steps: 4}\n")
    (tmp_path / "params.yaml").write_text("train: {steps: 100}\n")
    (tmp_path / "dvc.yaml").write_text(GRAPH)
    (tmp_path / ".gitignore").write_text(".venv\n__pycache__\n")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    sh(tmp_path, "git", "init", "--quiet")
    sh(tmp_path, sys.executable, "-m", "dvc", "init", "--quiet")
    base, _ = commit(tmp_path, learns=200), commit(tmp_path, learns=100)
    sh(tmp_path, sys.executable, "-m", "pipelines", "experiment", "smoke")

    said = sh(tmp_path, "bash", "summary.sh", base)
    numbers = [[float(cell) for cell in re.findall(r"-?\d+\.?\d*(?= *\|)", line)] for line in said.splitlines() if "val_bpb" in line]

    assert "# After 4 steps" in said
    assert numbers == [[50.0, 25.0, -25.0], [2.0, 1.0, -1.0]]
    assert "no earlier commit" in sh(tmp_path, "bash", "summary.sh", "0" * 40)
