"""Two searches over the same passages: by meaning (vectors in FAISS) and by words (BM25), and the fusion of both.

Each finds what the other misses: vectors know that a film is a movie, words know that 2001 is not 2010. FAISS is used flat, so it is exact;
past some millions of passages an approximate index would take its place. No pickle: arrays, JSON, and a FAISS file whose digest is checked
before FAISS reads it.

Shapes: Q queries, N passages, D dimensions of a vector.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from llm_from_scratch import bundle
from llm_from_scratch.retrieval.passages import Passage, read_passages, write_passages
from llm_from_scratch.section import Section

if TYPE_CHECKING:
    from llm_from_scratch.retrieval.embed import Embedder, Vectors

Mode = Literal["fused", "dense", "bm25"]
Ranking = list[tuple[int, float]]  # (place of a passage, its score), best first

DENSE_FILE, LEXICAL_FOLDER, PASSAGES_FILE = "faiss.index", "bm25", "passages.jsonl"
K1, B = 1.5, 0.75  # BM25's usual saturation and length correction (Robertson & Zaragoza 2009), in Lucene's form
RANK_CONSTANT = 60  # reciprocal rank fusion's k (Cormack et al. 2009)
DEPTH = 100  # how far down each ranking fusion looks

_WORD = re.compile(r"\w+")


class IndexParams(Section):
    """The section `index`: which corpus is cut into passages of how many of the embedder's tokens (`maximum_passages` 0: all)."""

    documents: str
    embedder: str
    passage_tokens: int = Field(ge=1)
    overlap_tokens: int = Field(ge=0)
    batch: int = Field(ge=1)
    maximum_passages: int = Field(ge=0)


@dataclass(frozen=True)
class Hit:
    """A passage found: `rank` from 1, `score` a cosine (dense), a BM25 score, or a sum of reciprocal ranks (fused)."""

    passage: Passage
    score: float
    rank: int


def build_index(folder: Path, passages: Sequence[Passage], vectors: Vectors) -> None:
    """Write all that `Index.open` reads, but for the manifest. `vectors` (N, D) are the unit vectors of `Passage.searched`."""
    if not passages or len(passages) != len(vectors):
        raise ValueError(f"found {len(passages)} passages and {len(vectors)} vectors, wanted as many of both, and some")
    _write_dense(folder / DENSE_FILE, vectors)
    Lexical.build([words(passage.searched) for passage in passages]).save(folder / LEXICAL_FOLDER)
    write_passages(folder / PASSAGES_FILE, passages)


def words(text: str) -> list[str]:
    """What BM25 compares: the words, whatever their case. Nothing is stopped or stemmed, as rarity already weighs them."""
    return _WORD.findall(text.casefold())


