"""The benchmark of open models runs from end to end at toy size, with llama.cpp's rows where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LLAMA_CPP = os.environ.get("LLM_TEST_LLAMA_CPP", "")


def benchmark(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.open_model", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_each_peer_has_its_row_and_one_that_is_missing_is_said_to_be(tmp_path: Path) -> None:
    done = benchmark("--quick", "--out", tmp_path, *(["--llama-cpp", LLAMA_CPP] if LLAMA_CPP else []))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "open_model.json").read_text(encoding="utf-8"))
    rows = {row["by"]: row for row in found["rows"]}
    assert {"ours, fp32", "ours, fp32, drafting", "ours, int8_weight", "transformers, fp32"} <= rows.keys()
    assert rows["ours, fp32, drafting"]["same ids"] == "8 of 8"
    assert rows["ours, fp32"]["loss"] == "+0.000%"
    assert rows["ours, int8_weight"]["loss"]
    assert rows["transformers, fp32"]["same ids"] == "8 of 8"
    assert rows["transformers, fp32"]["speed"] == 1
    assert {name for name in rows if name.startswith("llama")} == ({"llama.cpp, F16", "llama.cpp, Q8_0"} if LLAMA_CPP else set())
    assert any("llama.cpp was not run" in note for note in found["notes"]) != bool(LLAMA_CPP)


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    done = benchmark("--model", tmp_path / "none", "--out", tmp_path)
    assert done.returncode != 0
    assert "no finished bundle in" in done.stderr
