"""The drills themselves: a loss is not overlooked, a row that was not held again stays; and what mends DVC's cache.

Two of the drills are held in test_pipeline, where the toy graph is built anyway; make drills holds all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from drills import __main__ as drills
from drills.ground import Clone, Ground, Outcome, Unfit
from pipelines import dvc, fsck


def held(monkeypatch: pytest.MonkeyPatch, drill: object) -> dict[str, object]:
    monkeypatch.setitem(drills.DRILLS, "clock jump", drill)  # type: ignore[arg-type]
    return drills.held("clock jump", Ground(Clone(Path(), {})))


def test_a_drill_that_loses_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not held(monkeypatch, lambda ground: Outcome("a line", "dvc repro", 2, 2))["failed"]
    row = held(monkeypatch, lambda ground: Outcome("a line", "dvc repro", 1, 2))
    assert row["failed"]
    assert row["what is lost"] == "1 of 2 digests differ"


def test_a_drill_that_cannot_be_held_says_why_and_one_that_breaks_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(ground: Ground) -> Outcome:
        raise Unfit("needs root")

    def broken(ground: Ground) -> Outcome:
        raise RuntimeError("train@base ended with 1")

    def unforeseen(ground: Ground) -> Outcome:
        """It used to end all drills, those after it unheld."""
        raise subprocess.TimeoutExpired("dvc repro", 9)

    row = held(monkeypatch, unfit)
    assert (row["failed"], row["what you see"]) == (False, "not held: needs root")
    row = held(monkeypatch, broken)
    assert (row["failed"], row["what you see"]) == (True, "FAILED: RuntimeError: train@base ended with 1")
    row = held(monkeypatch, unforeseen)
    assert (row["failed"], row["what you see"]) == (True, "FAILED: TimeoutExpired: Command 'dvc repro' timed out after 9 seconds")


def test_rows_of_other_drills_stay_in_the_table_in_its_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [
        {
            "drill": name,
            "what you see": line,
            "what is lost": "nothing",
            "how it goes on": "dvc repro",
            "besides": "",
            "seconds": 1,
            "failed": False,
        }
        for name, line in (("no network", "a | b"), ("read-only folder", "first"))
    ]
    drills.write(tmp_path, rows)
    drills.write(tmp_path, [rows[1] | {"what you see": "second"}])
    kept = json.loads((tmp_path / "drills.json").read_text())["rows"]
    assert [(row["drill"], row["what you see"]) for row in kept] == [("read-only folder", "second"), ("no network", "a | b")]
    assert "`a ¦ b`" in (tmp_path / "drills.md").read_text()


def test_the_committed_table_has_every_drill_held_and_none_that_lost_anything() -> None:
    """As README says."""
    rows = json.loads((drills.PROJECT / "reports/drills.json").read_text())["rows"]
    assert [row["drill"] for row in rows] == list(drills.DRILLS)
    assert not [row["drill"] for row in rows if row["failed"] or row["what you see"].startswith(drills.NOT_HELD)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one node of a graph, which has run; in it from here on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(
        "stages: {make: {cmd: mkdir -p artifacts/data && echo whole > artifacts/data/text, outs: [artifacts/data]}}"
    )
    for command in (("init", "--no-scm", "--quiet"), ("repro", "--quiet")):
        subprocess.run(dvc.command(*command), env=dvc.environment(), check=True)
    return tmp_path


@pytest.mark.slow
def test_fsck_removes_what_rotted_in_dvcs_cache_which_dvc_itself_trusts(project: Path) -> None:
    cached = object_of(project, "whole\n")
    assert fsck.fsck() == ["every object is what its name says"]

    cached.chmod(0o644)
    cached.write_text("whale")
    cached.chmod(0o444)
    (project / "artifacts/data/text").unlink()
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "--quiet"], check=True)
    assert (project / "artifacts/data/text").read_text() == "whale", "the reason for fsck"
    first, last = fsck.fsck()
    assert cached.parent.name in first
    assert first.endswith("its bytes were others; removed")
    assert "makes it anew" in last
    assert not cached.exists()


@pytest.mark.slow
def test_what_never_came_into_dvcs_cache_is_missed_and_dvc_commit_puts_it_there(project: Path) -> None:
    """A full disk used to be noticed when a champion's files were to be brought back."""
    cached = object_of(project, "whole\n")
    cached.unlink()
    assert fsck.absent(project) == [
        "1 of 1 outputs are not whole in DVC's cache, such as artifacts/data; "
        "make room where it is, and let python -m pipelines fsck remove what is damaged; "
        "then dvc commit puts them there, or dvc repro makes them anew"
    ]
    subprocess.run(dvc.command("commit", "--quiet"), env=dvc.environment(), check=True)
    assert cached.read_text() == "whole\n"
    assert fsck.absent(project) == []


@pytest.mark.slow
def test_a_folder_whose_list_of_files_is_cut_short_is_not_whole_until_fsck_and_dvc_commit(project: Path) -> None:
    """It used to be an error, after the champions had moved, in place of the lines on them. DVC alone takes the list for whole."""
    (listing,) = (project / ".dvc/cache/files/md5").glob("??/*.dir")
    listing.chmod(0o644)
    listing.write_bytes(listing.read_bytes()[:-1])
    listing.chmod(0o444)
    commit = dvc.command("commit", "--quiet")
    subprocess.run(commit, env=dvc.environment(), check=True)
    assert "1 of 1 outputs are not whole" in fsck.absent(project)[0]
    fsck.fsck()
    subprocess.run(commit, env=dvc.environment(), check=True)
    assert fsck.absent(project) == []


def object_of(project: Path, text: str) -> Path:
    (found,) = (path for path in (project / ".dvc/cache/files/md5").glob("??/*") if path.read_text() == text)
    return found
