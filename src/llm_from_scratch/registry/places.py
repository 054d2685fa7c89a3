"""Where a version's bundle is: where it was registered from, or, where a newer one took its place, where it was brought back to."""

from __future__ import annotations

from pathlib import Path

from llm_from_scratch.bundle import BundleError, read_manifest

BROUGHT_BACK = Path("var/bundles")
"""Under a project's root; each bundle in a folder named by its digest."""


def brought_back(root: Path, digest: str) -> Path:
    """The folder for a bundle that is no longer where it was made."""
    return root / BROUGHT_BACK / digest[:16]


def place_of(root: Path, folder: str, digest: str) -> Path:
    """The folder that holds the bundle with that digest. Raises BundleError naming what is there instead, and the way back."""
    for place in (root / folder, brought_back(root, digest)):
        if digest_in(place) == digest:
            return place
    found = digest_in(root / folder)
    there = f"holds {found[:12]}…" if found else "holds no bundle"
    raise BundleError(f"{root / folder} {there}, wanted {digest[:12]}…; python -m pipelines restore {digest[:12]} brings it back")


def digest_in(folder: Path) -> str:
    """The digest of the bundle in `folder`, "" where there is none."""
    try:
        return read_manifest(folder).digest
    except BundleError:
        return ""
