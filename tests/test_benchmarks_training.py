"""The benchmarks of training run from end to end at toy size. What they measure there means nothing, but a killed run must be equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def quick(name: str, out: Path) -> list[dict[str, Any]]:
    """The rows that `python -m benchmarks.NAME --quick` writes."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / f"{name}.md").read_text(encoding="utf-8").startswith("# ")
    rows: list[dict[str, Any]] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return rows


@pytest.mark.slow
def test_a_stage_that_is_killed_at_a_random_moment_ends_in_the_same_bits(tmp_path: Path) -> None:
    rows = quick("kill_anywhere", tmp_path)
    assert len(rows) == 1
    assert rows[0]["equal"]
    assert rows[0]["kills"] >= 1


@pytest.mark.slow
def test_each_precision_has_its_row_also_where_it_cannot_be_had(tmp_path: Path) -> None:
    rows = {row["precision"]: row for row in quick("precision", tmp_path)}
    assert list(rows) == ["fp32", "tf32", "bf16", "fp16"]
    assert rows["fp32"]["speed"] == rows["fp32"]["memory"] == 1
    assert rows["bf16"]["loss"] == pytest.approx(rows["fp32"]["loss"], rel=0.05)


@pytest.mark.slow
def test_each_switch_is_measured_against_the_row_with_nothing_on(tmp_path: Path) -> None:
    rows = quick("switches", tmp_path)
    assert [row["speed"] for row in rows if row["switch"] in ("all off", "AdamW, a loop", "Muon, one by one")] == [1.0] * 3
    assert {"checkpointing", "micro_batch: a quarter"} <= {row["switch"] for row in rows}
    assert all(row["ms a step"] > 0 for row in rows)
