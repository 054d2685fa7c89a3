"""Every stage's measurements in one tree with stable keys: reports/metrics.json, described in docs/metrics.md."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

Tree = dict[str, Any]
SHOWN_TOKENS = 12  # of a text, in the encoding table


def measurements(logs: Path, stage: str, names: Iterable[str]) -> dict[str, Tree]:
    """name → metrics.json that `stage` left for it. Raises ValueError naming the node to run where one is missing."""
    return {name: _read(logs / stage / name / "metrics.json", f"{stage}@{name}") for name in names}


def single(logs: Path, stage: str) -> Tree:
    """The metrics.json of a stage that is one node."""
    return _read(logs / stage / "metrics.json", stage)


def encodings(logs: Path, names: Iterable[str]) -> dict[str, list[Tree]]:
    """name → what a tokenizer makes of texts of different kinds: how many tokens, and the first of them."""
    texts = {name: json.loads((logs / name / "encoding.json").read_text(encoding="utf-8")) for name in names}
    return {name: [row | {"tokens": len(row["tokens"]), "first": row["tokens"][:SHOWN_TOKENS]} for row in texts[name]] for name in texts}


def benchmarks(folder: Path) -> dict[str, Tree]:
    """NAME → what was measured by hand into NAME.json, for pages that show some of it; nothing where there is nothing."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def curve(path: Path) -> list[dict[str, float]]:
    """A curve.csv as rows of numbers; an empty cell becomes nan."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) if value else float("nan") for key, value in row.items()} for row in csv.DictReader(file)]


def rounded(tree: Any, digits: int = 6) -> Any:
    """The same tree with floats cut to `digits` significant digits, so that a report diff shows changes and not noise."""
    if isinstance(tree, Mapping):
        return {key: rounded(value, digits) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value, digits) for value in tree]
    return float(f"{tree:.{digits}g}") if isinstance(tree, float) else tree


def ladder_faults(bits: Mapping[str, float], honest: str) -> list[str]:
    """The rungs that do not beat the one before them, the `honest` exception left out: what the report must admit."""
    rungs = [name for name in bits if name != honest]
    return [later for earlier, later in pairwise(rungs) if bits[later] >= bits[earlier]]


def write(path: Path, tree: Tree) -> None:
    """A JSON file a person can read and git can compare."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(tree), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path, node: str) -> Tree:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no measurements in {path}; dvc repro {node} makes them") from None
    assert isinstance(tree, dict)
    return tree
