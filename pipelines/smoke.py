"""Does what is finished serve? It is packaged, served on a free port of the loopback, asked, and stopped again."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from llm_from_scratch.bundle import verify
from llm_from_scratch.serving.responder import INDEX, MODEL, ORIGIN
from pipelines import bento

QUESTION = "What is a stick insect?"
ANSWER_SECONDS = 120


def serve_smoke(root: Path) -> str:
    """One line on the answer. Raises ValueError where there is none, or it is from other bundles than those that lie here."""
    folders = {MODEL: root / "artifacts" / "models" / bento.served(root), INDEX: root / "artifacts" / "index"}
    wanted = {ORIGIN[part]: verify(folder).digest for part, folder in folders.items()}
    with bento.serving(bento.package(root, "")) as address:
        request = urllib.request.Request(
            f"{address}/ask", json.dumps({"question": QUESTION}).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
            answer, found = json.load(reply)["answer"], {header: reply.headers.get(header) for header in wanted}
    for header, digest in wanted.items():
        if found[header] != digest:
            raise ValueError(f"{header} of an answer is {found[header]}, wanted {digest}; it was not the Bento that was packaged")
    return f"{QUESTION} {answer!r}, from {folders[MODEL].name} {wanted[ORIGIN[MODEL]][:12]}…"
