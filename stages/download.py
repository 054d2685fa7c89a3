"""download: a source becomes a validated corpus in artifacts/raw/<name>, or nothing does.

The source table in params.yaml says what is fetched and how it is checked. Partial transfers wait in var/downloads for the next run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_from_scratch import bundle, tracking
from llm_from_scratch.data import corpora, readers, validation
from llm_from_scratch.data.corpora import DownloadParams, Source
from llm_from_scratch.data.documents import DOCUMENTS, Document, write_documents
from llm_from_scratch.data.fetch import Get, Patience, Response, Route
from llm_from_scratch.data.registry import pip_registry

if TYPE_CHECKING:
    from llm_from_scratch.config import Params


def run(params: Params, name: str, root: Path) -> None:
    """Fetch, extract, read, validate, seal. Raises a one-line error, and places no corpus, when any of them fails."""
    source, settings = params.sources[name], params.download
    logs = root / "artifacts/logs/download" / name

    with tracking.stage_run("download", name, source.model_dump()) as log:
        obtained = corpora.obtain(name, source, root / "var/downloads" / name, _route(settings), partial(_registry, settings))

        with bundle.writing(root / "artifacts/raw" / name) as folder:
            corpora.place(source, obtained, folder / corpora.FILES)
            documents = readers.read(source.reader, folder / corpora.FILES, source.validation)
            _check(name, source, settings, documents, logs)
            if documents:
                write_documents(folder / DOCUMENTS, documents)
            facts = _facts(source, documents, folder)
            bundle.seal(folder, "corpus", f"download@{name}", **facts)
        log(0, {key: facts[key] for key in ("documents", "bytes", "validation_share")})


def _check(name: str, source: Source, settings: DownloadParams, documents: list[Document], logs: Path) -> None:
    # Read by Great Expectations when validation imports it.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    report = validation.Report(True, {"passed": True, "documents": 0}, [])
    with bundle.writing(logs) as folder:
        if source.reader != "files":
            _say(f"{name}: checking {len(documents):,} documents")
            report = validation.validate(documents, source, settings.validation, folder / "data_docs")
        (folder / "metrics.json").write_text(json.dumps(report.metric, indent=2) + "\n", encoding="utf-8")
    for failure in report.failures:
        if failure.severity == "warning":
            _say(f"{name}: {failure}")
    validation.require(report, name, logs / "data_docs/index.html")


def _facts(source: Source, documents: list[Document], folder: Path) -> dict[str, Any]:
    held_out = sum(len(document.text.encode()) for document in documents if document.split == "validation")
    text = sum(len(document.text.encode()) for document in documents)
    return {
        "origin": source.origin,
        "sha256": [pinned.sha256 for pinned in source.pinned],
        "licence": source.licence,
        "language": source.language,
        "documents": len(documents),
        "bytes": text or sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "validation_share": round(held_out / text, 6) if text else 0.0,
    }


def _route(settings: DownloadParams) -> Route:
    import requests

    session = requests.Session()
    session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("PIP_CERT") or True

    def web(url: str, headers: Mapping[str, str]) -> Response:
        return session.get(url, headers=headers, stream=True, timeout=settings.timeout_seconds)

    get: Get = web
    return Route(os.environ.get("LLM_MIRROR") or settings.mirror, get, Patience(settings.attempts, settings.backoff_seconds), _say)


def _registry(settings: DownloadParams) -> Any:
    _say("asking the package registry that pip is set up for")  # it may keep quiet for minutes where there is no network
    return pip_registry([], settings.attempts, settings.timeout_seconds)


def _say(message: str) -> None:
    print(message, file=sys.stderr)
