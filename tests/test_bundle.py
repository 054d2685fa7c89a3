"""A sealed folder: whole or not there, and refused by name when a byte of it is wrong."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llm_from_scratch import bundle


def make(folder: Path, text: str = "hello", **parents: str) -> bundle.Manifest:
    with bundle.writing(folder) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "text.txt").write_text(text)
        return bundle.seal(partial, "tokens", "tokenize@x", parents, count=3)


def write_half(folder: Path) -> None:
    (folder / "half").write_text("half")
    raise RuntimeError


def test_a_manifest_holds_the_sha256_of_each_file_and_nothing_of_when_or_where(tmp_path: Path) -> None:
    made = make(tmp_path / "one")
    assert made.files == {"inner/text.txt": hashlib.sha256(b"hello").hexdigest()}
    assert make(tmp_path / "elsewhere" / "two").digest == made.digest
    assert bundle.verify(tmp_path / "one", "tokens") == made


@pytest.mark.parametrize("change", [{"text": "hellp"}, {"parent": "0" * 64}], ids=["a byte", "a parent"])
def test_a_digest_changes_with_any_byte_or_ancestor(tmp_path: Path, change: dict[str, str]) -> None:
    assert make(tmp_path / "one").digest != make(tmp_path / "two", **change).digest


def test_a_changed_byte_is_refused_with_its_file_and_the_way_out(tmp_path: Path) -> None:
    make(tmp_path / "one")
    (tmp_path / "one" / "inner" / "text.txt").write_text("hellp")
    with pytest.raises(bundle.BundleError, match=r"text.txt: sha256 is .*rebuild it with: dvc repro --force --single-item tokenize@x"):
        bundle.verify(tmp_path / "one")


def test_a_missing_or_an_extra_file_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "one")
    (tmp_path / "one" / "extra").write_text("")
    with pytest.raises(bundle.BundleError, match="extra is not in the manifest"):
        bundle.verify(tmp_path / "one")
    (tmp_path / "one" / "extra").unlink()
    (tmp_path / "one" / "inner" / "text.txt").unlink()
    with pytest.raises(bundle.BundleError, match=r"text.txt is missing"):
        bundle.verify(tmp_path / "one")


def test_another_kind_is_refused_and_a_missing_bundle_says_what_builds_it(tmp_path: Path) -> None:
    make(tmp_path / "one")
    with pytest.raises(bundle.BundleError, match="found a bundle of kind 'tokens', wanted model or quantized"):
        bundle.verify(tmp_path / "one", "model", "quantized")
    with pytest.raises(bundle.BundleError, match=r"no finished bundle in .*two; dvc repro builds it"):
        bundle.verify(tmp_path / "two")


def test_a_foreign_parent_is_refused_with_both_digests(tmp_path: Path) -> None:
    base, other = make(tmp_path / "base"), make(tmp_path / "other", "other")
    child = make(tmp_path / "child", base=base.digest)
    bundle.require_parent(child, "base", base)
    with pytest.raises(bundle.BundleError, match=f"made from base {base.digest[:12]}…, but the one here is {other.digest[:12]}…"):
        bundle.require_parent(child, "base", other)


def test_a_write_that_fails_leaves_the_old_bundle_and_nothing_half_done(tmp_path: Path) -> None:
    made = make(tmp_path / "one")
    with pytest.raises(RuntimeError), bundle.writing(tmp_path / "one") as partial:
        write_half(partial)
    assert bundle.verify(tmp_path / "one") == made
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_kill_while_the_old_bundle_is_taken_away_leaves_the_new_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be removed file by file in its own place, and a kill left the manifest of a folder that had lost its files."""
    make(tmp_path / "one")

    def killed_in_the_middle(folder: Path, **_: object) -> None:
        for path in folder.rglob("*.txt"):
            path.unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(bundle.shutil, "rmtree", killed_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "one", "hello again")
    assert bundle.verify(tmp_path / "one").files == {"inner/text.txt": hashlib.sha256(b"hello again").hexdigest()}

    monkeypatch.undo()
    make(tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_what_a_killed_write_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".one.partial").mkdir()
    (tmp_path / ".one.partial" / "half").write_text("half")
    make(tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert bundle.verify(tmp_path / "one").files.keys() == {"inner/text.txt"}


def test_tensors_come_back_equal_and_a_file_cut_short_is_one_line(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2, dtype=torch.int8)}
    bundle.save_tensors(tmp_path / "x.safetensors", tensors)
    found = bundle.load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-4])
    with pytest.raises(bundle.BundleError, match="not a whole safetensors file"):
        bundle.load_tensors(tmp_path / "x.safetensors")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one mebibyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "write",
    [lambda path: bundle.save_tensors(path, {"w": torch.zeros(1024, 1024)}), lambda path: path.write_bytes(os.urandom(2 << 20))],
    ids=["tensors", "bytes"],
)
def test_a_full_disk_is_an_os_error_that_leaves_the_old_bundle_whole(small_disk: Path, write: Callable[[Path], object]) -> None:
    made = make(small_disk / "one")
    with pytest.raises(OSError, match="No space left on device"), bundle.writing(small_disk / "one") as partial:
        write(partial / "big")
    assert bundle.verify(small_disk / "one") == made
    assert [path.name for path in small_disk.iterdir()] == ["one"]
