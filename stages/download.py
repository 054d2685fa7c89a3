"""download: a source becomes a validated corpus in artifacts/raw/<name>, or nothing does.

The source table in params.yaml says what is fetched and how it is checked. Partial transfers wait in var/downloads for the next run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_from_scratch import bundle, tracking
from llm_from_scratch.data import corpora, readers, streams, validation
from llm_from_scratch.data.chat import gather_records, write_records
from llm_from_scratch.data.corpora import DownloadParams, FolderSource, PinnedSource, RecordsSource, Source, StreamSource
from llm_from_scratch.data.documents import DOCUMENTS, read_documents, write_documents
from llm_from_scratch.data.fetch import Get, Patience, Response, Route
from llm_from_scratch.data.preferences import gather_preferences, holds_preferences, write_preferences
from llm_from_scratch.data.registry import pip_registry
from llm_from_scratch.data.streams import Survey

if TYPE_CHECKING:
    from llm_from_scratch.config import Params

RECORDS = "records.jsonl"


def run(params: Params, name: str, root: Path) -> None:
    """Fetch, extract, read, validate, seal. Raises a one-line error, and places no corpus, when any of them fails."""
    source, settings = params.sources[name], params.download
    downloads, logs = root / "var/downloads" / name, root / "artifacts/logs/download" / name

    with tracking.stage_run("download", name, source.model_dump()) as log:
        with bundle.writing(root / "artifacts/raw" / name) as folder:
            if isinstance(source, StreamSource):
                facts = _streamed(name, source, settings, downloads, folder, logs)
            elif isinstance(source, FolderSource):
                facts = _taken(name, source, settings, root / source.path, folder, logs)
            elif isinstance(source, RecordsSource):
                facts = _told(name, source, settings, root / source.path, folder, logs)
            else:
                facts = _fetched(name, source, settings, downloads, folder, logs)
            bundle.seal(folder, "corpus", f"download@{name}", **facts)
        log(0, {key: facts[key] for key in ("documents", "bytes", "validation_share")})


def _fetched(name: str, source: PinnedSource, settings: DownloadParams, downloads: Path, folder: Path, logs: Path) -> dict[str, Any]:
    """Pinned files, kept beside their documents."""
    obtained = corpora.obtain(name, source, downloads, _route(settings), partial(_registry, settings))
    corpora.place(source, obtained, folder / corpora.FILES)
    documents = readers.read(source.reader, folder / corpora.FILES, source.validation)
    found = streams.survey(documents, len(documents))
    _check(name, source, settings, found, logs, without_text=source.reader == "files")
    if documents:
        write_documents(folder / DOCUMENTS, documents)
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return _facts(source, [pinned.sha256 for pinned in source.pinned], found) | ({} if documents else {"bytes": files})


def _streamed(name: str, source: StreamSource, settings: DownloadParams, downloads: Path, folder: Path, logs: Path) -> dict[str, Any]:
    """Rows of the hub; they wait in `downloads` until they have passed."""
    if not Path(source.repository).exists():
        os.environ["HF_HUB_OFFLINE"] = "0"  # every stage is offline but this one; read when the library is imported
    streams.gather(source, streams.open_stream(source), downloads)
    found = streams.survey(read_documents(downloads), source.checked_documents)
    _check(name, source, settings, found, logs)
    shutil.move(downloads / DOCUMENTS, folder / DOCUMENTS)
    return _facts(source, [bundle.file_digest(folder / DOCUMENTS)], found)


def _taken(name: str, source: FolderSource, settings: DownloadParams, place: Path, folder: Path, logs: Path) -> dict[str, Any]:
    """Text that is here already. Its files are read, and not copied."""
    sha256 = _digest(source, place)
    write_documents(folder / DOCUMENTS, streams.folder_documents(place, source.validation))
    found = streams.survey(read_documents(folder), source.checked_documents)
    _check(name, source, settings, found, logs)
    return _facts(source, [sha256], found)


def _told(name: str, source: RecordsSource, settings: DownloadParams, place: Path, folder: Path, logs: Path) -> dict[str, Any]:
    """Conversations or preferences that are here already, in one file and one shape. A bad line of any of them stops it."""
    sha256 = _digest(source, place)
    if holds_preferences(place):
        write_preferences(folder / RECORDS, preferences := gather_preferences(place))
        count = len(preferences)
    else:
        write_records(folder / RECORDS, chats := gather_records(place))
        count = len(chats)
    counted = Survey(count, (folder / RECORDS).stat().st_size, 0, [])
    _check(name, source, settings, counted, logs, without_text=True)
    return _facts(source, [sha256], counted)


def _digest(source: FolderSource | RecordsSource, place: Path) -> str:
    """That of the files at `place`. Raises ValueError where the source names another."""
    sha256 = streams.tree_digest(place)
    if source.sha256 not in ("", sha256):
        raise ValueError(f"{place}: sha256 of its files is {sha256}, wanted {source.sha256}; restore them, or write the new one down")
    return sha256


def _check(name: str, source: Source, settings: DownloadParams, found: Survey, logs: Path, without_text: bool = False) -> None:
    # Read by Great Expectations when validation imports it.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    report = validation.Report(True, {"passed": True, "documents": 0}, [])
    with bundle.writing(logs) as folder:
        if not without_text:
            of_all = "" if len(found.sample) == found.documents else f" of {found.documents:,}"
            _say(f"{name}: checking {len(found.sample):,}{of_all} documents")
            report = validation.validate(found.sample, source, settings.validation, folder / "data_docs")
        metric = report.metric if len(found.sample) == found.documents else report.metric | {"documents_in_all": found.documents}
        (folder / "metrics.json").write_text(json.dumps(metric, indent=2) + "\n", encoding="utf-8")
    for failure in report.failures:
        if failure.severity == "warning":
            _say(f"{name}: {failure}")
    validation.require(report, name, logs / "data_docs/index.html")


def _facts(source: Source, sha256: list[str], found: Survey) -> dict[str, Any]:
    return {
        "origin": source.origin,
        "sha256": sha256,
        "licence": source.licence,
        "language": source.language,
        "documents": found.documents,
        "bytes": found.bytes,
        "validation_share": round(found.validation_bytes / found.bytes, 6) if found.bytes else 0.0,
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
