"""Search by words: BM25 (Robertson & Zaragoza 2009, with Lucene's idf) over counts, worked out when a question comes.

Scores could be worked out beforehand (bm25s does, and a query is then only a sum), but the rarity of a word and the mean length, which
are in every score, change with each document that comes or goes. From counts both are exact at once: after adding and removing, scores are
those of an index built anew. Lucene gets there with segments, each immutable, whose statistics are summed at query time and whose files are
merged now and then; here what is added is merged at once, which moves arrays and reads no text again.

What it cannot do is match a word with its synonym, or with more of its forms than the plural of English.

Shapes: N passages, W words, P pairs of a word and a passage that has it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]

K1, B = 1.2, 0.75  # Lucene's saturation and length correction
ARRAYS, VOCABULARY = ("starts", "places", "counts", "lengths"), "vocabulary.json"

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """What is compared: the words, whatever their case and number. None is left out, as rarity already weighs them."""
    return [singular(word) for word in _WORD.findall(text.casefold())]


def singular(word: str) -> str:
    """The word without an English plural, by the three rules of the S-stemmer (Harman 1991): it joins few words that it should not."""
    if len(word) > 3 and word.endswith("s"):
        if word.endswith("ies") and word[-4] not in "ae":
            return f"{word[:-3]}y"
        if word.endswith("es") and word[-3] not in "aeo":
            return word[:-1]
        if word[-2] not in "us":
            return word[:-1]
    return word


class Lexical:
    """How often each word is in each passage: those of word w are `places[starts[w]:starts[w + 1]]`, ascending, `counts` beside them.

    `starts` is (W + 1,), `places` and `counts` (P,), `lengths` (N,) the words of each passage. Nothing changes: `plus` and `only` make
    new ones.
    """

    def __init__(self, vocabulary: dict[str, int], starts: Array, places: Array, counts: Array, lengths: Array) -> None:
        self.vocabulary = vocabulary
        self.starts = starts
        self.places = places
        self.counts = counts
        self.lengths = lengths

    @classmethod
    def build(cls, passages: Sequence[Sequence[str]]) -> Self:
        """From passages already split into words, which are numbered as they come."""
        vocabulary: dict[str, int] = {}
        rows: list[tuple[int, int, int]] = []
        for place, passage in enumerate(passages):
            for word, count in Counter(passage).items():
                rows.append((vocabulary.setdefault(word, len(vocabulary)), place, count))
        numbers, places, counts = np.array(rows, np.int64).reshape(-1, 3).T
        return cls._ordered(vocabulary, numbers, places, counts, np.array([len(passage) for passage in passages], np.int64))

    @classmethod
    def open(cls, folder: Path) -> Self:
        """What `save` wrote."""
        vocabulary = {word: number for number, word in enumerate(json.loads((folder / VOCABULARY).read_text(encoding="utf-8")))}
        return cls(vocabulary, *(np.load(folder / f"{name}.npy", allow_pickle=False).astype(np.int64) for name in ARRAYS))

    def save(self, folder: Path) -> None:
        folder.mkdir()
        for name in ARRAYS:
            array: Array = getattr(self, name)
            np.save(folder / f"{name}.npy", array if name == "starts" else array.astype(np.int32), allow_pickle=False)
        (folder / VOCABULARY).write_text(json.dumps(list(self.vocabulary), ensure_ascii=False) + "\n", encoding="utf-8")

    def plus(self, other: Lexical) -> Self:
        """These passages, then those of `other`."""
        vocabulary = dict(self.vocabulary)
        renamed = np.array([vocabulary.setdefault(word, len(vocabulary)) for word in other.vocabulary], np.int64)
        return self._ordered(
            vocabulary,
            np.concatenate([self._words, renamed[other._words]]),
            np.concatenate([self.places, other.places + len(self.lengths)]),
            np.concatenate([self.counts, other.counts]),
            np.concatenate([self.lengths, other.lengths]),
        )

    def only(self, kept: NDArray[np.bool_]) -> Self:
        """The passages that `kept` (N,) is true for, moved up. Words that nothing has any more stay known, and match nothing."""
        pairs = kept[self.places]
        moved = (np.cumsum(kept) - 1)[self.places[pairs]]
        return self._ordered(dict(self.vocabulary), self._words[pairs], moved, self.counts[pairs], self.lengths[kept])

    def scores(self, query: Sequence[str]) -> NDArray[np.float64]:
        """The score (N,) of every passage; zero for those with none of the words. A word that is asked twice counts twice."""
        found = np.zeros(len(self.lengths))
        for word, asked in Counter(query).items():
            if word in self.vocabulary:
                pairs = slice(*self.starts[self.vocabulary[word] : self.vocabulary[word] + 2])
                places, counts = self.places[pairs], self.counts[pairs]
                found[places] += asked * self._rarity(len(places)) * counts / (counts + self._saturation[places])
        return found

    def coverage(self, asked: Collection[str], text: Collection[str]) -> float:
        """The share, 0 to 1, of the words `asked` that a `text` has, rare ones for more (by idf). Raises ValueError where none is asked."""
        if not asked:
            raise ValueError("no words are asked for, so no share of them is covered")
        weights = {word: self._rarity(self._passages_with(word)) for word in set(asked)}
        return float(sum(weight for word, weight in weights.items() if word in text) / sum(weights.values()))

    def _passages_with(self, word: str) -> int:
        number = self.vocabulary.get(word)
        return 0 if number is None else int(self.starts[number + 1] - self.starts[number])

    def _rarity(self, passages: int) -> float:
        """The idf of a word that so many have."""
        return math.log(1 + (len(self.lengths) - passages + 0.5) / (passages + 0.5))

    @classmethod
    def _ordered(cls, vocabulary: dict[str, int], numbers: Array, places: Array, counts: Array, lengths: Array) -> Self:
        """From pairs of word `numbers` (P,) and places in the order of the places."""
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], np.arange(len(vocabulary) + 1))
        return cls(vocabulary, starts, places[order], counts[order], lengths)

    @property
    def _words(self) -> Array:
        """(P,) the word of each pair."""
        return np.repeat(np.arange(len(self.vocabulary)), np.diff(self.starts))

    @cached_property
    def _saturation(self) -> NDArray[np.float64]:
        """(N,) the count at which a word has half of its weight: more in long passages."""
        mean = self.lengths.sum() / max(len(self.lengths), 1)
        saturation: NDArray[np.float64] = K1 * (1 - B + B * self.lengths / max(mean, 1e-9))
        return saturation
