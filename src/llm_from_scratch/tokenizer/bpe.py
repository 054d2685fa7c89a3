"""Byte-level byte-pair encoding (Sennrich et al. 2016; GPT-2), trained here and encoded by tiktoken.

Starts from the 256 bytes, so no text is unknown, and again and again makes the most frequent pair of neighbours one token: spelling
becomes vocabulary, and sequences get about three times shorter than characters. Pairs never cross the borders of GPT-2's split pattern.

The textbook loop counts every pair of the corpus again after each merge. Two facts save nearly all of it: equal words merge equally, so
only unique words are kept, with their counts; and a merge changes only the words that hold the pair, which an inverted index names.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken
from numpy.typing import NDArray

from llm_from_scratch.tokenizer import export
from llm_from_scratch.tokenizer.base import SPECIAL, Vocabulary, well_formed

Pair = tuple[int, int]
Progress = Callable[[int, int], None]

# GPT-2's own, to the letter: llama.cpp and others know a tokenizer by its split pattern.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
WORDS = regex.compile(PATTERN)

# tiktoken's regex engine keeps a place to go back to for each blank and panics, past any `except Exception`, at some 10⁶ of them.
LONG = 1 << 16
LONG_BLANK = regex.compile(rf"\s{{{LONG},}}")

# GPT-2's order of the bytes, which is also Hugging Face's (by the printable character that stands for the byte in tokenizer.json).
BYTE_ORDER = tuple(export.BYTE_OF.values())


def quiet(done: int, total: int) -> None:
    """The default progress: a library has nothing to say to a terminal."""


class BpeTokenizer(Vocabulary):
    """Ids 0 … 255 are the bytes in GPT-2's order, then one for each merge, then the special tokens."""

    def __init__(self, merges: Sequence[Pair], special: Sequence[str] = SPECIAL) -> None:
        tokens = [bytes([byte]) for byte in BYTE_ORDER]
        for left, right in merges:
            tokens.append(tokens[left] + tokens[right])
        super().__init__(tokens, special)
        self.tokens = tuple(tokens)
        self.merges = tuple(merges)
        self._made = {pair: len(BYTE_ORDER) + rank for rank, pair in enumerate(merges)}
        self._byte_ids = {byte: place for place, byte in enumerate(BYTE_ORDER)}
        ranks = {piece: place for place, piece in enumerate(tokens)}
        if len(ranks) != len(tokens):
            raise ValueError(f"two of the {len(merges)} merges make the same bytes; training never does that, so the list is damaged")
        self._fast = tiktoken.Encoding("llm-from-scratch", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> BpeTokenizer:
        """From a parsed tokenizer.json. Raises KeyError, TypeError, IndexError or ValueError when it is not one of these."""
        ids: dict[str, int] = document["model"]["vocab"]
        merges = [(ids[left], ids[right]) for left, right in document["model"]["merges"]]
        return cls(merges, [added["content"] for added in document["added_tokens"]])

    def __reduce__(self) -> tuple[type[BpeTokenizer], tuple[Sequence[Pair], Sequence[str]]]:
        """To another process goes what it was made from, a tenth of what it holds."""
        return type(self), (self.merges, tuple(self.special))

    def document(self) -> dict[str, Any]:
        """tokenizer.json as a value."""
        return export.byte_level(self.tokens, self.merges, self.special)

    def save(self, folder: Path) -> None:
        export.write(folder, self.document())
        export.write_merges(folder, self.tokens, self.merges)

    def encode(self, text: str) -> list[int]:
        text = well_formed(text)
        if not _may_have_long_blank(text):
            return self._fast.encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for blank in LONG_BLANK.finditer(text):
            # As in the pattern: a run of blanks is one piece, without its last blank when something follows that may want it.
            end = blank.end() - (blank.end() < len(text))
            ids += self._fast.encode_ordinary(text[start : blank.start()])
            ids += self._merge(text[blank.start() : end])
            start = end
        return ids + self._fast.encode_ordinary(text[start:])

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [self._encode_array(text) for text in texts]

    def _encode_array(self, text: str) -> NDArray[np.uint32]:
        """`encode` without a Python number for each token. Nothing special is allowed, so the names of special tokens are text here too."""
        text = well_formed(text)
        if _may_have_long_blank(text):
            return np.array(self.encode(text), dtype=np.uint32)
        return self._fast.encode_to_numpy(text, allowed_special=set(), disallowed_special=())

    def encode_reference(self, text: str) -> list[int]:
        """The slow obvious way, from the merges alone: the oracle of `encode`."""
        return [token for word in WORDS.findall(well_formed(text)) for token in self._merge(word)]

    def _merge(self, word: str) -> list[int]:
        ids = [self._byte_ids[byte] for byte in word.encode("utf-8")]
        while known := [self._made[pair] for pair in pairwise(ids) if pair in self._made]:
            made = min(known)
            ids = merged(ids, self.merges[made - len(BYTE_ORDER)], made)
        return ids


def _may_have_long_blank(text: str) -> bool:
    """False where no run of LONG blanks is: such a run has all of some half of that length, counted from the start, in it."""
    half = LONG // 2
    return len(text) >= LONG and any(text[start : start + half].isspace() for start in range(0, len(text), half))


def train_bpe(texts: Iterable[str], vocab_size: int, progress: Progress = quiet) -> BpeTokenizer:
    """A tokenizer of `vocab_size` tokens, bytes and special ones included; of fewer, if the texts run out of pairs.

    `texts` is read once and only the counts of its words are kept. `progress` is called with (merges done, merges wanted).
    """
    wanted = vocab_size - len(BYTE_ORDER) - len(SPECIAL)
    if wanted < 0:
        raise ValueError(f"vocab_size is {vocab_size}; bytes and special tokens alone are {len(BYTE_ORDER) + len(SPECIAL)}, give more")
    return BpeTokenizer(learn_merges(count_words(texts), wanted, progress))


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each piece of the split pattern occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORDS.findall(well_formed(text)))
    return counts


