"""Bytes that rotted in DVC's cache, or never came into it. DVC trusts an object that is write-protected, and brings it back as it is; what
reads the bundle refuses it, but the next checkout would bring it again. So an object whose bytes are not what its name says has to go.

Where the cache's disk is full, DVC says so among its other lines, and ends as if all were well: what a node made lies in artifacts/, but
nothing can bring it back later, and the next dvc repro runs the node again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pipelines import dvc
from pipelines.champion import kept
from stages.__main__ import dvc_digests

CACHED = "artifacts/"  # reports/ is in git


def fsck() -> list[str]:
    """Read every object of this project's cache, remove those that are damaged, and say what to do, also about what is not in it; a line
    each."""
    rotten = [path for path in objects(Path(dvc.output("cache", "dir").strip())) if md5(path) != named(path)]
    for path in rotten:
        path.unlink()
    if not rotten:
        return ["every object is what its name says", *absent(Path.cwd())]
    gone = [f"{path}: its bytes were others; removed" for path in rotten]
    return [*gone, "now the command that named the damaged bundle, or dvc repro --force for all, makes it anew"]


def absent(root: Path) -> list[str]:
    """The line on outputs that dvc.lock names and the cache does not have whole, and how they get there; none where there are none."""
    outs = {path: digest for path, digest in dvc_digests(root).items() if path.startswith(CACHED)}
    if not outs:
        return []
    cache = Path(dvc.output("cache", "dir").strip())
    lacking = [path for path, digest in outs.items() if not whole(cache, digest)]
    if not lacking:
        return []
    so = f"{len(lacking)} of {len(outs)} outputs are not whole in DVC's cache, such as {lacking[0]}"
    first = "make room where it is, and let python -m pipelines fsck remove what is damaged"
    return [f"{so}; {first}; then dvc commit puts them there, or dvc repro makes them anew"]


def whole(cache: Path, digest: str) -> bool:
    """Whether the cache has all that bears this digest; of a folder, its list of files as it was made, and all of them."""
    place = kept(cache, digest)
    if not digest.endswith(".dir") or not place.exists():
        return place.exists()
    return md5(place) == named(place) and all(kept(cache, file["md5"]).exists() for file in json.loads(place.read_text(encoding="utf-8")))


def objects(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "files/md5").glob("??/*") if len(named(path)) == 32)


def named(path: Path) -> str:
    """The md5 that an object bears; a folder's list of files is an object too."""
    return path.parent.name + path.name.removesuffix(".dir")


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
