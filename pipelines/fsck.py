"""Bytes that rotted in DVC's cache. DVC trusts an object that is write-protected, and brings it back as it is; what reads the bundle
refuses it, but the next checkout would bring it again. So an object whose bytes are not what its name says has to go."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipelines import dvc


def fsck() -> list[str]:
    """Read every object of this project's cache, remove those that are damaged, and say what to do; a line each."""
    rotten = [path for path in objects(Path(dvc.output("cache", "dir").strip())) if md5(path) != named(path)]
    for path in rotten:
        path.unlink()
    if not rotten:
        return ["every object is what its name says"]
    gone = [f"{path}: its bytes were others; removed" for path in rotten]
    return [*gone, "now the command that named the damaged bundle, or dvc repro --force for all, makes it anew"]


def objects(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "files/md5").glob("??/*") if len(named(path)) == 32)


def named(path: Path) -> str:
    """The md5 that an object bears; a folder's list of files is an object too."""
    return path.parent.name + path.name.removesuffix(".dir")


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
