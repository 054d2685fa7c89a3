"""A sweep: every combination in a grid is an experiment of DVC's, run in a folder of its own, and a run of MLflow's beside the others.

A grid is a file of profiles/grids/ in which a list holds what is tried, and anything else holds for all. DVC queues the combinations, so a
sweep that is broken off goes on with `dvc queue start`, and what finished is kept in `dvc exp show`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pipelines import dvc, profiles

GRIDS = profiles.FOLDER / "grids"
TIMES = ("rev", "typ", "parent", "Created", "seconds", "tok_per_s", "resumed_at")
"""Ends of columns in DVC's table that differ between any two runs, or say nothing of them."""


def choices(tree: Mapping[str, Any]) -> list[str]:
    """`path=one,other` for each leaf of a grid, in the form in which `dvc exp run -S` takes what is to be combined."""
    leaves = ((path, value if isinstance(value, list) else [value]) for path, value in profiles.leaves(tree))
    return [f"{path}={','.join(map(json.dumps, values))}" for path, values in leaves]


def sweep(root: Path, grid: str, profile: str, targets: Sequence[str], name: str, jobs: int) -> int:
    """Run `targets` of the graph at every point of `grid`, under `profile` if one is named; the exit status of DVC.

    Every run in MLflow carries the name of its experiment and stands under the run `rebuild <name>`. Raises ValueError where there is no
    such grid or profile, or nothing in the grid to try.
    """
    wanted = choices(profiles.overlay(grid, GRIDS))
    if not any("," in choice for choice in wanted):
        raise ValueError(f"{GRIDS / grid}.yaml tries nothing: wanted a list of values somewhere, as in learning_rate: [0.01, 0.02]")
    settings = [*(profiles.settings(profiles.overlay(profile)) if profile else ()), *wanted]
    told = [argument for setting in settings for argument in ("-S", setting)]
    environment = dvc.environment() | {"REBUILD_ID": name} | absolute_store(root)
    forget_the_dead(root)
    for command in (["exp", "run", "--queue", "--name", name, *told, *targets], ["exp", "run", "--run-all", "--jobs", str(jobs)]):
        if status := subprocess.run(dvc.command(*command), env=environment, check=False).returncode:
            return status
    return 0


def forget_the_dead(root: Path) -> None:
    """Tell DVC that what it takes for running has failed, where it has no worker that could run it.

    A sweep that was killed leaves such, and DVC would follow their logs for ever, with the card in its hands.
    """
    if any(is_worker(process, root) for process in psutil.process_iter(["cmdline", "cwd"])):
        return
    if dead := running(dvc.output("queue", "status")):
        dvc.output("queue", "kill", "--force", *dead)


def running(status: str) -> list[str]:
    """Of `dvc queue status`, the tasks that it calls running."""
    return re.findall(r"^([0-9a-f]{7,})\s.*\sRunning\s*$", status, re.MULTILINE)


def is_worker(process: psutil.Process, root: Path) -> bool:
    """Whether it takes experiments out of the queue of the workspace `root`."""
    return "queue-worker" in (process.info["cmdline"] or ()) and process.info["cwd"] == str(root.resolve())


def table(shown: str, name: str) -> str:
    """Of `dvc exp show --csv`, the experiments of the sweep `name` and what differs between them, in Markdown, by name."""
    rows = [row for row in csv.DictReader(shown.splitlines()) if re.fullmatch(rf"{re.escape(name)}-\d+", row["Experiment"])]
    differing = [column for column in (rows[0] if rows else {}) if len({row[column] for row in rows}) > 1]
    columns = [column for column in differing if not column.endswith(TIMES)]
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in sorted(rows, key=_number))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(row: Mapping[str, str]) -> int:
    return int(row["Experiment"].rsplit("-", 1)[1])


def absolute_store(root: Path) -> dict[str, str]:
    """The MLflow of the environment, its path so that an experiment finds it from the folder in which DVC runs it."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    path = uri.removeprefix("sqlite:///")
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{(root / path).resolve()}"} if uri.startswith("sqlite:///") else {}
