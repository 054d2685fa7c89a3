"""The certificate of reproduction: the graph at toy size, built twice from nothing in two clones of HEAD, ends in the same digests.

The clones share this Python and what this checkout has downloaded, and nothing else: each has a DVC cache, an artifacts/ and a runs/ of its
own. Data, tokenizers, weights, adapters and the index are compared by the digests of their bundles, which cover every byte of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines import dvc

CERTIFICATE = Path("var/certificate")
ARCHIVES = {".whl", ".gz"}
SHORT = 16  # digits of a digest that the table shows


def certify(root: Path, profile: str) -> bool:
    """Build `profile` twice, write var/certificate.md and .json, and say whether every digest is equal. Raises ValueError where one of the
    builds fails."""
    (root / "var").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="certify.", dir=root / "var") as place:
        mirror = collected(root / "var/downloads", Path(place) / "mirror")
        a, b = (built(root, Path(place) / name, profile, mirror) for name in ("a", "b"))
    rows = [
        {"bundle": name, "digest in A": a["digests"].get(name, "none"), "digest in B": b["digests"].get(name, "none")}
        for name in sorted({*a["digests"], *b["digests"]})
    ]
    for row in rows:
        row["equal"] = "yes" if row["digest in A"] == row["digest in B"] else "no"
    write(root / CERTIFICATE, profile, head(root), a["made_on"], rows)
    return bool(rows) and all(row["equal"] == "yes" for row in rows)


def collected(downloads: Path, mirror: Path) -> Path:
    """A folder of links to the archives that were fetched before, which are checked by their sha256 like any other's."""
    mirror.mkdir()
    for archive in downloads.glob("*/*"):
        if archive.suffix in ARCHIVES:
            (mirror / archive.name).symlink_to(archive)
    return mirror


def built(root: Path, clone: Path, profile: str, mirror: Path) -> dict[str, Any]:
    """A clone of HEAD, built from nothing and forgotten again; what its digests.json says. Raises ValueError with the last line said."""
    print(f"building {profile} in {clone.name.upper()}", file=sys.stderr, flush=True)
    run(root, "git", "clone", "--quiet", ".", str(clone))
    run(clone, sys.executable, "-m", "pipelines", "experiment", profile, mirror=mirror)
    run(clone, sys.executable, "-m", "stages", "digests", mirror=mirror)
    found: dict[str, Any] = json.loads((clone / "reports/digests.json").read_text(encoding="utf-8"))
    shutil.rmtree(clone)
    return found


def run(folder: Path, *command: str, mirror: Path | None = None) -> None:
    told = {"PYTHONPATH": str(folder / "src"), "MLFLOW_TRACKING_URI": ""}
    if mirror is not None and not os.environ.get("LLM_MIRROR"):
        told["LLM_MIRROR"] = str(mirror)
    done = subprocess.run(command, cwd=folder, env=dvc.environment() | told, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ValueError(f"{' '.join(command[-3:])} ended with {done.returncode}: {' / '.join(said[-2:])}")


def head(root: Path) -> str:
    with suppress(FileNotFoundError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def write(place: Path, profile: str, commit: str, made_on: Mapping[str, str], rows: list[dict[str, str]]) -> None:
    """The table for people and for programs."""
    equal = sum(row["equal"] == "yes" for row in rows)
    summary = f"{equal} of {len(rows)} digests equal, profile {profile}, commit {commit}"
    facts = {"summary": summary, "made_on": dict(made_on), "rows": rows}
    place.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    lines = ["# Certificate of reproduction", "", f"{summary}. Two clones, built one after the other from nothing.", ""]
    lines += ["| bundle | digest in A | digest in B | equal |", "|---|---|---|---|"]
    lines += [f"| {row['bundle']} | {row['digest in A'][:SHORT]} | {row['digest in B'][:SHORT]} | {row['equal']} |" for row in rows]
    lines += ["", "Made on " + ", ".join(f"{name} {value}" for name, value in made_on.items()) + ".", ""]
    text = "\n".join(lines)
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
