"""What validation looks at: one row a document, one column a thing that can be wrong with it.

Near duplicates are found by MinHash with locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman & Ullman, ch. 3) over runs of words,
and every pair found that way is then compared exactly. Between training and held-out text, runs of 13 words are compared as well (Brown et
al. 2020, appendix C): a poem inside a collection is no near duplicate of it, and leaks all the same.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llm_from_scratch.data.documents import Document

if TYPE_CHECKING:
    import pandas as pd

SHINGLE = 5  # words in a run, for likeness
WINDOW = 13  # words in a run, for leakage
# 16 bands of 4 hashes: a pair that is 0.8 alike is found with a probability of 1 - (1 - 0.8⁴)¹⁶ = 0.9998.
BANDS, ROWS = 16, 4
HASHED_AT_ONCE = 20_000  # runs; bounds the memory of a long document
LANGUAGE_SAMPLE = 1_000  # characters from the middle of a document: beginnings are lists of names more often

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0d-\x1f\x7f-\x9f]")  # a form feed is the end of a page
_PII = {
    "email": re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[a-zA-Z]{2,}\b"),
    "phone": re.compile(r"(?<![\w.-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"),
    "ssn": re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
    "ip": re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w.])"),
}
_CARD = re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])")


def features(documents: Sequence[Document], licence: str, similarity: float) -> pd.DataFrame:
    """One row a document, in order; a column that names another document is empty where there is none.

    `similarity` is the Jaccard index of two documents' runs of words from which they count as near duplicates.
    """
    import pandas as pd

    first = _first_with_same_text(documents)
    alike = _alike([document.text for document in documents], sorted(set(first)), similarity)
    overlap = _overlap(documents)
    return pd.DataFrame(
        {
            "id": [document.id for document in documents],
            "title": [document.title for document in documents],
            "split": [document.split for document in documents],
            "licence": licence,
            "characters": [len(document.text) for document in documents],
            "duplicate_of": [documents[first[place]].id if first[place] != place else "" for place in range(len(documents))],
            "near_duplicate_of": [_nearest_before(documents, place, alike) for place in range(len(documents))],
            "leaked_from": _leaked_from(documents, first, alike),
            "train_overlap": [overlap.get(document.id, 0.0) for document in documents],
            "language": _languages(documents),
            "mojibake": [_mojibake(document.text) for document in documents],
            "control_share": [len(_CONTROL.findall(document.text)) / max(1, len(document.text)) for document in documents],
            "pii": [personal(document.text) for document in documents],
        }
    )


def personal(text: str) -> str:
    """The kinds of personal data that seem to be in a text, with their counts, as in '2 email'; never the data itself."""
    counts = {kind: len(pattern.findall(text)) for kind, pattern in _PII.items()}
    counts["card"] = sum(luhn(match[0]) for match in _CARD.finditer(text))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def luhn(number: str) -> bool:
    """Whether the digits pass the check that payment card numbers are made to pass (ISO/IEC 7812-1)."""
    digits = [int(digit) for digit in reversed(number) if digit.isdigit()]
    return (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


def shingles(text: str) -> set[str]:
    """The runs of SHINGLE words in a text, in lower case; a shorter text is one run."""
    words = _words(text)
    return {" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))}


def jaccard(one: set[str], other: set[str]) -> float:
    """The share of all members that are in both."""
    return len(one & other) / len(one | other)


def _first_with_same_text(documents: Sequence[Document]) -> list[int]:
    seen: dict[str, int] = {}
    return [seen.setdefault(document.text, place) for place, document in enumerate(documents)]


def _alike(texts: Sequence[str], places: Sequence[int], similarity: float) -> dict[int, list[int]]:
    """For each of `places`, the others whose texts are at least `similarity` alike."""
    from datasketch import MinHashLSH

    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    alike: dict[int, list[int]] = defaultdict(list)
    for place in places:
        runs = shingles(texts[place])
        sketch = _sketch(runs)
        for other in sorted(index.query(sketch)):
            if jaccard(runs, shingles(texts[other])) >= similarity:
                alike[place].append(other)
                alike[other].append(place)
        index.insert(place, sketch)
    return alike


def _sketch(runs: set[str]) -> Any:
    from datasketch import MinHash

    sketch = MinHash(num_perm=BANDS * ROWS, hashfunc=zlib.crc32)
    encoded = [run.encode() for run in runs]
    for start in range(0, len(encoded), HASHED_AT_ONCE):
        sketch.update_batch(encoded[start : start + HASHED_AT_ONCE])
    return sketch


def _nearest_before(documents: Sequence[Document], place: int, alike: dict[int, list[int]]) -> str:
    return next((documents[other].id for other in alike.get(place, []) if other < place), "")


def _leaked_from(documents: Sequence[Document], first: Sequence[int], alike: dict[int, list[int]]) -> list[str]:
    """For a held-out document, the training document that has the same text or is nearly the same."""
    trained: dict[int, str] = {}
    for place, document in enumerate(documents):
        if document.split == "train":
            trained.setdefault(first[place], document.id)
    leaks = []
    for place, document in enumerate(documents):
        same = [first[place], *alike.get(first[place], [])] if document.split == "validation" else []
        leaks.append(next((trained[other] for other in same if other in trained), ""))
    return leaks


def _overlap(documents: Sequence[Document]) -> dict[str, float]:
    """For each held-out document, the share of its runs of WINDOW words that also stand in a training document."""
    held_out = {document.id: set(_windows(document.text)) for document in documents if document.split == "validation"}
    # Only the held-out runs are kept in memory; training text is far larger.
    sought = set().union(*held_out.values())
    seen = {run for document in documents if document.split == "train" for run in _windows(document.text) if run in sought}
    return {name: len(runs & seen) / max(1, len(runs)) for name, runs in held_out.items()}


def _windows(text: str) -> Iterator[int]:
    words = _words(text)
    return map(hash, zip(*(words[start:] for start in range(WINDOW)), strict=False))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _languages(documents: Sequence[Document]) -> list[str]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    middles = [max(0, (len(document.text) - LANGUAGE_SAMPLE) // 2) for document in documents]
    return [identifier.classify(each.text[start : start + LANGUAGE_SAMPLE])[0] for each, start in zip(documents, middles, strict=True)]


def _mojibake(text: str) -> int:
    """How many sequences look like text decoded with the wrong encoding, replacement characters included."""
    from ftfy.badness import badness

    return int(badness(text)) + text.count("\ufffd")
