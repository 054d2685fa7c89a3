"""Week 1. Counting: how often did each token follow the last few? No gradient, no vector, one pass over the text.

Interpolated modified Kneser-Ney: each order takes a discount off its counts and hands what it saved to the order below, down to
a uniform distribution, so that nothing is impossible. The lower orders count in how many places a token was seen to follow, not
how often. (Chen and Goodman, 1998, section 4.1.6.) It is the rung that every neural one is shown against. What it cannot do is
use a context it has not seen word for word: to it, two contexts that differ in one token have nothing in common.

An n-gram is (the id of its first n - 1 tokens among those of its length) * V + its last token: one integer, looked up by
binary search in a sorted array, so both training and scoring are a few array operations an order. There are no more ids than places
in the text, so at any order the integer stays below T * V and fits into 64 bits.

Shapes: T tokens, V vocabulary, N distinct n-grams of a length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import PositiveInt

from llm_from_scratch.section import Section

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


class NgramParams(Section):
    """`order` tokens make an n-gram: the context is one token shorter."""

    architecture: Literal["ngram"]
    order: PositiveInt


class Level:
    """The n-grams of one length: p(w | h) = kept(hw) + freed(h) p(w | h without its first token).

    `keys` (N,) are sorted, and an n-gram's place among them is its id. `counts` (N,) are how often it was seen at the highest
    order, and below that how many different tokens were seen before it. The rest follows from the two.
    """

    def __init__(self, keys: Ints, counts: Array, contexts: int, vocab_size: int) -> None:
        self.keys, self.counts, self.vocab_size = keys, counts, vocab_size
        self.discounts = discounts(counts)
        taken = self.discounts[np.minimum(counts, 3)]
        context = keys // vocab_size
        total = np.bincount(context, counts, contexts)
        self.kept: Floats = (counts - taken) / total[context]
        followed = np.maximum(total, 1)  # a context that nothing follows (the last of the text) hands everything down
        self.freed: Floats = np.where(total > 0, np.bincount(context, taken, contexts) / followed, 1.0)

    def find(self, contexts: Ints, tokens: Ints) -> Ints:
        """The id of each context followed by its token; -1 where that was never seen, or the context itself is -1."""
        wanted = contexts * self.vocab_size + tokens
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where((contexts >= 0) & (self.keys[place] == wanted), place, -1)

    def followers(self, context: int) -> tuple[Ints, Floats]:
        """The tokens seen after a context, and what is kept for each."""
        first, last = np.searchsorted(self.keys, [context * self.vocab_size, (context + 1) * self.vocab_size])
        return self.keys[first:last] - context * self.vocab_size, self.kept[first:last]


class NGram:
    """One `Level` a length, shortest first. Not an `nn.Module`: there is nothing in it to learn by gradient."""

    def __init__(self, vocab_size: int, tables: Sequence[tuple[Ints, Array]]) -> None:
        self.vocab_size = vocab_size
        contexts = [1, *(len(keys) for keys, _ in tables)]
        self.levels = [Level(keys, counts, n, vocab_size) for (keys, counts), n in zip(tables, contexts, strict=False)]

    @classmethod
    def train(cls, ids: npt.ArrayLike, vocab_size: int, order: int) -> NGram:
        """Count all n-grams of `ids` (T,) up to `order`. Raises ValueError for an order below 1, or a text shorter than it."""
        text = _checked(ids, vocab_size)
        if not 1 <= order <= len(text):
            raise ValueError(f"found {len(text)} tokens and order {order}; the order must be from 1 to the number of tokens")
        tables: list[tuple[Ints, Array]] = []
        shorter = np.zeros(len(text) + 1, np.int64)  # the ids of the n-grams one token shorter, by their last place
        for length in range(1, order + 1):
            wanted = shorter[:-1] * vocab_size + text[length - 1 :]
            keys, longer, counts = np.unique(wanted, return_inverse=True, return_counts=True)
            if tables:
                tables[-1] = (tables[-1][0], left_neighbours(shorter, longer, len(tables[-1][0]), len(keys)))
            tables.append((keys, counts.astype(np.int32)))
            shorter = longer
        return cls(vocab_size, tables)

    @property
    def order(self) -> int:
        return len(self.levels)

    @property
    def parameters(self) -> int:
        """How many counts it holds."""
        return sum(len(level.counts) for level in self.levels)

    def token_nats(self, ids: npt.ArrayLike) -> Floats:
        """-log p of each token of `ids` (T,) given those before it, in nats, (T,)."""
        text = _checked(ids, self.vocab_size)
        p = np.full(len(text), 1 / self.vocab_size)
        context = np.zeros(len(text), np.int64)
        for level in self.levels:
            gram = level.find(context, text)
            mixed = level.freed[context] * p + np.where(gram >= 0, level.kept[gram], 0.0)
            p = np.where(context >= 0, mixed, p)
            context = _after(gram)
        nats: Floats = -np.log(p)
        return nats

    def doubt(self, ids: npt.ArrayLike) -> Floats:
        """The share, 0 to 1, that the longest context ever followed hands down to shorter ones before each of `ids` (T,), (T,).

        It is small after a context seen often and always followed by the same few tokens.
        """
        text = _checked(ids, self.vocab_size)
        share = np.ones(len(text))
        context = np.zeros(len(text), np.int64)
        for level in self.levels:
            freed = level.freed[context]
            share = np.where((context >= 0) & (freed < 1), freed, share)
            context = _after(level.find(context, text))
        return share

    def next_probs(self, past: Sequence[int] | Ints) -> Floats:
        """p of every token, (V,), after `past`, of which the last order - 1 tokens matter."""
        tail = _checked(past[-(self.order - 1) :] if self.order > 1 else [], self.vocab_size)
        p = np.full(self.vocab_size, 1 / self.vocab_size)
        for length, level in enumerate(self.levels[: len(tail) + 1]):
            context = self._context(tail[len(tail) - length :])
            if context < 0:  # so is every longer one
                break
            tokens, kept = level.followers(context)
            p *= level.freed[context]
            p[tokens] += kept
        return p

    def arrays(self) -> dict[str, Array]:
        """All there is to save."""
        named = ((f"{kind}.{n}", array) for n, level in enumerate(self.levels, 1) for kind, array in _saved(level))
        return dict(named)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array], vocab_size: int, order: int) -> NGram:
        """What `arrays` gave. Raises ValueError when some are missing."""
        wanted = {f"{kind}.{n}" for n in range(1, order + 1) for kind in ("keys", "counts")}
        if odd := sorted(wanted.symmetric_difference(arrays)):
            raise ValueError(f"an n-gram of order {order} has keys and counts for each order; {odd[0]} is {_which(odd[0], wanted)}")
        return cls(vocab_size, [(arrays[f"keys.{n}"], arrays[f"counts.{n}"]) for n in range(1, order + 1)])

    def _context(self, tokens: Ints) -> int:
        gram = np.zeros(1, np.int64)
        for level, token in zip(self.levels, tokens, strict=False):
            gram = level.find(gram, token)
        return int(gram[0])


def left_neighbours(shorter: Ints, longer: Ints, n_shorter: int, n_longer: int) -> Array:
    """How many different tokens were seen before each n-gram, (n_shorter,).

    `shorter` (T,) and `longer` (T - 1,) are the ids of the n-grams ending at each place; each distinct longer one is one
    left neighbour of the shorter one it ends in. The start of the text is the neighbour of the n-gram that it begins with.
    """
    ending = np.empty(n_longer, np.int64)
    ending[longer] = shorter[1:]
    counts = np.bincount(ending, minlength=n_shorter)
    counts[shorter[0]] += 1
    return counts.astype(np.int32)


def discounts(counts: Array) -> Floats:
    """What is taken off a count of 0, 1, 2, and 3 or more, from the counts of counts (Chen and Goodman, eq. 26).

    A text too small to estimate one gets half the count (the usual 0.5, 1, 1.5): a discount of zero would make new tokens impossible.
    """
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == c)) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array([0, 0.5, 1, 1.5])
    y = n1 / (n1 + 2 * n2)
    estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return np.array([0.0, *(d if 0 < d < c else c / 2 for c, d in enumerate(estimates, 1))])


def _checked(ids: npt.ArrayLike, vocab_size: int) -> Ints:
    text = np.asarray(ids, np.int64)
    if text.size and not 0 <= text.min() <= text.max() < vocab_size:
        raise ValueError(f"found token ids from {text.min()} to {text.max()}, the vocabulary has 0 to {vocab_size - 1}")
    return text


def _after(gram: Ints) -> Ints:
    """The n-gram that ends just before each token, (T,), from the one that ends with it; nothing ends before the first."""
    return np.concatenate((np.full(1, -1), gram))[: len(gram)]


def _saved(level: Level) -> tuple[tuple[str, Array], tuple[str, Array]]:
    return ("keys", level.keys), ("counts", level.counts)


def _which(name: str, wanted: set[str]) -> str:
    return "missing" if name in wanted else "one too many"
