"""The dvc command, with this Python first on its PATH: the graph's commands begin with `python`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def command(*arguments: str) -> list[str]:
    """DVC waits for another of its own in this workspace, which holds the lock only for its own steps, not while a stage's command runs."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]


def environment() -> dict[str, str]:
    """This process's environment as a stage needs it."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def output(*arguments: str) -> str:
    """What `dvc` prints. Raises ValueError with its last line where it fails."""
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"dvc {arguments[0]}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return done.stdout
