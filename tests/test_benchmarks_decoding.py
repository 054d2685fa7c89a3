"""The benchmark of decoding runs from end to end at toy size. What it measures there means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_way_of_decoding_has_its_row_for_a_bundle_and_the_toy(tmp_path: Path) -> None:
    folder = tiny.tiny_model(tmp_path / "mine", context=64)
    command = [sys.executable, "-m", "benchmarks.decoding", "--quick", "--model", str(folder), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "decoding.json").read_text(encoding="utf-8"))["rows"]
    ways = [(row["model"], row["how"]) for row in rows]
    peer = "transformers.generate, fp32"
    hows = [
        "uncached",
        "uncached, the last token",
        peer,
        f"{peer}, one thread",
        "weights read once",
        "fp32",
        "fp32, drafting",
        "weights read once, int8_weight",
        "int8_weight",
        "weights read once, int8_dynamic",
        "int8_dynamic",
        "requests: 1",
        "requests: 4",
        "repeating",
        "lookup",
    ]
    assert ways == [(model, how) for model in ("toy", "mine") for how in hows]
    assert all(row["tokens/s"] > 0 for row in rows)
    assert [row["× one"] for row in rows if row["how"] == "requests: 1"] == [1, 1]
    text = (tmp_path / "decoding.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.decoding", "--model", str(tmp_path / "none"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "none" in done.stderr
