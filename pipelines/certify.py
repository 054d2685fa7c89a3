"""The certificate of reproduction: the graph at toy size, built twice from nothing in two clones of HEAD, ends in the same digests.

The clones share this Python and what was downloaded before, and nothing else: each has a DVC cache, an artifacts/ and a runs/ of its own.
Data, tokenizers, weights, adapters and the index are compared by the digests of their bundles, which cover every byte of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines import dvc

CERTIFICATE = Path("reports/certificate")
ARCHIVES = {".whl", ".gz"}
STARTED = re.compile(r"Running stage '(.+)'")  # as DVC says it
SHORT = 16  # digits of a digest that the table shows


def certify(root: Path, profile: str) -> bool:
    """Build `profile` twice, write reports/certificate.md and .json, and say whether every digest is equal. Raises ValueError where one of
    the builds fails."""
    (root / "var").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="certify.", dir=root / "var") as place:
        mirror = collected(root / "var/downloads", Path(place) / "mirror")
        first, second = Path(place) / "a", Path(place) / "b"
        a = built(root, first, profile, mirror)
        collected(first / "var/downloads", mirror)  # what A had to fetch, B need not
        b = built(first, second, profile, mirror)  # this checkout may have another HEAD by now
        commit = head(first)
    rows = [
        {"bundle": name, "digest in A": a["digests"].get(name, "none"), "digest in B": b["digests"].get(name, "none")}
        for name in sorted({*a["digests"], *b["digests"]})
    ]
    for row in rows:
        row["equal"] = "yes" if row["digest in A"] == row["digest in B"] else "no"
    write(root / CERTIFICATE, profile, commit, a["made_on"], rows)
    return bool(rows) and all(row["equal"] == "yes" for row in rows)


def collected(downloads: Path, mirror: Path) -> Path:
    """A folder of links to the archives that were fetched before, which are checked by their sha256 like any other's."""
    mirror.mkdir(exist_ok=True)
    for archive in downloads.glob("*/*"):
        link = mirror / archive.name
        if archive.suffix in ARCHIVES and not link.exists():
            link.unlink(missing_ok=True)  # where it leads to what is gone
            link.symlink_to(archive)
    return mirror


def built(root: Path, clone: Path, profile: str, mirror: Path) -> dict[str, Any]:
    """What digests.json says of a clone of HEAD, built from nothing. Raises ValueError with the lines said last."""
    grow(root, clone, profile, mirror, lambda node: print(f"{clone.name.upper()}: {node}", file=sys.stderr, flush=True))
    run(clone, mirror, sys.executable, "-m", "stages", "digests")
    found: dict[str, Any] = json.loads((clone / "reports/digests.json").read_text(encoding="utf-8"))
    return found


def grow(root: Path, clone: Path, profile: str, mirror: Path, say: Callable[[str], None]) -> dict[str, float]:
    """A clone of HEAD, and the graph in it; `say` hears of each node as it starts. The seconds that each took. Raises ValueError."""
    starts: dict[str, float] = {}

    def heard(line: str) -> None:
        if node := STARTED.match(line):
            starts[node[1]] = time.monotonic()
            say(node[1])

    run(root, mirror, "git", "clone", "--quiet", str(root), str(clone))
    run(clone, mirror, sys.executable, "-m", "pipelines", "experiment", profile, heard=heard)
    ends = [*list(starts.values())[1:], time.monotonic()]
    return {node: end - start for (node, start), end in zip(starts.items(), ends, strict=True)}


def run(folder: Path, mirror: Path, *command: str, heard: Callable[[str], None] = lambda line: None) -> None:
    """A command in a clone, or in what is cloned; `heard` gets its lines as they come. Raises ValueError with the last of them where it
    fails."""
    last: deque[str] = deque(maxlen=4)
    with subprocess.Popen(
        command, cwd=folder, env=environment(folder, mirror), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in filter(None, map(str.strip, process.stdout)):
            last.append(line)
            heard(line)
    if process.returncode:
        shown = " ".join(command).removeprefix(f"{sys.executable} -m ")
        raise ValueError(f"{shown} ended with {process.returncode}: {' / '.join(last)}")


def environment(clone: Path, mirror: Path) -> dict[str, str]:
    """Of commands in a clone: its own code, no MLflow, and what is said is said at once."""
    told = {"PYTHONPATH": str(clone / "src"), "MLFLOW_TRACKING_URI": "", "PYTHONUNBUFFERED": "1"}
    return dvc.environment() | told | {"LLM_MIRROR": os.environ.get("LLM_MIRROR") or str(mirror)}


def head(root: Path) -> str:
    with suppress(FileNotFoundError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def write(place: Path, profile: str, commit: str, made_on: Mapping[str, str], rows: list[dict[str, str]]) -> None:
    """The table for people and for programs."""
    place.parent.mkdir(exist_ok=True)
    equal = sum(row["equal"] == "yes" for row in rows)
    summary = f"{equal} of {len(rows)} digests equal, profile {profile}, commit {commit}"
    facts = {"summary": summary, "made_on": dict(made_on), "rows": rows}
    place.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    lines = ["# Certificate of reproduction", "", f"{summary}. Two clones, built one after the other from nothing.", ""]
    lines += ["| bundle | digest in A | digest in B | equal |", "|---|---|---|---|"]
    lines += [f"| {row['bundle']} | {row['digest in A'][:SHORT]} | {row['digest in B'][:SHORT]} | {row['equal']} |" for row in rows]
    lines += ["", "Made with `make certify` on " + ", ".join(f"{name} {value}" for name, value in made_on.items()) + ".", ""]
    text = "\n".join(lines)
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
