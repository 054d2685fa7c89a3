"""The benchmark of the service runs from end to end at toy size: BentoML, clients, a full line, clients that leave, and SIGTERM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_load_has_its_row_and_no_request_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))["rows"]
    assert [row["clients"] for row in rows if row["what"].startswith("streams")] == [1, 4, 12]
    assert sum(row["lost"] for row in rows) == 0
    assert all(row["finished"] + row["refused"] + (row.get("left") or 0) == row["requests"] for row in rows)
    assert rows[-1]["what"].startswith("SIGTERM")
    assert (rows[-1]["exit"], rows[-1]["finished"]) == (0, rows[-1]["requests"])
    assert str(tmp_path) not in (tmp_path / "serving.md").read_text(encoding="utf-8")


def test_a_project_that_was_not_built_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--project", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "run `make repro`, or name a built project with --project" in done.stderr
