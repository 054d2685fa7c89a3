"""Which sources are not what they were when they were downloaded: `python -m stages sources`.

DVC sees that params.yaml names another package or digest, but not that the files of a folder which is read in place are others now.
Compared with the manifests in artifacts/raw, which the download sealed. What lies on the network is pinned, and is not asked for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML

from llm_from_scratch import config
from llm_from_scratch.bundle import MANIFEST, read_manifest
from llm_from_scratch.data.corpora import FolderSource, RecordsSource, Source, StreamSource
from llm_from_scratch.data.streams import tree_digest


def main(given: Sequence[str]) -> None:
    """The command, `given` without its name, in the project's folder."""
    parser = argparse.ArgumentParser(prog="python -m stages sources", description="Which sources changed since they were downloaded.")
    parser.add_argument("--json", action="store_true", help="one line: each source that changed, and what it is now")
    asked = parser.parse_args(given)
    params = config.parse(YAML(typ="safe", pure=True).load(Path("params.yaml")), "params.yaml")
    table = {name: params.sources[name] for name in params.download.fetch}
    found = changed(table, Path())
    if asked.json:
        print(json.dumps(found, sort_keys=True))
        return
    for name in table:
        print(f"{name}: {f'changed, it is {found[name]} now' if name in found else 'as it was downloaded'}")


def changed(table: dict[str, Source], root: Path) -> dict[str, str]:
    """Name → what it is now, of each source whose last download was of something else, or that never was downloaded."""
    now = {name: identity(source, root) for name, source in table.items()}
    return {name: found for name, found in now.items() if found != _then(table[name], root / "artifacts" / "raw" / name)}


def identity(source: Source, root: Path) -> str:
    """Where it is from, and the sha256 of its files where that is known before they are fetched; what is here already is read."""
    if isinstance(source, StreamSource):
        return source.origin
    local = isinstance(source, FolderSource | RecordsSource)
    return _joined(source.origin, [tree_digest(root / source.path)] if local else [pinned.sha256 for pinned in source.pinned])


def _then(source: Source, folder: Path) -> str:
    if not (folder / MANIFEST).exists():
        return ""
    facts = read_manifest(folder).facts
    return facts["origin"] if isinstance(source, StreamSource) else _joined(facts["origin"], facts["sha256"])


def _joined(origin: str, digests: Sequence[str]) -> str:
    return " ".join([origin, *digests])
