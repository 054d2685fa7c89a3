"""The benchmark of quantization runs from end to end at toy size. What it measures there means nothing, but sizes are sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_scheme_has_its_row_beside_fp32_and_transformers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quantization", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["bundle"]: row for row in json.loads((tmp_path / "quantization.json").read_text(encoding="utf-8"))["rows"]}
    schemes = ["fp32", "bf16", "int8", "int8_dynamic", "int8_weight", "nf4"]
    deeper = [f"{name}, deeper" for name in ("fp32", "int8_dynamic", "int8_weight")]
    assert list(rows) == [*schemes, "transformers, fp32", "transformers, LLM.int8()", *deeper]
    shares = [rows[name]["linear layers"] for name in schemes]
    assert shares[:2] == [1, 0.5]
    assert shares[2] == shares[3] == shares[4] < 0.3
    assert shares[5] < 0.2
    assert rows["bf16"]["MB held"] == rows["fp32"]["MB held"] > rows["int8_weight"]["MB held"]
    assert rows["fp32"]["speed"] == 1
    assert rows["fp32"]["KL"] == 0


def test_a_missing_input_is_named_with_the_stage_that_makes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quantization", "--tokens", str(tmp_path / "none"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no finished bundle in" in done.stderr
