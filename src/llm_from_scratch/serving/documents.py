"""What was retrieved, in the shapes that clients read: citations of an answer, annotations of a chat's message, hits of a search.

An annotation has OpenAI's shape for a page of the web, and the document in place of one: `url` is `urn:document:` and its id. It marks the
characters of the answer that cite it, `[1]`, or the whole answer where there is no such mark, and carries what was read (`number`, `text`,
`document`, `score`) beside OpenAI's four fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llm_from_scratch.retrieval.index import Hit
from llm_from_scratch.retrieval.rag import Citation


def citations_of(cited: Sequence[Citation]) -> list[dict[str, Any]]:
    """The `citations` of POST /ask."""
    return [asdict(source) for source in cited]


def annotations_of(text: str, cited: Sequence[Citation]) -> tuple[dict[str, Any], ...]:
    """The `annotations` of an answer with this `text`."""
    return tuple({"type": "url_citation", "url_citation": _placed(text, source)} for source in cited)


def hits_of(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """The `data` of POST /retrieve, best first."""
    return [
        {
            "object": "passage",
            "rank": hit.rank,
            "score": hit.score,
            "id": hit.passage.id,
            "document": hit.passage.document,
            "title": hit.passage.title,
            "text": hit.passage.text,
            "metadata": dict(hit.passage.metadata),
        }
        for hit in hits
    ]


def _placed(text: str, source: Citation) -> dict[str, Any]:
    mark = f"[{source.number}]"
    start = text.find(mark)
    start, end = (start, start + len(mark)) if start >= 0 else (0, len(text))
    return {"start_index": start, "end_index": end, "url": f"urn:document:{source.document}", **asdict(source)}
