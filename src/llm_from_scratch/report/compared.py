"""What two rebuilds are compared by: the few numbers of `dvc metrics diff` and `dvc exp show`, and the tables of `dvc plots`.

metrics.json holds all that was measured, some hundreds of numbers. Half of them are times, which differ from run to run though nothing
changed; none of those is here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

KEPT = {
    "ladder": ("val_bpb",),
    "mixture": ("val_bpb",),
    "quantize": ("val_bpb", "kl", "size_mb"),
    "finetune": ("val_loss", "exact_match", "f1"),
    "alignment": ("accuracy", "gold", "kl"),
    "rag": ("accuracy", "f1"),
    "retrieval": ("recall_at_1", "mrr"),
}
"""Of each entry of a section of metrics.json; an entry that has no such number goes without."""


def headline(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """section → entry → the numbers that are kept of it."""
    return {section: {entry: _kept(row, names) for entry, row in metrics[section].items()} for section, names in KEPT.items()}


def tables(metrics: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """A row a bar, by the name of the table; what stands in one table is measured on one text."""
    shakespeare = {rung: row for rung, row in metrics["ladder"].items() if rung != "base"}
    return {
        "ladder": _rows(shakespeare, "rung", ("val_bpb",)),
        "quantization": _rows(metrics["quantize"], "model", ("size_mb", "p50_ms", "kl")),
        "fine_tuning": _rows(metrics["finetune"], "method", ("val_loss", "f1")),
        "answering": _rows(metrics["rag"], "condition", ("accuracy", "f1")),
        "retrieval": _rows(metrics["retrieval"], "ranking", ("recall_at_1", "mrr")),
    }


def write_tables(folder: Path, metrics: Mapping[str, Any]) -> None:
    """<table>.json for each of `tables`, as `dvc plots` reads it."""
    for name, rows in tables(metrics).items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _kept(row: Row, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: row[name] for name in names if name in row}


def _rows(entries: Mapping[str, Row], title: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{title: entry, **_kept(row, names)} for entry, row in entries.items()]
