"""From finished bundles to a Bento, and from a Bento to an address."""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML

from llm_from_scratch.serving import package as bento
from llm_from_scratch.serving.limits import ServeParams


def package(root: Path) -> str:
    """The tag of a Bento of the model, index and embedder that params.yaml names. Raises BundleError where one is missing or damaged."""
    params = YAML(typ="safe", pure=True).load((root / "params.yaml").read_text(encoding="utf-8"))
    limits = ServeParams.model_validate(params["serve"])
    artifacts = root / "artifacts"
    stored = bento.package(
        artifacts / "models" / limits.model, artifacts / "index", artifacts / "raw" / params["index"]["embedder"], limits
    )
    return bento.build(root, stored)


def serve(root: Path, host: str, port: int) -> int:
    """Package, then become the server. Raises ValueError, before any work, where the address is taken."""
    bento.require_free(host, port)
    bento.serve(package(root), host, port)
