"""From finished bundles to a Bento, and from a Bento to an address."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from llm_from_scratch import config
from llm_from_scratch.serving import package as bento
from llm_from_scratch.serving.auth import read_key
from stages.__main__ import read_yaml


def package(root: Path, api_key_file: str) -> str:
    """The tag of a Bento of the model, index and embedder that params.yaml names. Raises BundleError where one is missing or damaged,
    and ParamsError before any work.
    """
    params = config.parse(read_yaml(root / "params.yaml"), "params.yaml")
    artifacts = root / "artifacts"
    model, embedder = artifacts / "models" / params.serve.model, artifacts / "raw" / params.index.embedder
    stored = bento.package(model, artifacts / "index", embedder, params.serve)
    return bento.build(root, stored, api_key_file)


def serve(root: Path, host: str, port: int, api_key_file: str) -> NoReturn:
    """Package, then become the server. Raises ValueError, before any work, where the address is taken or the file holds no key."""
    bento.require_free(host, port)
    if api_key_file:
        read_key(Path(api_key_file))
        api_key_file = str(Path(api_key_file).resolve())
    bento.serve(package(root, api_key_file), host, port)
