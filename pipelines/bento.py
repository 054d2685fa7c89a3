"""From finished bundles to a Bento, and from a Bento to an address."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from llm_from_scratch import config
from llm_from_scratch.serving import package as bento
from llm_from_scratch.serving.auth import read_key
from pipelines.champion import RETRIEVER, SERVED, champion_bundle, require_store
from stages.__main__ import read_yaml

SHOWN_BYTES = 64 * 2**20
"""Of a rung that the page shows beside the served model: every Bento carries and opens them all, so the large ones stay at home."""


def package(root: Path, api_key_file: str, champion: bool = False) -> str:
    """The tag of a Bento of the model that `evaluate` chose to serve, with index, embedder and the ladder's smaller models.

    With `champion`, model and index are those that the registry has as champions, whatever evaluate chose last. Raises BundleError where
    one is missing or damaged, and ParamsError and ValueError before any work.
    """
    params = config.parse(read_yaml(root / "params.yaml"), "params.yaml")
    artifacts = root / "artifacts"
    model, index = champions(root) if champion else (artifacts / "models" / served(root), artifacts / "index")
    embedder = artifacts / "raw" / params.index.embedder
    ladder = {name: artifacts / "models" / name for name in params.train}
    shown = {name: folder for name, folder in ladder.items() if _bytes(folder) <= SHOWN_BYTES}
    stored = bento.package(model, index, embedder, params.serve, shown)
    return bento.build(root, stored, api_key_file)


def champions(root: Path) -> tuple[Path, Path]:
    """The bundles of the champions: the model to serve, and the index. Raises ValueError where there is none, or no registry."""
    require_store(root)
    return champion_bundle(root, SERVED), champion_bundle(root, RETRIEVER)


def served(root: Path) -> str:
    """The name of the bundle to serve, from the verdict. Raises ValueError where there is none yet."""
    verdict = root / "reports" / "verdict.json"
    try:
        return str(json.loads(verdict.read_text(encoding="utf-8"))["served"])
    except (FileNotFoundError, KeyError):
        raise ValueError(f"{verdict} names no model to serve; dvc repro evaluate chooses one") from None


def serve(root: Path, host: str, port: int, api_key_file: str, champion: bool = False) -> NoReturn:
    """Package, then become the server. Raises ValueError, before any work, where the address is taken or the file holds no key."""
    bento.require_free(host, port)
    if api_key_file:
        read_key(Path(api_key_file))
        api_key_file = str(Path(api_key_file).resolve())
    bento.serve(package(root, api_key_file, champion), host, port)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))
