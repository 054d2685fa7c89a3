"""How far the work is, told to whoever is there: a person at a terminal, or a file."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llm_from_scratch import progress


def test_away_from_a_terminal_progress_is_whole_lines_that_a_log_can_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    for _ in progress.bar(range(3), desc="score", miniters=1):
        pass
    said = capsys.readouterr().err
    first, *_, last = said.splitlines()
    assert first.startswith("score:   0% 0/3 [")
    assert last.startswith("score: 100% 3/3 [")
    assert said.endswith("\n")
    assert "\r" not in said
    assert "" not in said.splitlines()


def test_away_from_a_terminal_quick_work_is_a_line_at_its_start_and_one_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(range(1000), desc="train") as steps:
        for _ in steps:
            steps.set_postfix(loss="1.5", refresh=False)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_nobody_wants_to_see_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.bar(range(3), disable=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_one_line_drawn_over_and_over() -> None:
    ours, theirs = os.openpty()
    code = "from llm_from_scratch import progress; [None for _ in progress.bar(range(3), desc='score', mininterval=0, ncols=40, nrows=24)]"
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    assert done.returncode == 0
    said = os.read(ours, 10_000).decode()
    assert said.count("\r") > 2
    assert said.count("\n") == 1
    os.close(ours)
    os.close(theirs)
