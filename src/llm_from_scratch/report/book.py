"""The written side of a run: the report, twelve weeks, a card for each model, one page for somebody who reads one page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_from_scratch.bundle import Manifest
from llm_from_scratch.report import cards, gather, pages

WEEKS = 12


@dataclass(frozen=True)
class Story:
    """All that a page may speak of. `samples` maps a model to the text or answers that its stage left; `questions` are answered ones."""

    metrics: Mapping[str, Any]
    params: Mapping[str, Any]
    manifests: Mapping[str, Manifest]
    samples: Mapping[str, Any]
    questions: list[dict[str, Any]]
    benchmarks: Mapping[str, Any]

    def values(self) -> dict[str, Any]:
        """The names that a template knows."""
        bits = {rung: row["val_bpb"] for rung, row in self.metrics["ladder"].items() if rung != "base"}
        return {
            "m": self.metrics,
            "params": self.params,
            "manifests": self.manifests,
            "samples": self.samples,
            "questions": self.questions,
            "benchmarks": self.benchmarks,
            "faults": gather.ladder_faults(bits, honest="ngram"),
            "beaten_by_ngram": [rung for rung, value in bits.items() if value > bits["ngram"]],
            "best_rung": min((rung for rung in bits if rung != "ngram"), key=lambda rung: bits[rung]),
        }


def write(reports: Path, story: Story) -> None:
    """report.md, weeks/week_01.md … week_12.md and cards/<model>.md under `reports`."""
    values = story.values()
    pages.write_page(reports / "report.md", "report.md.j2", values)
    for week in range(1, WEEKS + 1):
        pages.write_page(reports / "weeks" / f"week_{week:02}.md", f"weeks/week_{week:02}.md.j2", values)
    for model, manifest in story.manifests.items():
        cards.write_model(reports / "cards" / f"{model}.md", values, model, manifest)
    cards.write_retriever(reports / "cards" / "retriever.md", values)
