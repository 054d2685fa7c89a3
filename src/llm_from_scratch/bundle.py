"""A sealed folder: everything that flows between stages is one, and none is ever half there.

A bundle is written beside its final place, flushed to disk, sealed with a manifest and renamed, so a killed stage leaves nothing that
looks finished. The manifest holds only what follows from the content (no clock, host or run id), because DVC hashes it.
Reading it again checks every byte. No pickle anywhere: tensors are safetensors, the rest is text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"


class BundleError(ValueError):
    """A folder is missing, damaged, or not the kind that was asked for. The message is one line and names the way out."""


@dataclass(frozen=True)
class Manifest:
    """What a sealed folder says of itself.

    `files` maps each relative path to its sha256, `parents` maps a name to the digest of the bundle it was made from,
    and `facts` holds numbers and names that follow from the content (parameter count, tokenizer digest, ...).
    """

    kind: str
    made_by: str
    files: dict[str, str]
    parents: dict[str, str]
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 of the canonical manifest: equal digests mean equal bytes, ancestry and facts."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A temporary sibling to write into, moved to `folder` when the block ends well and removed when it does not.

    What was there before is moved aside whole: removed in its place, a kill would leave half of it under its own manifest.
    """
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _flush(partial)
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(partial, folder)
        _flush_directory(folder.parent)
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def seal(folder: Path, kind: str, made_by: str, parents: Mapping[str, str] | None = None, /, **facts: Any) -> Manifest:
    """Write the manifest of everything in `folder`. `made_by` is the DVC stage that rebuilds it, as in `train@base`."""
    files = {path.relative_to(folder).as_posix(): file_digest(path) for path in _files(folder)}
    manifest = Manifest(kind, made_by, files, dict(sorted((parents or {}).items())), facts)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def verify(folder: Path, *kinds: str) -> Manifest:
    """The manifest of `folder`, after checking that its kind is one of `kinds` (any, if none) and every file is intact.

    Raises BundleError naming the file, both digests, and the stage that rebuilds the folder.
    """
    manifest = read_manifest(folder)
    rebuild = f"rebuild it with: dvc repro --force --single-item {manifest.made_by}"
    if kinds and manifest.kind not in kinds:
        raise BundleError(f"{folder}: found a bundle of kind '{manifest.kind}', wanted {' or '.join(kinds)}; {rebuild}")
    present = {path.relative_to(folder).as_posix() for path in _files(folder)}
    if present != set(manifest.files):
        odd = sorted(present.symmetric_difference(manifest.files))
        raise BundleError(f"{folder}: {odd[0]} is {'not in the manifest' if odd[0] in present else 'missing'}; {rebuild}")
    for name, expected in manifest.files.items():
        if (found := file_digest(folder / name)) != expected:
            raise BundleError(f"{folder / name}: sha256 is {found[:12]}…, the manifest says {expected[:12]}…; {rebuild}")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest as written, its files unchecked (see `verify`). Raises BundleError where there is none to read."""
    path = folder / MANIFEST
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"no finished bundle in {folder}; dvc repro builds it") from None
    except (ValueError, TypeError) as error:
        raise BundleError(f"{path}: not a manifest ({error}); dvc repro rebuilds the folder") from None


def require_parent(child: Manifest, name: str, parent: Manifest) -> None:
    """Refuse a `child` that was made from another `parent` than the one at hand. Raises BundleError."""
    if (made_from := child.parents.get(name)) != parent.digest:
        raise BundleError(
            f"{child.made_by} was made from {name} {str(made_from)[:12]}…, but the one here is {parent.digest[:12]}…; "
            f"rebuild it with: dvc repro {child.made_by}"
        )


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors; tied tensors must be given once. The same tensors always give the same bytes.

    Raises OSError where the disk does: safetensors has an error of its own for that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors from a safetensors file. Raises BundleError when it is missing or cut short."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise BundleError(f"{path}: not a whole safetensors file ({error}); dvc repro rebuilds it") from None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_directory(path)
    _flush_directory(folder)


def _flush_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
