"""A rebuild held against a committed one: equal to the bit, or as good on another machine, or neither, and said in one line; and two
builds held against each other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_from_scratch import bundle
from llm_from_scratch.evaluation.certificate import Rebuild, compare
from pipelines import certify

ROOT = Path(__file__).parent.parent
HERE = {"cpu": "GenuineIntel 6 207", "kernels": "AVX512", "threads": "2", "torch": "2.13.0"}
THERE = HERE | {"cpu": "AuthenticAMD 25 1", "kernels": "AVX2"}


def rebuild(made_on: dict[str, str], base: str, bits: float) -> Rebuild:
    return Rebuild(made_on=made_on, digests={"raw/text": "11", "models/base": base}, val_bpb={"base": bits})


def test_an_equal_rebuild_is_said_to_be_one() -> None:
    found = compare(rebuild(HERE, "22", 1.9), rebuild(HERE, "22", 1.9), 0.02)
    assert found.holds
    assert found.line() == "2 of 2 digests equal the committed ones (same CPU family)"


def test_on_another_cpu_a_model_may_differ_in_bits_but_not_in_how_well_it_predicts() -> None:
    found = compare(rebuild(HERE, "33", 1.91), rebuild(THERE, "22", 1.9), 0.02)
    assert found.holds
    assert found.line() == (
        "1 of 2 digests equal the committed ones (cpu GenuineIntel 6 207 here, AuthenticAMD 25 1 there, kernels AVX512 here, AVX2 there); "
        "the first that differs is models/base; bits per byte differ by at most 0.01000 (base), within 0.02"
    )
    worse = compare(rebuild(HERE, "33", 1.95), rebuild(THERE, "22", 1.9), 0.02)
    assert not worse.holds
    assert worse.line().endswith("by at most 0.05000 (base), beyond 0.02")


def test_on_the_same_cpu_one_bit_is_a_difference() -> None:
    assert not compare(rebuild(HERE, "33", 1.9), rebuild(HERE, "22", 1.9), 0.02).holds


def test_a_bundle_that_is_not_there_is_named() -> None:
    partial = Rebuild(made_on=HERE, digests={"raw/text": "11"}, val_bpb={})
    found = compare(partial, rebuild(HERE, "22", 1.9), 0.02)
    assert not found.holds
    assert "1 not here, such as models/base" in found.line()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two real bundles that dvc.lock has, the numbers of a report, and a git repository around them."""
    for name, text in (("raw/text", "a corpus"), ("models/base", "its weights")):
        with bundle.writing(tmp_path / "artifacts" / name) as folder:
            (folder / "content.txt").write_text(text)
            bundle.seal(folder, "corpus", "download@text")
    outs = [{"path": f"artifacts/{name}", "md5": "11"} for name in ("raw/text", "models/base")]
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": {"all": {"outs": outs}}}))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/metrics.json").write_text(json.dumps({"ladder": {"base": {"val_bpb": 1.9}}}))
    git(tmp_path, "init", "--quiet")
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def digests(project: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    command = [sys.executable, "-m", "stages", "digests", *more]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def test_the_first_rebuild_is_written_down_and_the_next_is_compared_with_it(project: Path) -> None:
    assert "2 digests in reports/digests.json; commit it" in digests(project).stdout
    written = json.loads((project / "reports/digests.json").read_text())
    assert written["digests"]["models/base"] == bundle.read_manifest(project / "artifacts/models/base").digest
    assert written["val_bpb"] == {"base": 1.9}
    git(project, "add", "reports")
    git(project, "commit", "--quiet", "--message", "rebuilt")

    with bundle.writing(project / "artifacts/models/base") as folder:
        (folder / "content.txt").write_text("other weights")
        bundle.seal(folder, "corpus", "download@text")
    again = digests(project, "--strict")
    assert again.stdout.startswith("1 of 2 digests equal the committed ones (same CPU family); the first that differs is models/base")
    assert again.returncode == 1
    assert again.stderr == "digests --strict: 1 digests differ and 0 bundles are not here; see git diff reports/digests.json\n"


def test_what_no_node_made_is_not_of_the_rebuild_even_if_damaged(project: Path) -> None:
    """A model that somebody imported used to be one that every other rebuild lacks."""
    with bundle.writing(project / "artifacts/models/theirs") as folder:
        (folder / "content.txt").write_text("weights of others")
        bundle.seal(folder, "model", "import")
    (project / "artifacts/models/theirs/content.txt").write_text("and damaged")

    assert digests(project).returncode == 0
    assert list(json.loads((project / "reports/digests.json").read_text())["digests"]) == ["models/base", "raw/text"]


def certified(monkeypatch: pytest.MonkeyPatch, root: Path, commits: list[str], **digests: dict[str, str]) -> bool:
    """What certify makes of two builds, A and B, that ended in these digests; `commits` gets what was built."""

    def built(root: Path, clone: Path, profile: str, mirror: Path) -> dict[str, object]:
        git(clone.parent, "clone", "--quiet", str(root), str(clone))
        commits.append(certify.head(clone))
        if clone.name == "a":
            git(root, "commit", "--quiet", "--allow-empty", "--message", "meanwhile")
        return {"digests": digests[clone.name], "made_on": HERE}

    monkeypatch.setattr(certify, "built", built)
    return certify.certify(root, "smoke")


def test_two_builds_that_end_alike_are_certified_and_others_are_not(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    """The commit used to be the one that this checkout had at the end, and B another than A where somebody committed meanwhile."""
    git(project, "commit", "--quiet", "--allow-empty", "--message", "first")
    commit, built = certify.head(project), list[str]()
    assert certified(monkeypatch, project, built, a={"models/base": "11"}, b={"models/base": "11"})
    assert built == [commit, commit]
    assert f"1 of 1 digests equal, profile smoke, commit {commit}. " in (project / "reports/certificate.md").read_text()
    assert not certified(monkeypatch, project, [], a={"models/base": "11", "index": "22"}, b={"models/base": "33"})
    rows = json.loads((project / "reports/certificate.json").read_text())["rows"]
    assert [(row["bundle"], row["digest in B"], row["equal"]) for row in rows] == [("index", "none", "no"), ("models/base", "33", "no")]
    assert not certified(monkeypatch, project, [], a={}, b={}), "nothing was built"


def test_the_committed_certificate_has_no_digest_that_differs() -> None:
    """As README says."""
    rows = json.loads((ROOT / "reports/certificate.json").read_text())["rows"]
    assert len(rows) > 20
    assert not [row["bundle"] for row in rows if row["equal"] != "yes"]


def test_a_build_of_certify_shows_its_nodes_and_ends_in_the_lines_that_were_said_last(tmp_path: Path) -> None:
    heard: list[str] = []
    said = "import os; print('one\\n\\ntwo'); print(os.environ['PYTHONPATH'])"
    certify.run(tmp_path, tmp_path / "mirror", sys.executable, "-c", said, heard=heard.append)
    assert heard == ["one", "two", str(tmp_path / "src")]
    with pytest.raises(ValueError, match=r"ended with 3: no room$"):
        certify.run(tmp_path, tmp_path / "mirror", sys.executable, "-c", "print('no room'); exit(3)")


def test_what_cannot_be_cloned_is_said_in_the_words_of_git(tmp_path: Path) -> None:
    """It used to be a traceback."""
    with pytest.raises(ValueError, match=rf"^git clone --quiet {tmp_path} {tmp_path}/a ended with 128: .*{tmp_path}"):
        certify.grow(tmp_path, tmp_path / "a", "smoke", tmp_path / "mirror", print)


def test_what_a_fetched_is_there_for_b(tmp_path: Path) -> None:
    """The second build used to fetch again what the first had."""
    for place, name in (("checkout", "text.gz"), ("a", "text.gz"), ("a", "model.whl"), ("a", "notes.txt")):
        (tmp_path / place / "pin").mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "pin" / name).write_text(place)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/model.whl").symlink_to(tmp_path / "gone")
    mirror = certify.collected(tmp_path / "checkout", tmp_path / "mirror")
    certify.collected(tmp_path / "a", mirror)
    assert {path.name: path.read_text() for path in mirror.iterdir()} == {"text.gz": "checkout", "model.whl": "a"}
