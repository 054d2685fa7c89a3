"""Readers: how the files of a source become documents. One function a format, each from a folder to documents in a stable order.

Line ends become \n, a byte-order mark is dropped, and every document gets a unique id and its split. Text is otherwise left as it is:
what is wrong with it is for validation to say, not for a reader to hide.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from llm_from_scratch.data.documents import Document, slug, with_splits, with_unique_ids

ReaderName = Literal["gutenberg", "wiki_summaries", "text", "jsonl", "parquet", "files"]

PIECES = 50  # a lone text is cut into this many documents, so that there is something to hold out

_GUTENBERG_START = re.compile(r"^\*{3} ?START OF.*$|^\*END\*? ?THE SMALL PRINT.*$", re.MULTILINE | re.IGNORECASE)
_GUTENBERG_END = re.compile(r"^\*{3} ?END OF.*$|^End of (the |this )?Project Gutenberg.*$", re.MULTILINE | re.IGNORECASE)
_GUTENBERG_TITLE = re.compile(r"^Title: *(.+)$", re.MULTILINE)
# zstandard files made with --long=27 need a window of that many bits.
_ZSTD_WINDOW = 2**27


class ReadError(ValueError):
    """A file is not in the form that its reader reads."""


def read(reader: ReaderName, folder: Path, share: float) -> list[Document]:
    """The documents in the files of `folder`, a `share` of them held out. Raises ValueError naming a file that is not as expected."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return with_splits(list(with_unique_ids(_READERS[reader](paths))), share)


def gutenberg(paths: Iterable[Path]) -> Iterator[Document]:
    """One work a file, without the notices that Project Gutenberg puts around it; the title is its own, or the first line."""
    for path in paths:
        whole = _text(path)
        start = max((match.end() for match in _GUTENBERG_START.finditer(whole)), default=0)
        end = _GUTENBERG_END.search(whole, start)
        text = whole[start : end.start() if end else None].strip() + "\n"
        declared = _GUTENBERG_TITLE.search(whole, 0, start)
        title = declared[1].strip() if declared else text.split("\n", 1)[0].strip()
        yield Document(slug(path.stem.removesuffix("_gut")), title, text)


def wiki_summaries(paths: Iterable[Path]) -> Iterator[Document]:
    """Introductions of encyclopedia articles: a JSON object of objects with title, extract, description and topic."""
    for path in paths:
        with _naming(path, "an object of objects with title, extract, description and topic"):
            yield from (_entry(each) for each in json.loads(_text(path)).values())


def text(paths: Iterable[Path]) -> Iterator[Document]:
    """One document a file; a file that is alone is cut at blank lines into PIECES consecutive documents of about equal length."""
    paths = list(paths)
    for path in paths:
        yield from text_of(path, PIECES if len(paths) == 1 else 1)


def text_of(path: Path, count: int) -> Iterator[Document]:
    """A text file as at most `count` documents."""
    pieces = _pieces(_text(path), count)
    for number, piece in enumerate(pieces, start=1):
        yield Document(slug(path.stem), path.stem if len(pieces) == 1 else f"{path.stem} {number}", piece)


def jsonl(paths: Iterable[Path]) -> Iterator[Document]:
    """One JSON object a line with text and, if it has a name, title; plain, .gz, or .zst where zstandard is installed."""
    for path in paths:
        with _naming(path, "a JSON object with text on each line"), _unpacked(path) as file:
            yield from (_row(path, number, json.loads(line)) for number, line in enumerate(file, start=1) if line.strip())


def parquet(paths: Iterable[Path]) -> Iterator[Document]:
    """One row a document, with the columns text and, if there is one, title. Needs pyarrow."""
    for path in paths:
        with _naming(path, "a parquet file with a text column"):
            rows = _optional("pyarrow.parquet", "pyarrow").ParquetFile(path).iter_batches()
            numbered = enumerate((row for batch in rows for row in batch.to_pylist()), start=1)
            yield from (_row(path, number, row) for number, row in numbered)


def pdf(paths: Iterable[Path]) -> Iterator[Document]:
    """One document a file, named by its own title or the file's, with a form feed between pages. Needs pypdf.

    Raises ReadError for one that is damaged, locked, or only pictures: what cannot be read is not left out in silence.
    """
    for path in paths:
        reader_of = _optional("pypdf", "pypdf").PdfReader
        try:
            reader = reader_of(path)
            locked = reader.is_encrypted and not reader.decrypt("")
            pages = [] if locked else [lines(page.extract_text()).strip() for page in reader.pages]
            title = "" if locked else ((reader.metadata.title if reader.metadata else None) or "").strip()
        except Exception as error:  # of a parser fed with anything: the library has no type for what may go wrong in it
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ReadError(f"{path.name}: wanted a PDF, found {found}; repair it, or take it out of the folder") from None
        if locked:
            raise ReadError(f"{path.name}: is locked with a password; save it without one, or take it out of the folder")
        if not any(pages):
            raise ReadError(f"{path.name}: found no text on its {len(pages)} pages; run OCR on it, or take it out of the folder")
        text = "\f".join(pages) + "\n"
        yield Document(slug(path.stem), title or path.stem, text.encode("utf-8", "replace").decode())


def files(paths: Iterable[Path]) -> Iterator[Document]:
    """No documents: what the source holds is kept as files, such as a model."""
    return iter(())


def lines(text: str) -> str:
    """`text` with every end of a line as \\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


_READERS: dict[ReaderName, Callable[[Iterable[Path]], Iterator[Document]]] = {
    "gutenberg": gutenberg,
    "wiki_summaries": wiki_summaries,
    "text": text,
    "jsonl": jsonl,
    "parquet": parquet,
    "files": files,
}


def _text(path: Path) -> str:
    with _naming(path, "UTF-8 text"):
        return lines(path.read_bytes().decode("utf-8-sig"))


def _pieces(text: str, count: int) -> list[str]:
    """At most `count` runs of paragraphs; a paragraph belongs to the run in whose equal share of the text it starts."""
    runs: dict[int, list[str]] = {}
    offset = 0
    for paragraph in text.split("\n\n"):
        runs.setdefault(offset * count // max(1, len(text)), []).append(paragraph)
        offset += len(paragraph) + 2
    return ["\n\n".join(run).strip("\n") + "\n" for run in runs.values()]


def _entry(entry: dict[str, str]) -> Document:
    text = entry["extract"].strip() + "\n"
    return Document(slug(entry["title"]), entry["title"], text, description=entry["description"], topic=entry["topic"])


def _row(path: Path, number: int, row: dict[str, Any]) -> Document:
    title = row.get("title") or f"{path.name.split('.')[0]} {number}"
    return Document(slug(title), title, lines(row["text"]))


@contextmanager
def _unpacked(path: Path) -> Iterator[TextIO]:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig") as file:
            yield file
    elif path.suffix == ".zst":
        unpacker = _optional("zstandard", "zstandard").ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        with path.open("rb") as packed, io.TextIOWrapper(unpacker.stream_reader(packed), encoding="utf-8-sig") as file:
            yield file
    else:
        with path.open(encoding="utf-8-sig") as file:
            yield file


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ReadError(f"no {package} in this environment; uv pip install {package}") from None


@contextmanager
def _naming(path: Path, wanted: str) -> Iterator[None]:
    """Whatever goes wrong while a file is read, said in one line that names the file."""
    try:
        yield
    except ReadError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError) as error:
        raise ReadError(f"{path.name}: wanted {wanted}, found {type(error).__name__}: {error}; correct `reader` in params.yaml") from None
