"""The benchmarks of data and tokenizer run, at toy size: what they compare is the same thing, and the table has what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def quick(name: str, out: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out), *more]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert str(ROOT) not in (out / f"{name}.md").read_text(encoding="utf-8")
    facts: dict[str, Any] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    return facts


def test_training_byte_pairs_is_compared_for_the_same_merges(tmp_path: Path) -> None:
    facts = quick("bpe_training", tmp_path)

    assert facts["settings"]["same merges"] is True
    assert [row["trainer"].split(",")[0] for row in facts["rows"]] == ["ours", "tokenizers", "textbook"]


def test_tokenizing_is_compared_and_its_memory_watched(tmp_path: Path) -> None:
    rows = quick("tokenizing", tmp_path)["rows"]

    assert [row["what"] for row in rows] == ["short documents", "long documents", "memory"]
    assert all(row["ours / tiktoken"] > 0 for row in rows[:2])
    assert all(row["peak memory MB"] > 10 for row in rows[2:])


def test_vocabularies_are_scored_on_the_same_bytes_and_finished_rows_are_kept(tmp_path: Path) -> None:
    facts = quick("vocabulary", tmp_path)
    sizes = {row["size"]: row for row in facts["rows"]}

    assert list(sizes) == [0, 261, 280]
    assert sizes[261]["bytes a token"] < 1 < sizes[280]["bytes a token"]  # the end of a text is a token too
    assert quick("vocabulary", tmp_path)["rows"] == facts["rows"]


@pytest.mark.parametrize(("name", "corpus"), [("bpe_training", "wikipedia"), ("tokenizing", "wikipedia"), ("vocabulary", "shakespeare")])
def test_a_corpus_that_is_not_there_is_named_in_one_line(name: str, corpus: str, tmp_path: Path) -> None:
    from llm_from_scratch.tokenizer.bpe import train_bpe

    train_bpe([], 261).save(tmp_path)
    options = ["--corpus", str(tmp_path / corpus)] + (["--tokenizer", str(tmp_path)] if name == "tokenizing" else [])
    run = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], cwd=ROOT, capture_output=True, text=True, check=False)

    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith(f"benchmarks.{name}: no documents.jsonl in {tmp_path / corpus}")
    assert len(run.stderr.strip().splitlines()) == 1
