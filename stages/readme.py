"""After the graph: SUMMARY.md, the posts and the marked blocks of README.md, filled from reports/metrics.json and the benchmarks' tables.

Not a node of the graph: DVC deletes an output before it is made, and most of README.md is written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

from llm_from_scratch.config import Params
from llm_from_scratch.report import book, gather, pages


def run(params: Params, name: str, root: Path) -> None:
    metrics = json.loads((root / "reports" / "metrics.json").read_text(encoding="utf-8"))
    values = book.Story(metrics, params.model_dump(), {}, {}, [], gather.benchmarks(root / "reports" / "benchmarks")).values()

    readme = root / "README.md"
    filled = pages.fill_blocks(readme.read_text(encoding="utf-8"), lambda block: pages.render(f"readme_{block}.md.j2", values))

    readme.write_text(filled, encoding="utf-8")
    pages.write_page(root / "SUMMARY.md", "summary.md.j2", values)
    for post in sorted((root / "docs" / "posts").glob("*.md")):
        pages.write_page(post, f"posts/{post.name}.j2", values)
