"""Profiles: small overlays of params.yaml, applied as a DVC experiment so that the file itself is never edited by hand."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipelines import dvc

FOLDER = Path("profiles")


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) for each leaf of an overlay."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings(tree: Mapping[str, Any]) -> list[str]:
    """`path=value` for each leaf of an overlay, in the form of `dvc exp run -S`."""
    return [f"{path}={json.dumps(value)}" for path, value in leaves(tree)]


def overlay(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """What stands in the file <name>.yaml of `folder`. Raises ValueError where there is none."""
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise ValueError(
            f"no {folder.name.rstrip('s')} '{name}'; there is {', '.join(sorted(path.stem for path in folder.glob('*.yaml')))}"
        )
    return dict(YAML(typ="safe").load(path))


def experiment(profile: str, more: Sequence[str]) -> int:
    """Run the graph under `profile`; the exit status of `dvc exp run`. Raises ValueError where there is no such profile."""
    chosen = [argument for setting in settings(overlay(profile)) for argument in ("-S", setting)]
    return subprocess.run(dvc.command("exp", "run", *chosen, *more), env=dvc.environment(), check=False).returncode
