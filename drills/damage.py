"""Disks that are full, read-only, or return other bytes than they were given."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drills.ground import Clone, Ground, Outcome, Unfit, line_with, remove, repro

DAMAGE = {
    "bundle": ("models/base", "model.safetensors", "quantize@base_int8"),
    "index": ("index", "faiss.index", "evaluate"),
    "tokenizer": ("tokens/shakespeare_bpe", "tokenizer.json", "train@gpt_bpe"),
}
"""What is damaged: its bundle, the file, and the node that reads it next."""
SMALL = "700k"
"""Of a disk: room for what lies there, and for some of a model or a checkpoint."""


def disk_full(ground: Ground) -> Outcome:
    """runs/ lies on a disk that fills up while a model is trained; then there is room."""
    node = "train@base"
    with ground.copy() as clone, filled(clone, "runs", node) as (status, said):
        assert status, "the disk was too big"
        clone.must(*repro(node))
        return ground.outcome(clone, line_with(said, "No space left"), repro(node), "models/base")


def cache_full(ground: Ground) -> Outcome:
    """DVC's cache lies on a disk that fills up after a node has done its work; then there is room. DVC says so, and ends as if all were
    well; fsck sees what is not there."""
    node, folder = "train@gpt", "models/gpt"
    with ground.copy() as clone, filled(clone, ".dvc/cache", node) as (_, said):
        line_with(clone.must("python", "-m", "pipelines", "fsck"), "not whole in DVC's cache")
        clone.must(*repro(node))
        remove(clone.root / "artifacts" / folder)
        clone.must("dvc", "checkout", f"artifacts/{folder}")
        remark = "dvc ends as if all were well; pipelines fsck names what is not in the cache"
        return ground.outcome(clone, line_with(said, "No space left"), repro(node), folder, remark=remark)


@contextmanager
def filled(clone: Clone, folder: str, node: str) -> Iterator[tuple[int, list[str]]]:
    """How a node ended, and what it said, while a folder of the clone lay on a disk that it filled up; now there is room."""
    with disk(clone.root / folder, SMALL) as mounted:
        clone.stale(node)
        ended = clone.repro(node)
        mount("-o", "remount,size=200m", str(mounted))
        yield ended


def read_only(ground: Ground) -> Outcome:
    """artifacts/models cannot be written to; then it can."""
    node, folder = "train@bigram", Path("artifacts/models")
    with ground.copy() as clone:
        clone.stale(node)
        with frozen(clone.root / folder):
            status, said = clone.repro(node)
            assert status, "it could be written to"
        clone.must(*repro(node))
        return ground.outcome(clone, line_with(said, "Read-only", "Permission denied"), repro(node), "models/bigram")


def damaged(ground: Ground, what: str) -> Outcome:
    """A bit of a finished file is flipped; the next node that reads it refuses, and names the command that mends it."""
    folder, name, reader = DAMAGE[what]
    with ground.copy() as clone:
        flip(clone.root / "artifacts" / folder / name)
        line, mend = refused(clone, reader)
        clone.must(*mend)
        return ground.outcome(clone, line, mend, folder)


def damaged_cache(ground: Ground) -> Outcome:
    """An object of DVC's cache rots, and is checked out. What reads the bundle refuses it; fsck takes the object out of the cache."""
    folder, name, reader = DAMAGE["bundle"]
    with ground.copy(cached=True) as clone:
        path = clone.root / "artifacts" / folder / name
        flip(cached(clone, path))
        remove(path.parent)
        clone.must("dvc", "checkout", str(path.parent.relative_to(clone.root)))
        line, mend = refused(clone, reader)
        clone.must("python", "-m", "pipelines", "fsck")
        clone.must(*mend)
        remove(path.parent)
        clone.must("dvc", "checkout", str(path.parent.relative_to(clone.root)))
        return ground.outcome(clone, line, ("python", "-m", "pipelines", "fsck", "&&", *mend), folder)


def refused(clone: Clone, reader: str) -> tuple[str, tuple[str, ...]]:
    """What the node `reader` says of a bundle that is damaged, and the command that it names."""
    stage, _, entry = reader.partition("@")
    status, said = clone.run("python", "-m", "stages", *filter(None, (stage, entry)))
    assert status, f"{reader} took it"
    line = line_with(said, "rebuild it with: ")
    return line, tuple(line.split("rebuild it with: ")[1].split())


def cached(clone: Clone, path: Path) -> Path:
    """The object of the cache that holds the bytes of a file."""
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    return clone.root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]


def flip(path: Path) -> None:
    """The lowest bit of the last byte but one, in a file that may be protected."""
    body = bytearray(path.read_bytes())
    body[-2] ^= 1
    mode = path.stat().st_mode
    path.chmod(mode | 0o200)
    path.write_bytes(body)
    path.chmod(mode)


@contextmanager
def disk(folder: Path, room: str) -> Iterator[Path]:
    """A small file system in memory at `folder`. Raises Unfit where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={room}", "drill", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """A folder that nothing can be written into: for root by a read-only mount, for others by its permissions."""
    if os.geteuid():
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
        return
    mount("--bind", str(folder), str(folder))
    try:
        mount("-o", "remount,bind,ro", str(folder))
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments: str) -> None:
    if os.geteuid():
        raise Unfit("needs root, to mount a small disk")
    if shutil.which("mount") is None:
        raise Unfit("needs mount (Debian: apt-get install mount)")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unfit(f"mount: {done.stderr.strip()}")
