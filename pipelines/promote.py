"""What `evaluate` decided, applied: finished bundles become versions in MLflow's registry, and the champion alias moves by its rule."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard

from llm_from_scratch import registry, tracking
from llm_from_scratch.bundle import file_digest, verify
from llm_from_scratch.registry import Rule
from pipelines.champion import connect
from pipelines.fsck import absent

VERDICT = Path("reports/verdict.json")


def promote(root: Path) -> list[str]:
    """A line for each model: its version, and whether it became champion; and one where DVC's cache could not bring them back one day. A
    bundle that is registered already stays the version it is.

    Raises ValueError where evaluate has not run, what it scored is no longer what is here, or DVC cannot say where its cache is.
    """
    if not connect(root):
        return ["no MLFLOW_TRACKING_URI: nothing registered"]
    if not (root / VERDICT).exists():
        raise ValueError(f"no {VERDICT}; dvc repro evaluate writes it")
    tracking.catch_up()
    verdict = json.loads((root / VERDICT).read_text(encoding="utf-8"))
    missing = absent(root)  # it may raise, and then nothing has moved yet
    lines = [_apply(root, entry, Rule(**verdict["rule"])) for entry in verdict["candidates"]]
    tracking.log_files("report", [root / "reports" / "report.md", root / "reports" / "metrics.json"])
    return lines + missing


def _apply(root: Path, entry: dict, rule: Rule) -> str:
    candidate = registry.Candidate(
        name=entry["name"],
        root=root,
        folder=entry["folder"],
        digest=verify(root / entry["folder"]).digest,
        card=ModelCard((root / entry["card"]).read_text(encoding="utf-8")).text.strip(),
        metrics=entry["metrics"],
        facts=entry["facts"],
        beside=entry["beside"],
        scores=root / entry["scores"]["file"],
    )
    if candidate.digest != entry["digest"] or file_digest(candidate.scores) != entry["scores"]["sha256"]:
        raise ValueError(f"{VERDICT} is about another {entry['folder']} than the one here; dvc repro evaluate writes it anew")
    number = registry.register(candidate)
    decision = registry.promote(entry["name"], number, rule)
    return f"{entry['name']}: version {number} {'is now champion: ' if decision.promoted else ''}{decision.reason}"
