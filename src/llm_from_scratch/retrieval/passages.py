"""Documents cut into passages small enough to search precisely and to fit a prompt.

A cut falls between words, neighbours share a few tokens so that a sentence on the border is whole in one of them, and the pieces of one
document are about equally long: full ones and a crumb would let the crumb's few words win searches. What it cannot do is see sentences.

A passage remembers what may be asked of it (`metadata`): the topic of its document and, where that has pages (form feeds between them, as
readers leave them), the page it begins on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from llm_from_scratch.data.documents import Document

Span = tuple[int, int]  # the first character of a token and the one after its last
Spans = Callable[[Sequence[str]], list[list[Span]]]

BATCH = 1000  # documents tokenized at once
PAGE_BREAK = "\f"


@dataclass(frozen=True)
class Passage:
    """A stretch of one document: `id` is the document's with its place in it, as in `Q42#0`."""

    id: str
    document: str
    title: str
    text: str
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def searched(self) -> str:
        """What the index reads: an introduction's later part rarely repeats what the article is about, so the title goes first."""
        return f"{self.title}\n{self.text}"


def split(documents: Iterable[Document], spans: Spans, passage_tokens: int, overlap_tokens: int, maximum: int) -> list[Passage]:
    """The passages of `documents`, in order: at most `passage_tokens` of the tokens that `spans` finds, and at most `maximum` (0: all).

    Raises ValueError where the overlap leaves no way forward.
    """
    if not 0 <= overlap_tokens < passage_tokens:
        raise ValueError(f"index.overlap_tokens: found {overlap_tokens}, wanted 0 or more and less than passage_tokens, {passage_tokens}")
    return list(islice(_passages(documents, spans, passage_tokens, overlap_tokens), maximum or None))


def windows(starts_word: Sequence[bool], size: int, overlap: int) -> list[tuple[int, int]]:
    """Token ranges (first, one after the last) of at most `size` that cover all tokens; `starts_word` says before which a cut may fall.

    Neighbours share at most `overlap` tokens. A word longer than a window is cut where it has to be.
    """
    tokens, borders = len(starts_word), [*starts_word, True]
    count = max(1, -((tokens - overlap) // -(size - overlap)))
    width = -((tokens + (count - 1) * overlap) // -count)
    found: list[tuple[int, int]] = []
    begin = end = 0
    while end < tokens:
        end = _cut(borders, begin, end, width, size)
        found.append((begin, end))
        shared = range(max(end - overlap, begin + 1), end)
        begin = next((place for place in shared if starts_word[place]), end)
    return found


def write_passages(path: Path, passages: Iterable[Passage]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(passage), ensure_ascii=False) + "\n" for passage in passages)


def read_passages(path: Path) -> list[Passage]:
    """What `write_passages` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Passage(**json.loads(line)) for line in file]


def _passages(documents: Iterable[Document], spans: Spans, size: int, overlap: int) -> Iterator[Passage]:
    source = iter(documents)
    while batch := list(islice(source, BATCH)):
        for document, found in zip(batch, spans([document.text for document in batch]), strict=True):
            starts_word = [first == 0 or document.text[first - 1].isspace() for first, _ in found]
            for place, (begin, end) in enumerate(windows(starts_word, size, overlap)):
                first, last = found[begin][0], found[end - 1][1]
                text = document.text[first:last].replace(PAGE_BREAK, "\n")
                yield Passage(f"{document.id}#{place}", document.id, document.title, text, _metadata(document, first))


def _metadata(document: Document, first: int) -> dict[str, str]:
    """What is known of a passage that begins at character `first`."""
    topic = {"topic": document.topic} if document.topic else {}
    page = {"page": str(1 + document.text.count(PAGE_BREAK, 0, first))} if PAGE_BREAK in document.text else {}
    return topic | page


def _cut(borders: Sequence[bool], begin: int, covered: int, width: int, size: int) -> int:
    """Where a window from `begin` ends: the first word border from `width` on, else the last that covers more, else in mid-word."""
    last = min(begin + size, len(borders) - 1)
    later = range(min(begin + width, last), last + 1)
    earlier = range(begin + width - 1, covered, -1)
    return next((place for place in (*later, *earlier) if borders[place]), last)
