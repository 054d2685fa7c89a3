"""The benchmark of an open model's retrieval runs from end to end at toy size, and stopped, goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import open_retrieval
from benchmarks.open_retrieval import BARE, CONDITIONS, FORMS


def started(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["open_retrieval", "--quick", *map(str, arguments)])
    open_retrieval.main()


def test_forms_are_tried_on_other_questions_and_the_best_one_asks_the_held_out_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.jsonl"
    with pytest.raises(SystemExit, match=r"toy, numbered, none: 0 of 4 questions are done; the same command goes on"):
        started(monkeypatch, "--out", tmp_path, "--keep", kept, "--minutes", 0)
    started(monkeypatch, "--out", tmp_path, "--keep", kept)
    rows = json.loads((tmp_path / "open_retrieval.json").read_text(encoding="utf-8"))["rows"]

    tried, asked = rows[: 2 * len(FORMS)], rows[2 * len(FORMS) :]
    assert [(row["prompt"], row["passage"]) for row in tried] == [(form, passage) for form in FORMS for passage in ("none", "oracle")]
    assert {row["asked"] for row in tried} == {"4 training"}
    assert [row["passage"] for row in asked] == [BARE, *CONDITIONS]
    best = max(tried[1::2], key=lambda row: row["accuracy"])
    assert {(row["asked"], row["prompt"]) for row in asked[1:]} == {("8 held-out", best["prompt"])}
    assert all(row["lift"] == pytest.approx(100 * (row["accuracy"] - asked[1]["accuracy"])) for row in asked[1:])
    assert all(row["above it"] == pytest.approx(100 * (row["accuracy"] - asked[0]["accuracy"])) for row in asked)

    replied = kept.read_text(encoding="utf-8")
    started(monkeypatch, "--out", tmp_path, "--keep", kept, "--minutes", 0)
    assert kept.read_text(encoding="utf-8") == replied, "what is known is not asked again"
