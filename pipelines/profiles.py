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


def settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`path=value` for each leaf of an overlay, in the form of `dvc exp run -S`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value)}"


def experiment(profile: str, more: Sequence[str]) -> int:
    """Run the graph under `profile`; the exit status of `dvc exp run`. Raises ValueError where there is no such profile."""
    overlay = FOLDER / f"{profile}.yaml"
    if not overlay.exists():
        raise ValueError(f"no profile '{profile}'; there is {', '.join(sorted(path.stem for path in FOLDER.glob('*.yaml')))}")
    chosen = [argument for setting in settings(YAML(typ="safe").load(overlay)) for argument in ("-S", setting)]
    return subprocess.run(dvc.command("exp", "run", *chosen, *more), env=dvc.environment(), check=False).returncode
