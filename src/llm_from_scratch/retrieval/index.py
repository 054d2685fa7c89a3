"""Two searches over the same passages, by meaning (`dense`) and by words (`lexical`), and the fusion of both.

Each finds what the other misses: vectors know that a film is a movie, words know that 2001 is not 2010. Documents come and go without a
rebuild: only what is new is embedded. No pickle: arrays, JSON, and a FAISS file whose digest is checked before FAISS reads it.

What it cannot do is change while others search it: change one of your own, write it into a new folder, seal that, and open it in its place.

Shapes: Q queries, N passages, D dimensions of a vector.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from llm_from_scratch import bundle
from llm_from_scratch.data.documents import Document
from llm_from_scratch.retrieval.dense import Dense, Numbers
from llm_from_scratch.retrieval.grounding import content_words
from llm_from_scratch.retrieval.lexical import Lexical, words
from llm_from_scratch.retrieval.passages import Passage, read_passages, split, write_passages
from llm_from_scratch.section import Section

if TYPE_CHECKING:
    from llm_from_scratch.retrieval.embed import Embedder, Progress, Vectors

Mode = Literal["fused", "rrf", "dense", "bm25"]
Ranking = list[tuple[int, float]]  # (place of a passage, its score), best first
Where = Mapping[str, str | Sequence[str]]  # document, title or a key of the metadata, and the values that pass

DENSE_FILE, LEXICAL_FOLDER, PASSAGES_FILE, NUMBERS_FILE, PARAMS_FILE = "faiss.index", "bm25", "passages.jsonl", "numbers.npy", "params.json"
RANK_CONSTANT = 60  # reciprocal rank fusion's k (Cormack et al. 2009)
DEPTH = 100  # how far down each ranking fusion looks

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class SearchParams(Section):
    """How passages are searched and answered from; an index remembers it, as the numbers belong to its embedder and its texts.

    A question is answered from `minimum_evidence` on: so much speaks for the answer being in there. `word_share` of the evidence is the
    share of the question's content words that the best passage has, rare ones for more; the rest is the cosine of the nearest passage.
    `support` is the share of an answer's words that a passage must have to be cited.
    """

    probes: Annotated[int, Field(ge=1)]
    dense_share: Share
    word_share: Share
    minimum_evidence: Annotated[float, Field(ge=-1.0, le=1.0)]
    support: Share


class IndexParams(Section):
    """The section `index`: which corpus is cut into passages of how many of the embedder's tokens (`maximum_passages` 0: all).

    More than `flat_below` passages are sorted into `cells`, see `dense`.
    """

    documents: str
    embedder: str
    passage_tokens: int = Field(ge=1)
    overlap_tokens: int = Field(ge=0)
    batch: int = Field(ge=1)
    maximum_passages: int = Field(ge=0)
    flat_below: int = Field(ge=0)
    cells: int = Field(ge=1)
    search: SearchParams


@dataclass(frozen=True)
class Hit:
    """A passage found: `rank` from 1, `score` a cosine (dense), a BM25 score, a sum of reciprocal ranks (rrf), or of shares (fused)."""

    passage: Passage
    score: float
    rank: int


@dataclass(frozen=True)
class Found:
    """The best passages, and how much speaks for the answer being in there (see SearchParams): -1 where there was nothing to look at."""

    hits: list[Hit]
    evidence: float


def build_index(folder: Path, passages: Sequence[Passage], vectors: Vectors, params: IndexParams) -> None:
    """Write all that `Index.open` reads, but for the manifest. `vectors` (N, D) are the unit vectors of `Passage.searched`."""
    if not passages or len(passages) != len(vectors):
        raise ValueError(f"found {len(passages)} passages and {len(vectors)} vectors, wanted as many of both, and some")
    dense = Dense.build(vectors, params.flat_below, params.cells, params.search.probes)
    lexical = Lexical.build([words(passage.searched) for passage in passages])
    _write(folder, passages, np.arange(len(passages)), dense, lexical, params)


def fuse(rankings: Sequence[Ranking]) -> Ranking:
    """Reciprocal rank fusion: each ranking gives 1 / (60 + rank) to what it found, so scores of different kinds need no common scale."""
    scores: dict[int, float] = defaultdict(float)
    for ranking in rankings:
        for rank, (place, _) in enumerate(ranking, 1):
            scores[place] += 1 / (RANK_CONSTANT + rank)
    return _sorted(scores)


def fuse_scores(dense: Ranking, lexical: Ranking, dense_share: float, depth: int = DEPTH) -> Ranking:
    """The weighted mean of both scores, each on a scale from what is `depth` down its ranking (0) to its best (1).

    Unlike ranks, it keeps by how much the first is better than the second. Where fewer were found, 0 is the score 0.
    """
    scores: dict[int, float] = defaultdict(float)
    for ranking, share in ((dense, dense_share), (lexical, 1 - dense_share)):
        floor = ranking[depth - 1][1] if len(ranking) >= depth else 0.0
        span = ranking[0][1] - floor if ranking else 0.0
        for place, score in ranking:
            scores[place] += share * (max(score - floor, 0.0) / span if span > 0 else 1.0)
    return _sorted(scores)


class Index:
    """Passages that can be searched. Queries go through the embedder the vectors were made with; another one is refused.

    `numbers` (N,), ascending, are what the passages are called in `dense`: they stay when others go.
    """

    def __init__(
        self, passages: list[Passage], numbers: Numbers, dense: Dense, lexical: Lexical, embedder: Embedder, params: IndexParams
    ) -> None:
        self.passages = passages
        self.numbers = numbers
        self.dense = dense
        self.lexical = lexical
        self.embedder = embedder
        self.params = params
        self._columns: dict[str, NDArray[np.str_]] = {}

    @classmethod
    def open(cls, folder: Path, embedder: Embedder) -> Self:
        """Raises BundleError when the index is missing, damaged, or made with another embedder."""
        manifest = bundle.verify(folder, "index")
        if (made_with := manifest.parents.get("embedder")) != embedder.digest:
            raise bundle.BundleError(
                f"{folder} was made with the embedder {str(made_with)[:12]}…, the one here is {embedder.digest[:12]}…; "
                f"rebuild it with: dvc repro {manifest.made_by}"
            )
        if PARAMS_FILE not in manifest.files:
            raise bundle.BundleError(f"{folder} was made by an earlier version, without {PARAMS_FILE}; rebuild it with: dvc repro index")
        try:
            params = IndexParams.model_validate_json((folder / PARAMS_FILE).read_text(encoding="utf-8"))
        except ValidationError as error:
            raise bundle.BundleError(
                f"{folder} was made by another version: {_complaint(error)}; rebuild it with: dvc repro {manifest.made_by}"
            ) from None
        return cls(
            read_passages(folder / PASSAGES_FILE),
            np.load(folder / NUMBERS_FILE, allow_pickle=False),
            Dense.open(folder / DENSE_FILE, params.search.probes),
            Lexical.open(folder / LEXICAL_FOLDER),
            embedder,
            params,
        )

    def write(self, folder: Path) -> None:
        """All that `Index.open` reads, but for the manifest."""
        _write(folder, self.passages, self.numbers, self.dense, self.lexical, self.params)

    def search(self, query: str, k: int, mode: Mode = "fused", where: Where | None = None) -> list[Hit]:
        """The best `k` passages for `query`, fewer where no more are found; none for an empty query.

        `where` keeps those that have one of the values for each of its keys. Raises ValueError for a key that no passage has.
        """
        return self.search_all([query], k, mode, where)[0]

    def search_all(self, queries: Sequence[str], k: int, mode: Mode = "fused", where: Where | None = None) -> list[list[Hit]]:
        """`search` for many queries at once, which embeds them together."""
        if k < 1:
            raise ValueError(f"search: found k = {k}, wanted at least 1 passage")
        asked = [place for place, query in enumerate(queries) if query.strip()]
        found: list[list[Hit]] = [[] for _ in queries]
        rankings = self._rankings([queries[place] for place in asked], k, mode, self._allowed(where))
        for place, ranking in zip(asked, rankings, strict=True):
            found[place] = self._hits(ranking, k)
        return found

    def find(self, query: str, k: int, where: Where | None = None) -> Found:
        """The fused `search`, and the evidence that the answer is in there."""
        if k < 1 or not query.strip():
            return Found(self.search(query, k), -1.0)
        allowed, depth = self._allowed(where), max(k, DEPTH)
        [dense], [lexical] = self._by_meaning([query], depth, allowed), self._by_words([query], depth, allowed)
        hits = self._hits(fuse_scores(dense, lexical, self.params.search.dense_share, depth), k)
        return Found(hits, self.evidence(query, dense[0][1], hits[0].passage) if dense else -1.0)

    def evidence(self, query: str, cosine: float, best: Passage) -> float:
        """How much speaks for the answer being in there (see SearchParams), by the nearest passage's `cosine` and the `best` passage."""
        asked, share = content_words(query), self.params.search.word_share
        return (1 - share) * cosine + share * self.lexical.coverage(asked, set(words(best.searched))) if asked else cosine

    def add(self, documents: Iterable[Document], progress: Progress | None = None) -> int:
        """The number of passages that `documents` gave, cut as the others were; only they are embedded.

        Raises ValueError for a document that is here already.
        """
        added = split(documents, self.embedder.spans, self.params.passage_tokens, self.params.overlap_tokens, maximum=0)
        here = {passage.document for passage in self.passages}
        if again := next((passage.document for passage in added if passage.document in here), None):
            raise ValueError(f"document '{again}' is in the index already; remove it first, then add what it is now")
        if added:
            told = (progress,) if progress else ()
            numbers = np.arange(len(added)) + (int(self.numbers[-1]) + 1 if len(self.numbers) else 0)
            self.dense.add(self.embedder.embed([passage.searched for passage in added], self.params.batch, *told), numbers)
            self.lexical = self.lexical.plus(Lexical.build([words(passage.searched) for passage in added]))
            self.passages, self.numbers = [*self.passages, *added], np.concatenate([self.numbers, numbers])
            self._columns = {}
        return len(added)

    def remove(self, documents: Sequence[str]) -> int:
        """The number of passages that went with `documents`, by their ids. Raises ValueError, and removes none, where one is not here."""
        gone = np.isin(self._column("document"), list(documents))
        if missing := set(documents) - set(self._column("document")[gone].tolist()):
            raise ValueError(f"no document '{min(missing)}' in the index, so nothing is removed; ids are as search gives them")
        self.dense.remove(self.numbers[gone])
        self.lexical = self.lexical.only(~gone)
        self.passages, self.numbers = [passage for passage, goes in zip(self.passages, gone, strict=True) if not goes], self.numbers[~gone]
        self._columns = {}
        return int(gone.sum())

    def _rankings(self, queries: Sequence[str], k: int, mode: Mode, allowed: NDArray[np.bool_] | None) -> list[Ranking]:
        if mode == "dense":
            return self._by_meaning(queries, k, allowed)
        if mode == "bm25":
            return self._by_words(queries, k, allowed)
        if mode not in ("fused", "rrf"):
            raise ValueError(f"search: no mode '{mode}'; there is fused, rrf, dense, bm25")
        depth = max(k, DEPTH)
        pairs = zip(self._by_meaning(queries, depth, allowed), self._by_words(queries, depth, allowed), strict=True)
        if mode == "rrf":
            return [fuse(pair) for pair in pairs]
        return [fuse_scores(*pair, self.params.search.dense_share, depth) for pair in pairs]

    def _by_meaning(self, queries: Sequence[str], depth: int, allowed: NDArray[np.bool_] | None) -> list[Ranking]:
        numbers = None if allowed is None else self.numbers[allowed]
        there = len(self.passages) if numbers is None else len(numbers)
        if not queries or not there:
            return [[] for _ in queries]
        found = self.dense.search(self.embedder.embed(queries), min(depth, there), numbers)
        return [[(int(np.searchsorted(self.numbers, number)), score) for number, score in ranking] for ranking in found]

    def _by_words(self, queries: Sequence[str], depth: int, allowed: NDArray[np.bool_] | None) -> list[Ranking]:
        scores = (self.lexical.scores(words(query)) for query in queries)
        return [_best(found if allowed is None else found * allowed, depth) for found in scores]

    def _hits(self, ranking: Ranking, k: int) -> list[Hit]:
        return [Hit(self.passages[place], score, rank) for rank, (place, score) in enumerate(ranking[:k], 1)]

    def _allowed(self, where: Where | None) -> NDArray[np.bool_] | None:
        """(N,) whether each passage passes; None where all do."""
        if not where:
            return None
        allowed = np.ones(len(self.passages), np.bool_)
        for key, wanted in where.items():
            allowed &= np.isin(self._column(key), [wanted] if isinstance(wanted, str) else list(wanted))
        return allowed

    def _column(self, key: str) -> NDArray[np.str_]:
        """(N,) what each passage has for `key`, nothing where it has not."""
        if key not in self._columns:
            known = {"document", "title"}.union(*(passage.metadata for passage in self.passages))
            if key not in known:
                raise ValueError(f"search: no passage has a '{key}'; there is {', '.join(sorted(known))}")
            self._columns[key] = np.array([_value(passage, key) for passage in self.passages], np.str_)
        return self._columns[key]


def _complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{PARAMS_FILE} has {'.'.join(map(str, first['loc']))}: {first['msg']}"


def _value(passage: Passage, key: str) -> str:
    own = {"document": passage.document, "title": passage.title}
    return own[key] if key in own else passage.metadata.get(key, "")


def _write(folder: Path, passages: Sequence[Passage], numbers: Numbers, dense: Dense, lexical: Lexical, params: IndexParams) -> None:
    dense.save(folder / DENSE_FILE)
    lexical.save(folder / LEXICAL_FOLDER)
    write_passages(folder / PASSAGES_FILE, passages)
    np.save(folder / NUMBERS_FILE, numbers, allow_pickle=False)
    (folder / PARAMS_FILE).write_text(params.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _sorted(scores: Mapping[int, float]) -> Ranking:
    """Best first, in the passages' order where equal."""
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def _best(scores: NDArray[np.float64], depth: int) -> Ranking:
    """The highest positive scores, in the passages' order where equal."""
    order = np.argsort(-scores, kind="stable")[:depth]
    return [(int(place), float(scores[place])) for place in order if scores[place] > 0]
