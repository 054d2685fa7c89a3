"""The benchmark of retrieval runs from end to end at toy size: every search has its row, and brute force is what cells are held against."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_searches_cells_and_refusals_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.retrieval", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["search"]: row for row in json.loads((tmp_path / "retrieval.json").read_text(encoding="utf-8"))["rows"]}
    assert [name for name in rows if "recall@5" in rows[name]] == ["bm25s", "fused", "rrf", "dense", "bm25"]
    assert rows["bm25"]["recall@5"] == rows["bm25s"]["recall@5"] == 1
    assert rows["flat"]["recall of brute force"] == 1 > rows["8 cells, 1 probed"]["recall of brute force"] > 0.2
    for kind in ("cosine", "evidence"):
        answered = [row["answered"] for name, row in rows.items() if name.startswith(f"{kind} from")]
        assert answered == sorted(answered, reverse=True) != []
    assert str(ROOT) not in (tmp_path / "retrieval.md").read_text(encoding="utf-8")


def test_a_project_without_an_index_is_named_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.retrieval", "--project", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("benchmarks.retrieval: no finished bundle in")
