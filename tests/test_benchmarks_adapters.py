"""The benchmark of adapters runs from end to end at toy size. What it measures there means nothing, but what it counts must be right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def started(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.adapters", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
def test_every_way_to_fine_tune_has_its_row_and_what_is_finished_is_not_made_again(tmp_path: Path) -> None:
    first = started("--quick", "--out", str(tmp_path), "--keep", str(tmp_path / "kept.json"))
    assert first.returncode == 0, first.stderr[-2000:]
    facts: dict[str, Any] = json.loads((tmp_path / "adapters.json").read_text(encoding="utf-8"))
    rows = {row["what"]: row for row in facts["rows"]}
    assert list(rows) == ["base", "sft", "lora_r2", "lora", "lora_r16", "qlora", "qlora, packed again"]
    # A llama of one layer: q and o 64→64, k and v 64→32, the three of its MLP 64→64; 300 tokens, four of them
    # only a chat's. Detours of rank 2 stand beside all but q and k.
    assert rows["sft"]["updated"] == 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64 + 3 * 64 + 300 * 64
    assert rows["lora_r2"]["updated"] == 2 * (128 + 96 + 3 * 128) + 4 * 64
    assert rows["sft"]["gain"] == "100.0%"
    assert rows["qlora"]["kept MB"] < rows["lora"]["kept MB"] < rows["lora_r16"]["kept MB"] < rows["sft"]["kept MB"]
    assert any(note.startswith("Packed again (seed 1): dequantized, merged and quantized again") for note in facts["notes"])
    assert str(ROOT) not in (tmp_path / "adapters.md").read_text(encoding="utf-8")

    kept = (tmp_path / "kept.json").read_bytes()
    again = started("--quick", "--out", str(tmp_path), "--keep", str(tmp_path / "kept.json"))
    assert again.returncode == 0
    assert (tmp_path / "kept.json").read_bytes() == kept


def test_entries_that_are_not_there_or_take_other_steps_are_named_in_one_line(tmp_path: Path) -> None:
    told = tmp_path / "params.yaml"
    told.write_text("finetune:\n  sft: {}\n", encoding="utf-8")
    missing = started("--params", str(told))
    assert missing.returncode == 1
    assert missing.stderr.strip().splitlines() == ["benchmarks.adapters: no finetune.lora_r2 in params.yaml; there is sft"]

    shipped = (ROOT / "params.yaml").read_text(encoding="utf-8")
    before, after = shipped.split("\n  lora:\n")
    told.write_text(before + "\n  lora:\n" + after.replace("batch: 16", "batch: 8", 1), encoding="utf-8")
    unequal = started("--params", str(told))
    assert unequal.returncode == 1
    assert unequal.stderr.strip().splitlines()[-1] == "benchmarks.adapters: finetune.lora_r2.batch is not that of sft; make them equal"
