"""Corpora larger than memory: documents go to disk one by one, and only a sample of them is looked at together.

A stream of the hub is gathered in a file that survives its process: after a kill it goes on at the row after the last that was noted,
and ends in the same bytes. What it cannot do is shuffle, or find near duplicates in the whole: both need all of the text at once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from llm_from_scratch import progress
from llm_from_scratch.bundle import file_digest
from llm_from_scratch.data import readers
from llm_from_scratch.data.corpora import StreamSource
from llm_from_scratch.data.documents import DOCUMENTS, Document, slug, with_splits
from llm_from_scratch.data.fetch import FetchError

STATE = "state.json"
NOTED_EVERY = 5_000  # rows; at most as many are fetched a second time after a kill
TEXT = (".txt", ".md")
ROWS: dict[str, Callable[[Iterable[Path]], Iterator[Document]]] = {
    ".jsonl": readers.jsonl,
    ".jsonl.gz": readers.jsonl,
    ".jsonl.zst": readers.jsonl,
    ".parquet": readers.parquet,
    ".pdf": readers.pdf,
}


class Rows(Protocol):
    """As much of a streamed data set as is used here; datasets.IterableDataset has it."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Survey:
    """A corpus counted in one pass: documents, UTF-8 bytes of text, those held out, and a sample of its documents in their order."""

    documents: int
    bytes: int
    validation_bytes: int
    sample: list[Document]


def open_stream(source: StreamSource) -> Rows:
    """The rows of a data set, none of them fetched yet. Raises FetchError, or ValueError where the hub extra is missing."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise ValueError("no datasets in this environment, which streams a corpus; pip install 'llm-from-scratch[hub]'") from None
    try:
        rows: Rows = datasets.load_dataset(
            source.repository, source.config or None, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError) as error:
        next_step = "check repository, revision, config, split and the network"
        raise FetchError(f"{source.origin}: cannot be opened: {_one_line(error)}; {next_step}") from None
    return rows


def gather(source: StreamSource, rows: Rows, folder: Path) -> None:
    """Write the documents of `rows` into `folder`, going on where an earlier try of the same source stopped.

    Raises FetchError when the stream breaks (what came is kept), or a row has no text in the source's column.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, note = folder / DOCUMENTS, _read_note(folder, source)
    if note.rows:
        rows.load_state_dict(note.rows)
    with (
        path.open("r+b" if note.written else "wb") as file,
        progress.bar(desc=source.repository, total=source.maximum_bytes or None, initial=note.text, unit="B", unit_scale=True) as bar,
    ):
        file.truncate(note.written)
        file.seek(note.written)
        for text in _texts(source, rows) if not note.finished else ():
            extent = len(text.encode())
            if source.maximum_bytes and note.text + extent > source.maximum_bytes:
                break
            note.documents, note.text = note.documents + 1, note.text + extent
            note.written += file.write(_line(source, note.documents, text))
            bar.update(extent)
            if note.documents % NOTED_EVERY == 0:
                file.flush()
                note.rows = rows.state_dict()
                _write_note(folder, note)
    note.finished = True
    _write_note(folder, note)


def folder_files(place: Path) -> list[Path]:
    """The files of a text folder that have an ending we read, hidden ones left out; or the one file. Raises ValueError for none."""
    endings = (*TEXT, *ROWS)
    found = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    wanted = [path for path in found if path.name.endswith(endings) and not _hidden(path, place)]
    if not wanted:
        raise ValueError(f"{place}: found no file that ends in {', '.join(endings)}; correct `path` in params.yaml")
    return wanted


def tree_digest(place: Path) -> str:
    """sha256 over the files of `place`: of one line a file, `<sha256>  <path in the folder>`, as sha256sum writes them."""
    lines = (f"{file_digest(path)}  {_inside(path, place)}\n" for path in folder_files(place))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def folder_documents(place: Path, share: float) -> Iterator[Document]:
    """The documents of a text folder, in the order of its paths, a `share` of them held out.

    A text file is one document, or where it is alone, some tens of its parts; a line of .jsonl is one, and so are a row of .parquet and a
    .pdf.
    The id is the path, and from the second document of a file on its number, so no two are the same.
    """
    paths = folder_files(place)
    for path in paths:
        name = _inside(path, place)
        for number, document in enumerate(_documents_of(path, alone=len(paths) == 1), start=1):
            yield _split(name if number == 1 else f"{name}:{number}", document.title, document.text, share)


def survey(documents: Iterable[Document], count: int) -> Survey:
    """Count `documents` in one pass and keep `count` of them, each as likely as any other (Vitter 1985, algorithm R; seeded)."""
    rng, kept = random.Random(0), dict[int, tuple[int, Document]]()
    number = text = held_out = 0
    for number, document in enumerate(documents, start=1):
        extent = len(document.text.encode())
        text += extent
        held_out += extent if document.split == "validation" else 0
        place = number - 1 if number <= count else rng.randrange(number)
        if place < count:
            kept[place] = (number, document)
    return Survey(number, text, held_out, [document for _, document in sorted(kept.values(), key=lambda pair: pair[0])])


@dataclass
class _Note:
    """How far a stream is: documents, bytes of their text, bytes of the file, and the position that the data set calls its state."""

    source: str
    documents: int = 0
    text: int = 0
    written: int = 0
    rows: dict[str, Any] | None = None
    finished: bool = False


def _read_note(folder: Path, source: StreamSource) -> _Note:
    """The note beside the file, or a new one where there is none, or it is of another source."""
    decisive = source.model_dump(exclude={"licence", "language", "checked_documents"})
    fresh = _Note(hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest())
    path = folder / STATE
    if not path.exists() or not (folder / DOCUMENTS).exists():
        return fresh
    found = _Note(**json.loads(path.read_text(encoding="utf-8")))
    return found if found.source == fresh.source else fresh


def _write_note(folder: Path, note: _Note) -> None:
    partial = folder / f".{STATE}.partial"
    partial.write_text(json.dumps(asdict(note)), encoding="utf-8")
    os.replace(partial, folder / STATE)


def _texts(source: StreamSource, rows: Rows) -> Iterator[str]:
    try:
        for row in rows:
            if not isinstance(text := row.get(source.column), str):
                raise FetchError(
                    f"{source.origin}: wanted text in column '{source.column}', found columns {', '.join(row)}; correct `column`"
                )
            yield readers.lines(text).encode("utf-8", "replace").decode()
    except FetchError:
        raise
    except Exception as error:  # of the network, of Arrow, of a decoder: the library has no type for what may go wrong in it
        raise FetchError(
            f"{source.origin}: the stream broke: {_one_line(error)}; what came is kept, and the same command goes on"
        ) from error


def _line(source: StreamSource, number: int, text: str) -> bytes:
    name = f"{slug(source.repository.rpartition('/')[2])}-{number}"
    return (json.dumps(asdict(_split(name, name, text, source.validation)), ensure_ascii=False) + "\n").encode()


def _split(name: str, title: str, text: str, share: float) -> Document:
    [document] = with_splits([Document(name, title, text)], share)
    return document


def _documents_of(path: Path, alone: bool) -> Iterator[Document]:
    if path.suffix in TEXT:
        return readers.text_of(path, readers.PIECES if alone else 1)
    return next(reader for ending, reader in ROWS.items() if path.name.endswith(ending))([path])


def _inside(path: Path, place: Path) -> str:
    return path.name if path == place else path.relative_to(place).as_posix()


def _hidden(path: Path, place: Path) -> bool:
    return any(part.startswith(".") for part in Path(_inside(path, place)).parts)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
