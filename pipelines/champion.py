"""The champion's files: in their place, or brought back from DVC's cache, which keeps what newer bundles took the place of."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from llm_from_scratch import bundle, registry, tracking
from llm_from_scratch.registry.places import brought_back, place_of
from pipelines import dvc
from stages.__main__ import dvc_digests, git_revision

if TYPE_CHECKING:
    from llm_from_scratch.tracking import ModelVersion

PREFIX = "llm-from-scratch-"
SERVED, RETRIEVER = f"{PREFIX}served", f"{PREFIX}retriever"


def connect(root: Path) -> bool:
    """To the MLflow of the environment; false where it names none."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    tracking.connect(uri, os.environ.get("REBUILD_ID", "by-hand"), git_revision(root), dvc_digests(root), root / "var/spool")
    return bool(uri)


def require_store(root: Path) -> None:
    """Raises ValueError where no MLflow is named."""
    if not connect(root):
        raise ValueError("no MLFLOW_TRACKING_URI, so no registry; make's is sqlite:///var/mlflow.db in this folder")


def rollback(root: Path, name: str, number: str) -> str:
    """The champion of `name` (with or without the project's prefix) is the one before again, once its files are at hand; a line on both."""
    require_store(root)
    version = registry.way_back(full(name), number)
    folder = restore(root, version)
    return f"{registry.rollback(full(name), str(version.version))}, in {folder.relative_to(root)}"


def champion_bundle(root: Path, name: str) -> Path:
    """The bundle of the champion of `name`. Raises ValueError where there is no champion, or its files are nowhere any more."""
    version = registry.champion_of(name)
    if version is None:
        raise ValueError(f"{name} has no champion; python -m pipelines promote makes one")
    return restore(root, version)


def restored(root: Path, digest: str) -> Path:
    """The bundle of the version whose digest begins so. Raises ValueError where no version has it, or its files are nowhere any more."""
    require_store(root)
    return restore(root, registry.version_with(digest))


def restore(root: Path, version: ModelVersion) -> Path:
    """The version's bundle, taken out of DVC's cache where another stands in its place. Raises ValueError where it is in neither."""
    if "folder" not in version.tags:
        raise ValueError(f"{version.name} version {version.version} does not say where its bundle is; name a newer one with --to")
    folder, digest = version.tags["folder"], version.tags["digest"]
    try:
        return place_of(root, folder, digest)
    except bundle.BundleError:
        back = brought_back(root, digest)
    try:
        with bundle.writing(back) as partial:
            copy_out(Path(dvc.output("cache", "dir").strip()), version.tags.get("dvc", ""), partial)
    except FileNotFoundError:
        revision = version.tags["revision"].removesuffix("-dirty") or "REVISION"
        raise ValueError(
            f"{version.name} version {version.version} is {folder} as of {digest[:12]}…, which is neither there nor in DVC's cache; "
            f"dvc pull gets it from a remote, git checkout {revision} && dvc repro {version.tags['made_by']} makes it anew"
        ) from None
    bundle.verify(back)
    return place_of(root, folder, digest)


def copy_out(cache: Path, listing: str, folder: Path) -> None:
    """The files of a directory that DVC keeps under the digest `listing` ("….dir"). Raises FileNotFoundError where it keeps none such."""
    if not listing:
        raise FileNotFoundError("no digest of DVC's")
    for file in json.loads(kept(cache, listing).read_text(encoding="utf-8")):
        (folder / file["relpath"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept(cache, file["md5"]), folder / file["relpath"])


def kept(cache: Path, digest: str) -> Path:
    """Where DVC 3 keeps what has that digest (dvc.org/doc/user-guide/project-structure/internal-files)."""
    return cache / "files" / "md5" / digest[:2] / digest[2:]


def full(name: str) -> str:
    return name if name.startswith(PREFIX) else PREFIX + name