def learn_merges(counts: Mapping[str, int], wanted: int, progress: Progress = quiet) -> list[Pair]:
    """Up to `wanted` merges, most frequent pair first; of equally frequent ones, the pair with the lower ids.

    That is the order of Hugging Face's BpeTrainer, so its merges are the same. The heap is lazy: an entry is pushed when its pair is
    born and its count may have fallen since (it never rises: new pairs hold the new token), which is looked up when it surfaces.
    """
    words = _Words(counts)
    heap = [(-count, pair) for pair, count in words.pairs.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < wanted:
        claimed, pair = heapq.heappop(heap)
        count = words.pairs[pair]
        if count != -claimed:
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        made = len(BYTE_ORDER) + len(merges)
        merges.append(pair)
        for born in words.merge(pair, made):
            heapq.heappush(heap, (-words.pairs[born], born))
        progress(len(merges), wanted)
    return merges


class _Words:
    """Unique words as ids, the count of each pair of neighbours over all of them, and which words each pair has been seen in."""

    def __init__(self, counts: Mapping[str, int]) -> None:
        place = {byte: token for token, byte in enumerate(BYTE_ORDER)}
        self.spelled = [[place[byte] for byte in word.encode("utf-8")] for word in counts]
        self.counts = list(counts.values())
        self.pairs: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)
        for index, (ids, count) in enumerate(zip(self.spelled, self.counts, strict=True)):
            for pair in pairwise(ids):
                self.pairs[pair] += count
                self.where[pair].add(index)

    def merge(self, pair: Pair, made: int) -> set[Pair]:
        """Make `pair` the token `made` wherever it is; the pairs that were born of it."""
        born: set[Pair] = set()
        for index in self.where.pop(pair):
            old, count = self.spelled[index], self.counts[index]
            new = merged(old, pair, made)
            if len(new) == len(old):
                continue  # the index is lazy too: an earlier merge took the pair out of this word
            for gone in pairwise(old):
                self.pairs[gone] -= count
            for there in pairwise(new):
                self.pairs[there] += count
                if made in there:
                    self.where[there].add(index)
                    born.add(there)
            self.spelled[index] = new
        return born


def merged(ids: Sequence[int], pair: Pair, made: int) -> list[int]:
    """`ids` with `pair` replaced by `made`, from left to right: three of a kind become one pair and one left over."""
    left, right = pair
    new: list[int] = []
    place = 0
    while place < len(ids):
        if ids[place] == left and place + 1 < len(ids) and ids[place + 1] == right:
            new.append(made)
            place += 2
        else:
            new.append(ids[place])
            place += 1
    return new
