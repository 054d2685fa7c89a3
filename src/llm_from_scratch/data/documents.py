"""Documents: what a corpus is made of once its files are read. One line of documents.jsonl each, in the order of the source.

The split belongs to the document, decided once from its id, so every tokenizer, chat record and question holds out the same text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

DOCUMENTS = "documents.jsonl"

Split = Literal["train", "validation"]

# A line with this is of the other split and need not be parsed. In a text the quotes would be escaped, so it cannot be in one.
_OTHERS: dict[Split, bytes] = {"train": b'"split": "validation"', "validation": b'"split": "train"'}


@dataclass(frozen=True)
class Document:
    """One text with a name. `description` and `topic` are empty where the source has none."""

    id: str
    title: str
    text: str
    split: Split = "train"
    description: str = ""
    topic: str = ""


def slug(title: str) -> str:
    """An id from a title: lower case, words joined by hyphens, letters of any script kept."""
    return re.sub(r"[\W_]+", "-", title.casefold()).strip("-") or "untitled"


def with_unique_ids(documents: Iterable[Document]) -> Iterator[Document]:
    """The same documents; an id that was taken before gets -2, -3, …"""
    taken: set[str] = set()
    for document in documents:
        name, count = document.id, 1
        while name in taken:
            count += 1
            name = f"{document.id}-{count}"
        taken.add(name)
        yield replace(document, id=name)


def with_splits(documents: Sequence[Document], share: float) -> list[Document]:
    """The same documents, those held out for validation whose id hashes below `share`.

    Where `share` is above zero and there are two documents or more, each split has at least one.
    """
    places = [_place(document.id) for document in documents]
    held_out = {index for index, place in enumerate(places) if place < share}
    if share > 0 and len(documents) > 1:
        held_out = held_out or {places.index(min(places))}
        if len(held_out) == len(documents):
            held_out.remove(places.index(max(places)))
    return [replace(document, split="validation" if index in held_out else "train") for index, document in enumerate(documents)]


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """One JSON object a line; the same documents always give the same bytes."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents)


def read_documents(folder: Path, split: Split | None = None, part: range | None = None) -> Iterator[Document]:
    """The documents of a corpus bundle, in order, one at a time; only those of `split`, and of `part`, if given (see `parts`).

    Raises ValueError where it has none.
    """
    with _file(folder).open("rb") as file:
        place, end = (part.start, part.stop) if part else (0, None)
        if place:
            file.seek(place - 1)  # a line that begins before this part is another's
            place += len(file.readline()) - 1
        while (end is None or place < end) and (line := file.readline()):
            place += len(line)
            if split and _OTHERS[split] in line:
                continue
            document = Document(**json.loads(line))
            if split in (None, document.split):
                yield document


def parts(folder: Path, length: int) -> list[range]:
    """The bytes of documents.jsonl in consecutive ranges of `length`; a document belongs to the one that its line begins in."""
    whole = _file(folder).stat().st_size
    return [range(start, min(start + length, whole)) for start in range(0, whole, length)]


def _file(folder: Path) -> Path:
    path = folder / DOCUMENTS
    if not path.is_file():
        raise ValueError(f"no {DOCUMENTS} in {folder}: it holds files rather than text, or is not built; dvc repro download builds it")
    return path


def _place(name: str) -> float:
    """Where in [0, 1) a hash puts this id: evenly spread, and the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
