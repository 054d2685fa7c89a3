"""Wheels, source distributions and other zip or tar archives, read as data: chosen members are copied out, nothing is run.

What it refuses: a member that points outside the folder, a link or device, a glob that matches nothing, and a damaged archive.
"""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO


class ArchiveError(ValueError):
    """An archive is damaged, unsafe, or lacks what was asked for."""


CHUNK = 1 << 20
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)


def extract(archive: Path, members: Sequence[str], folder: Path) -> list[Path]:
    """Copy the members that match any of the globs into `folder`, under their own paths. Raises ArchiveError, one line."""
    placed: dict[str, Path] = {}
    for name, content in _wanted(archive, members):
        target = inside(folder, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with content, target.open("wb") as file:
            _copy(archive, content, file)
        placed[name] = target
    for glob in members:
        if not any(fnmatchcase(name, glob) for name in placed):
            raise ArchiveError(f"{archive.name}: nothing in it matches '{glob}'; correct `members` in params.yaml")
    return list(placed.values())


def inside(folder: Path, name: str) -> Path:
    """`folder / name`. Raises ArchiveError when that would lie outside the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ArchiveError(f"member '{name}' points outside its archive; it is unsafe, get the archive from elsewhere")
    return folder / path


def _wanted(archive: Path, members: Sequence[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and open content of each matching file. Only reading the archive is guarded, not what the caller does between."""
    found = (_zip_members if _begins_as_zip(archive) else _tar_members)(archive, members)
    while True:
        try:
            member = next(found, None)
        except _DAMAGED as error:
            raise _damaged(archive, error) from None
        if member is None:
            return
        yield member


def _begins_as_zip(archive: Path) -> bool:
    # A zip's directory is at its end, so zipfile.is_zipfile says no of one that was cut short.
    with archive.open("rb") as file:
        return file.read(2) == b"PK"


def _zip_members(archive: Path, members: Sequence[str]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if not info.is_dir() and _matches(info.filename, members):
                if (info.external_attr >> 16) & 0o170000 == 0o120000:
                    raise _link(archive, info.filename)
                yield info.filename, file.open(info)


def _tar_members(archive: Path, members: Sequence[str]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive, "r:*") as file:
        for info in file:
            if not info.isdir() and _matches(info.name, members):
                content = file.extractfile(info) if info.isreg() else None
                if content is None:
                    raise _link(archive, info.name)
                yield info.name, content


def _copy(archive: Path, content: IO[bytes], file: IO[bytes]) -> None:
    while True:
        try:
            chunk = content.read(CHUNK)
        except _DAMAGED as error:
            raise _damaged(archive, error) from None
        if not chunk:
            return
        file.write(chunk)


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _link(archive: Path, name: str) -> ArchiveError:
    return ArchiveError(f"{archive.name}: '{name}' is a link or a device, wanted a plain file; get the archive from elsewhere")


def _damaged(archive: Path, error: Exception) -> ArchiveError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ArchiveError(
        f"{archive}: not a whole zip or tar archive ({reason}); delete it and run again, or correct its sha256 in params.yaml"
    )