def fuse(rankings: Sequence[Ranking]) -> Ranking:
    """Reciprocal rank fusion: each ranking gives 1 / (60 + rank) to what it found, so scores of different kinds need no common scale."""
    scores: dict[int, float] = defaultdict(float)
    for ranking in rankings:
        for rank, (place, _) in enumerate(ranking, 1):
            scores[place] += 1 / (RANK_CONSTANT + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


class Index:
    """Passages that can be searched. Queries go through the embedder the vectors were made with; another one is refused."""

    def __init__(self, passages: Sequence[Passage], dense: Any, lexical: Lexical, embedder: Embedder) -> None:
        self.passages = passages
        self.dense = dense
        self.lexical = lexical
        self.embedder = embedder

    @classmethod
    def open(cls, folder: Path, embedder: Embedder) -> Self:
        """Raises BundleError when the index is missing, damaged, or made with another embedder."""
        manifest = bundle.verify(folder, "index")
        if (made_with := manifest.parents.get("embedder")) != embedder.digest:
            raise bundle.BundleError(
                f"{folder} was made with the embedder {str(made_with)[:12]}…, the one here is {embedder.digest[:12]}…; "
                f"rebuild it with: dvc repro {manifest.made_by}"
            )
        dense = _faiss().read_index(str(folder / DENSE_FILE))
        return cls(read_passages(folder / PASSAGES_FILE), dense, Lexical.open(folder / LEXICAL_FOLDER), embedder)

    def search(self, query: str, k: int, mode: Mode = "fused") -> list[Hit]:
        """The best `k` passages for `query`, fewer where no more are found; none for an empty query."""
        return self.search_all([query], k, mode)[0]

    def search_all(self, queries: Sequence[str], k: int, mode: Mode = "fused") -> list[list[Hit]]:
        """`search` for many queries at once, which embeds them together."""
        if k < 1:
            raise ValueError(f"search: found k = {k}, wanted at least 1 passage")
        asked = [place for place, query in enumerate(queries) if query.strip()]
        found: list[list[Hit]] = [[] for _ in queries]
        for place, ranking in zip(asked, self._rankings([queries[place] for place in asked], k, mode), strict=True):
            found[place] = [Hit(self.passages[passage], score, rank) for rank, (passage, score) in enumerate(ranking[:k], 1)]
        return found

    def _rankings(self, queries: Sequence[str], k: int, mode: Mode) -> list[Ranking]:
        if mode == "dense":
            return self._by_meaning(queries, k)
        if mode == "bm25":
            return self._by_words(queries, k)
        if mode == "fused":
            depth = max(k, DEPTH)
            return [fuse(pair) for pair in zip(self._by_meaning(queries, depth), self._by_words(queries, depth), strict=True)]
        raise ValueError(f"search: no mode '{mode}'; there is fused, dense, bm25")

    def _by_meaning(self, queries: Sequence[str], depth: int) -> list[Ranking]:
        if not queries:
            return []
        scores, places = self.dense.search(self.embedder.embed(queries), min(depth, len(self.passages)))
        return [[(int(place), float(score)) for place, score in zip(*row, strict=True)] for row in zip(places, scores, strict=True)]

    def _by_words(self, queries: Sequence[str], depth: int) -> list[Ranking]:
        return [_best(self.lexical.scores(words(query)), depth) for query in queries]


class Lexical:
    """BM25 over passages already split into words, every word's score in every passage worked out beforehand (bm25s, Lù 2024)."""

    def __init__(self, scorer: Any) -> None:
        self.scorer = scorer

    @classmethod
    def build(cls, passages: Sequence[Sequence[str]]) -> Self:
        """Words are numbered as they come: bm25s would number them by a set's order, which differs from run to run."""
        vocabulary = {word: number for number, word in enumerate(dict.fromkeys(word for passage in passages for word in passage))}
        ids = [[vocabulary[word] for word in passage] for passage in passages]
        scorer = _bm25s().BM25(k1=K1, b=B, method="lucene")
        scorer.index((ids, vocabulary), create_empty_token=False, show_progress=False)
        return cls(scorer)

    @classmethod
    def open(cls, folder: Path) -> Self:
        return cls(_bm25s().BM25.load(folder, show_progress=False))

    def save(self, folder: Path) -> None:
        self.scorer.save(folder, show_progress=False)

    def scores(self, query: Sequence[str]) -> NDArray[np.float32]:
        """The score (N,) of every passage; zero for those with none of the words."""
        known = self.scorer.get_tokens_ids(list(query))
        if not known:
            return np.zeros(self.scorer.scores["num_docs"], np.float32)
        found: NDArray[np.float32] = self.scorer.get_scores_from_ids(known)
        return found


def _best(scores: NDArray[np.float32], depth: int) -> Ranking:
    """The highest positive scores, in the passages' order where equal."""
    order = np.argsort(-scores, kind="stable")[:depth]
    return [(int(place), float(scores[place])) for place in order if scores[place] > 0]


def _write_dense(path: Path, vectors: Vectors) -> None:
    faiss = _faiss()
    dense = faiss.IndexFlatIP(vectors.shape[1])
    dense.add(np.ascontiguousarray(vectors))
    faiss.write_index(dense, str(path))


def _faiss() -> Any:
    import torch  # noqa: F401  faiss loaded before torch brings another OpenMP first, and the process can crash

    try:
        import faiss
    except ImportError:
        raise ValueError("no faiss here; pip install 'llm-from-scratch[retrieval]' brings it") from None
    return faiss


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise ValueError("no bm25s here; pip install 'llm-from-scratch[retrieval]' brings it") from None
    return bm25s
