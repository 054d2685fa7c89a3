"""The benchmark of the service runs from end to end at toy size: BentoML, clients, a full line, reloads, SIGTERM, and the peer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving

ROOT = Path(__file__).parent.parent


def rows(out: Path, *parts: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.serving", "--quick", "--out", str(out), "--part", *parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(out) not in (out / "serving.md").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads((out / "serving.json").read_text(encoding="utf-8"))["rows"]
    return found


@pytest.mark.slow
def test_every_load_has_its_row_and_no_request_is_lost(tmp_path: Path) -> None:
    found = rows(tmp_path, "loads", "ending")

    assert [row["clients"] for row in found if row["what"].startswith("streams")] == [1, 4, 12]
    assert sum(row["lost"] for row in found) == 0
    assert all(row["finished"] + row["refused"] + row["also"].get("left", 0) == row["requests"] for row in found)
    assert found[-1]["what"].startswith("SIGTERM")
    assert (found[-1]["also"]["exit"], found[-1]["finished"]) == (0, found[-1]["requests"])


@pytest.mark.slow
@pytest.mark.long
def test_memory_reloads_and_the_peer_have_theirs(tmp_path: Path) -> None:
    memory, reloads, *peers = rows(tmp_path, "memory", "reloads", "peer")

    assert len(memory["also"]["MB warm, and after each fifth"].split()) == 1 + serving.FIFTHS
    assert (reloads["lost"], reloads["refused"], reloads["also"]["models seen"]) == (0, 0, 2)
    assert {row["also"]["same texts"] for row in peers} == {"8 of 8"}
    assert [row["lost"] for row in peers] == [0] * 9


def test_a_part_that_is_measured_again_leaves_the_others_rows_where_they_were(tmp_path: Path) -> None:
    before = [{"part": part, "what": what} for part, what in (("loads", "a"), ("memory", "b"), ("memory", "c"), ("peer", "d"))]
    (tmp_path / "serving.json").write_text(json.dumps({"rows": before}), encoding="utf-8")

    again = serving.kept(tmp_path, "memory", [{"what": "e"}])
    assert again == [before[0], {"part": "memory", "what": "e"}, before[3]]


def test_a_project_that_was_not_built_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--project", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "run `make repro`, or name a built project with --project" in done.stderr
