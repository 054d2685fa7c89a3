"""Is it in there? How much of what an answer says a source says too, and which of its citations may stay.

Support is counted in words: of the content words of a claim that the question did not bring already, the share that the source has.
So it is cheap, the same every time, and a person can check it by eye. It is no proof: a source with the words of a claim may deny it, and
one that says the same in other words counts for little. The words that do not count are English ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm_from_scratch.retrieval.lexical import words

_COMMON = """
a about above after again against all also am an and any are as at be because been before being below between both but by can could did do
does doing down during each either for from further had has have having he her here hers herself him himself his how i if in into is it its
itself just like me more most my myself neither no nor not now of off on once one only or other our ours out over own per same she should so
some such than that the their theirs them themselves then there these they this those through to too under until up upon us very was we were
what when where which while who whom whose why will with within without would you your yours
"""
COMMON = frozenset(words(_COMMON))
"""Words that any text has."""

_MARK = re.compile(r"\s*\[(\d{1,3})\]")
_OPEN = re.compile(r"\s*(?:\[.*)?\Z", re.DOTALL)  # what may become a mark yet, or go with one
_SENTENCE = re.compile(r"(?<=[.!?])(?<![A-Z]\.)(?:\s*\[\d{1,3}\])*\s+(?=[^\s\[])")


def content_words(text: str) -> set[str]:
    return set(words(text)) - COMMON


def support(claim: str, question: str, source: str) -> float:
    """The share, 0 to 1, of the words of `claim` that `source` has. What the question said counts where there is no other."""
    said = content_words(claim)
    said = said - content_words(question) or said
    return len(said & content_words(source)) / len(said) if said else 0.0


def checked(text: str, question: str, sources: Sequence[str], least: float) -> tuple[str, list[int]]:
    """`text` without the marks, as in `[2]`, that point to no source or to one that does not support their sentence; and what it cites.

    A source, numbered from 1, is cited where a mark of it stays; where none does, every source that supports one of the sentences is.
    """
    sentences = _sentences(text)
    mended = [_mended(sentence, question, sources, least) for sentence in sentences]
    text = "".join(sentence for sentence, _ in mended).strip()
    if kept := set().union(*(good for _, good in mended)):
        return text, sorted(kept)
    numbers = range(1, len(sources) + 1)
    return text, [number for number in numbers if any(_supports(sentence, number, question, sources, least) for sentence in sentences)]


def settled(text: str, question: str, sources: Sequence[str], least: float) -> str:
    """How the answer that begins with `text` will begin once it is `checked`, whatever comes next.

    Sentences that are over are there with the marks that stay in them, the last one up to its first mark.
    """
    *over, last = _sentences(text.lstrip()) or [""]
    open_at = _OPEN.search(last)
    assert open_at is not None
    return "".join(_mended(sentence, question, sources, least)[0] for sentence in over) + last[: open_at.start()]


def _mended(sentence: str, question: str, sources: Sequence[str], least: float) -> tuple[str, set[int]]:
    """A sentence without the marks that do not stay, and the numbers in those that do."""
    numbers = {int(number) for number in _MARK.findall(sentence)}
    good = {number for number in numbers if _supports(sentence, number, question, sources, least)}
    return _MARK.sub(lambda found: found[0] if int(found[1]) in good else "", sentence), good


def _supports(sentence: str, number: int, question: str, sources: Sequence[str], least: float) -> bool:
    """Whether there is a source of that number, and it bears out the sentence."""
    claim = _MARK.sub("", sentence)
    return 1 <= number <= len(sources) and support(claim, question, sources[number - 1]) >= least


def _sentences(text: str) -> list[str]:
    """The parts of `text` that end in a full stop and its marks, the space after it included, so that together they are the text."""
    ends = [found.end() for found in _SENTENCE.finditer(text)]
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
