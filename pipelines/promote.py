"""What `evaluate` decided, applied: finished models become versions in MLflow's registry, and the champion alias moves by its rule."""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub import ModelCard

from llm_from_scratch import tracking
from llm_from_scratch.bundle import verify
from stages.__main__ import git_revision

VERDICT = Path("reports/verdict.json")


def promote(root: Path) -> list[str]:
    """A line for each model: its version, and whether it became champion. A bundle that is registered already stays the version it is.

    Raises ValueError where evaluate has not run.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return ["no MLFLOW_TRACKING_URI: nothing registered"]
    if not (root / VERDICT).exists():
        raise ValueError(f"no {VERDICT}; dvc repro evaluate writes it")
    tracking.connect(uri, os.environ.get("REBUILD_ID", "by-hand"), git_revision(root), digests={}, spool=root / "var/spool")
    tracking.catch_up()
    return _apply(root, json.loads((root / VERDICT).read_text(encoding="utf-8")))


def _apply(root: Path, verdict: dict) -> list[str]:
    lines = []
    for entry in verdict["candidates"]:
        candidate = tracking.Candidate(
            name=entry["name"],
            folder=root / entry["folder"],
            digest=verify(root / entry["folder"]).digest,
            card=ModelCard((root / entry["card"]).read_text(encoding="utf-8")).text.strip(),
            metrics=entry["metrics"],
            facts=entry["facts"],
        )
        number = tracking.register(candidate)
        moved = tracking.promote(entry["name"], number, **entry["rule"])
        lines.append(f"{entry['name']}: version {number}{', now champion' if moved else ''}")
    tracking.log_files("report", [root / "reports" / "report.md", root / "reports" / "metrics.json"])
    return lines
