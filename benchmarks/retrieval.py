"""Week 11: does fusion find more than either search, what do cells cost against brute force, and is "not in the documents" said rightly?

    python -m benchmarks.retrieval --squad squad_v1.1_du_test.json

Held-out questions of `make repro` and, with --squad, those that people wrote about paragraphs of Wikipedia (SQuAD 1.1, Du et al.'s test).
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from benchmarks import table
from llm_from_scratch import progress
from llm_from_scratch.data.documents import read_documents
from llm_from_scratch.data.questions import questions
from llm_from_scratch.evaluation.retrieval import rank_means
from llm_from_scratch.retrieval.dense import Dense
from llm_from_scratch.retrieval.embed import Embedder, Vectors, embed_in_parts
from llm_from_scratch.retrieval.grounding import support
from llm_from_scratch.retrieval.index import DEPTH, Index, IndexParams, Mode, Ranking, SearchParams, fuse_scores
from llm_from_scratch.retrieval.lexical import Lexical, words
from llm_from_scratch.retrieval.passages import Passage

PARAMS = IndexParams(
    documents="",
    embedder="",
    passage_tokens=96,
    overlap_tokens=16,
    batch=64,
    maximum_passages=0,
    flat_below=100_000,
    cells=1024,
    search=SearchParams(probes=64, dense_share=0.55, word_share=0.3, minimum_evidence=0.47, support=0.4),
)
JITTER = 0.75  # length of the noise on a unit vector: neighbours are as far apart (cosine about 0.64) as passages of one topic are
LEAST = (0.35, 0.4, 0.45, 0.47, 0.5, 0.55, 0.6)
SUPPORT = (0.2, 0.3, 0.4, 0.5)
TIMED = 100  # queries, one by one
NOTES = [
    "`own` are held-out questions of the project (what is X?), right where a passage of the article is found. `SQuAD` are questions that "
    "people wrote about paragraphs, right where the very paragraph is found; paragraphs are searched without the titles of their articles.",
    "`bm25s` is the peer: words as they are, the same BM25 (Lucene's). Ours, `bm25`, joins plurals. `dense` is all-MiniLM-L6-v2. `rrf` is "
    "reciprocal rank fusion of both (k = 60), `fused` the weighted mean of both scores, each scaled from the hundredth to the best, which "
    "is the default: it keeps by how much the first is better than the second. Its weight was chosen on these questions, in steps of 0.05.",
    "`ms` is one query, alone, with its embedding, which takes most of it; for cells and flat the search alone.",
    "The rows of vectors: those of the own passages, again and again with noise, searched for the own questions. `recall of brute force` "
    "is over the ten nearest. HNSW (32 links, 80 wide while built) was built on all cores, so that its bytes differ from build to build, "
    "and nothing can be taken out of it; cells are built on all cores to the same bytes.",
    f"`cosine` is the nearest passage's; `evidence`, which the service goes by, is {1 - PARAMS.search.word_share:.0%} that and "
    f"{PARAMS.search.word_share:.0%} the share of the question's words, rare ones for more, that the best passage of `fused` has. "
    "`answered` is the share of questions whose passage is there that pass the least, `refused` the share that does not pass once "
    "every passage of their article is taken away. What is left is the same encyclopedia: close relatives, the hardest case. For SQuAD, "
    "the whole article of the paragraph goes. `strangers` are SQuAD's questions put to the own passages. The share of words and the least "
    "evidence of params.yaml were chosen on these very questions, so that no fewer of SQuAD's are answered than by a cosine of 0.45.",
    "`supported` is the share of right answers that their own passage supports, `by another` the share that the passage of another "
    "question does: how often a citation would be dropped though right, and kept though wrong.",
    "No cross-encoder: the wheels of flashrank, rerankers and fastembed are under 0.2 MB; they fetch their weights from a hub at run time.",
]


@dataclass(frozen=True)
class Task:
    """Passages, questions with the documents that answer them, and the `family` of documents that goes with each when it is taken away."""

    name: str
    index: Index
    vectors: Vectors
    asked: list[str]
    asked_vectors: Vectors
    right: list[str]
    family: dict[str, str]


def main() -> None:
    arguments = parser().parse_args()
    tasks = [toy()] if arguments.quick else list(real(arguments))
    rows = [row for task in tasks for row in ranked(task)]
    own, count = tasks[0], 600 if arguments.quick else arguments.vectors
    rows += cells(own, count, 8 if arguments.quick else PARAMS.cells)
    rows += [row for task in tasks for row in refused(task, own)]
    rows += supported(arguments, own)
    settings = {
        "passages": {task.name: len(task.index.passages) for task in tasks},
        "questions": {task.name: len(task.asked) for task in tasks},
        "seed": arguments.seed,
        **table.packages("bm25s", "faiss-cpu", "transformers"),
    }
    table.write(arguments.out, "retrieval", "Search: by meaning, by words, and both", rows, settings, NOTES)


def parser() -> argparse.ArgumentParser:
    made = table.parser(__doc__ or "")
    made.add_argument("--project", type=Path, default=Path(), help="a folder where make repro has run")
    made.add_argument("--index", type=Path, help="another index than that of the project")
    made.add_argument("--squad", type=Path, help="questions and paragraphs in the form of SQuAD 1.1")
    made.add_argument("--questions", type=int, default=1000, help="at most so many of each kind")
    made.add_argument("--vectors", type=int, default=120_000, help="how many are searched in cells")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--journal", type=Path, default=Path("runs/benchmark_retrieval"), help="where vectors wait for the next run")
    return made


def real(arguments: Any) -> Iterator[Task]:
    """One line where an input is not there."""
    artifacts = arguments.project / "artifacts"
    try:
        embedder = Embedder.open(artifacts / "raw/minilm")
        index = Index.open(arguments.index or artifacts / "index", embedder)
        held_out = list(read_documents(artifacts / "raw/wikipedia", "validation"))
        squad = json.loads(arguments.squad.read_text(encoding="utf-8"))["data"] if arguments.squad else []
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks.retrieval: {error}") from None
    asked = questions(held_out, arguments.questions, choices=4, seed=arguments.seed)
    vectors = index.dense.store.reconstruct_batch(index.numbers)
    yield task("own", index, vectors, [(each.question, each.document) for each in asked], {}, arguments.journal)
    if squad:
        yield of_squad(squad, embedder, arguments)


def of_squad(squad: Any, embedder: Embedder, arguments: Any) -> Task:
    passages: list[Passage] = []
    pairs: list[tuple[str, str]] = []
    family: dict[str, str] = {}
    for article in squad:
        for paragraph in article["paragraphs"]:
            name = str(len(passages))
            passages.append(Passage(f"{name}#0", name, "", paragraph["context"]))
            pairs += [(question["question"], name) for question in paragraph["qas"]]
            family[name] = article["title"]
    random.Random(arguments.seed).shuffle(pairs)
    vectors = embedded(embedder, [passage.searched for passage in passages], arguments.journal)
    index = index_of(passages, vectors, embedder)
    return task("SQuAD", index, vectors, pairs[: arguments.questions], family, arguments.journal)


def toy() -> Task:
    """Python's help on its own topics, and vectors made of words by chance."""
    topics = {name: " ".join(text.split()) for name, text in pydoc_data.topics.topics.items()}
    passages = [Passage(f"{name}#0", name, name, text[:800]) for name, text in topics.items()]
    pairs = [(text[200:300], name) for name, text in topics.items() if len(text) > 300][:20]
    embedder: Any = WordsByChance()
    vectors = embedder.embed([passage.searched for passage in passages])
    return task("own", index_of(passages, vectors, embedder), vectors, pairs, {}, None)


class WordsByChance:
    """A stand-in for an encoder: each word has a random direction, a text the mean of its words'."""

    digest = "toy"

    def embed(self, texts: Sequence[str], *_: Any) -> Vectors:
        rows = [np.mean([self._direction(word) for word in words(text)] or [self._direction("")], axis=0) for text in texts]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)

    def _direction(self, word: str) -> np.ndarray:
        return np.random.default_rng(int(sha256(word.encode()).hexdigest()[:8], 16)).normal(size=32)


def task(name: str, index: Index, vectors: Vectors, pairs: Sequence[tuple[str, str]], family: dict[str, str], journal: Path | None) -> Task:
    asked, right = [question for question, _ in pairs], [document for _, document in pairs]
    asked_vectors = embedded(index.embedder, asked, journal) if journal else index.embedder.embed(asked)
    return Task(name, index, vectors, asked, asked_vectors, right, family)


def index_of(passages: list[Passage], vectors: Vectors, embedder: Embedder) -> Index:
    dense = Dense.build(vectors, PARAMS.flat_below, PARAMS.cells, PARAMS.search.probes)
    lexical = Lexical.build([words(passage.searched) for passage in passages])
    return Index(passages, np.arange(len(passages)), dense, lexical, embedder, PARAMS)


def embedded(embedder: Embedder, texts: Sequence[str], journal: Path) -> Vectors:
    name = sha256(json.dumps([embedder.digest, list(texts)]).encode()).hexdigest()[:16]
    with progress.bar(total=len(texts), desc="embedding", unit=" texts") as bar:
        return embed_in_parts(embedder, texts, PARAMS.batch, journal / name, bar.update).vectors


def ranked(task: Task) -> Iterator[dict[str, Any]]:
    """How high the right document is, by each search."""
    yield {"on": task.name, "search": "bm25s", **shown(rank_means([rank(found, right) for found, right in with_bm25s(task)]))}
    for mode in get_args(Mode):
        started = perf_counter()
        for question in task.asked[:TIMED]:
            task.index.search(question, DEPTH, mode)
        seconds = perf_counter() - started
        found = task.index.search_all(task.asked, DEPTH, mode)
        ranks = [rank([hit.passage.document for hit in hits], right) for hits, right in zip(found, task.right, strict=True)]
        yield {"on": task.name, "search": mode, **shown(rank_means(ranks)), "ms": 1000 * seconds / min(TIMED, len(task.asked))}


def with_bm25s(task: Task) -> Iterator[tuple[list[str], str]]:
    """The documents that the peer finds, best first, and the right one."""
    import bm25s

    def split(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), stopwords=None, show_progress=False, return_ids=False)

    peer = bm25s.BM25(method="lucene")
    peer.index(split([passage.searched for passage in task.index.passages]), show_progress=False)
    depth = min(DEPTH, len(task.index.passages))
    places, _ = peer.retrieve(split(task.asked), k=depth, show_progress=False, n_threads=1)
    for row, right in zip(places.tolist(), task.right, strict=True):
        yield [task.index.passages[place].document for place in row], right


def rank(documents: Sequence[str], right: str) -> int:
    return documents.index(right) + 1 if right in documents else 0


def shown(means: dict[str, float]) -> dict[str, float]:
    names = {"recall_at_1": "recall@1", "recall_at_5": "recall@5", "mrr": "MRR", "ndcg_at_10": "nDCG@10"}
    return {names[name]: value for name, value in means.items()}


def cells(task: Task, count: int, most: int) -> Iterator[dict[str, Any]]:
    """`count` vectors, searched one by one, in cells, and by HNSW."""
    import faiss

    rng = np.random.default_rng(0)
    noise = rng.normal(size=(count, task.vectors.shape[1])).astype(np.float32)
    vectors = task.vectors[np.arange(count) % len(task.vectors)] + JITTER * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = task.asked_vectors[:TIMED]
    on = f"{count:,} vectors"

    def searched(search: Any) -> tuple[list[list[int]], float]:
        started = perf_counter()
        found = [[number for number, _ in search(query[None])[0]] for query in queries]
        return found, 1000 * (perf_counter() - started) / len(queries)

    flat = Dense.build(vectors, count, most, 1)
    exact, ms = searched(lambda query: flat.search(query, 10))
    yield {"on": on, "search": "flat", "recall of brute force": 1.0, "ms": ms}

    def row(search: str, found: list[list[int]], ms: float, seconds: float) -> dict[str, Any]:
        shared = np.mean([len({*some} & {*every}) / len(every) for some, every in zip(found, exact, strict=True)])
        return {"on": on, "search": search, "recall of brute force": float(shared), "ms": ms, "built in s": seconds}

    started = perf_counter()
    made = Dense.build(vectors, 0, most, 1)
    seconds = perf_counter() - started
    for probes in sorted({max(1, most // share) for share in (64, 16, 8)}):
        made.probes = probes
        yield row(f"{most} cells, {probes} probed", *searched(lambda query: made.search(query, 10)), seconds)
    graph = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 80
    started = perf_counter()
    graph.add(vectors)
    seconds = perf_counter() - started
    for width in (64, 256):
        graph.hnsw.efSearch = width
        yield row(f"HNSW, {width} wide", *searched(lambda query: [[(n, 0.0) for n in graph.search(query, 10)[1][0].tolist()]]), seconds)


def refused(task: Task, own: Task) -> Iterator[dict[str, Any]]:
    """How many questions pass each least cosine, with their document there and without."""
    family = np.array([task.family.get(passage.document, passage.document) for passage in task.index.passages])
    others = [family != task.family.get(right, right) for right in task.right]
    there, away, strangers = evidence(task, task), evidence(task, task, others), evidence(task, own)
    for place, kind in enumerate(("cosine", "evidence")):
        for least in LEAST:
            found = {"on": task.name, "search": f"{kind} from {least}", "answered": float(np.mean(there[:, place] >= least))}
            yield (
                found
                | {"refused": float(np.mean(away[:, place] < least))}
                | ({"strangers": float(np.mean(strangers[:, place] < least))} if task is not own else {})
            )


def evidence(asking: Task, asked: Task, allowed: Sequence[NDArray[np.bool_]] | None = None) -> NDArray[np.float64]:
    """(Q, 2): the nearest cosine and the evidence for each question of `asking` in the passages of `asked`, or those `allowed`."""
    index, rows = asked.index, []
    for place, (question, vector) in enumerate(zip(asking.asked, asking.asked_vectors, strict=True)):
        passes = np.ones(len(index.passages), np.bool_) if allowed is None else allowed[place]
        dense = ranking(np.where(passes, asked.vectors @ vector, -1.0))
        lexical = [(at, score) for at, score in ranking(index.lexical.scores(words(question)) * passes) if score > 0]
        [(best, _), *_] = fuse_scores(dense, lexical, PARAMS.search.dense_share)
        cosine = dense[0][1]
        rows.append((cosine, index.evidence(question, cosine, index.passages[best])))
    return np.array(rows)


def ranking(scores: NDArray[Any]) -> Ranking:
    return [(int(place), float(scores[place])) for place in np.argsort(-scores, kind="stable")[:DEPTH]]


def supported(arguments: Any, own: Task) -> Iterator[dict[str, Any]]:
    """How often a right answer is supported by its own passage, and by that of the next question."""
    if arguments.quick:
        return
    held_out = list(read_documents(arguments.project / "artifacts/raw/wikipedia", "validation"))
    asked = questions(held_out, arguments.questions, choices=4, seed=arguments.seed)
    for least in SUPPORT:
        mine, others = (
            float(np.mean([support(each.answer, each.question, other.passage) >= least for each, other in zip(asked, shift, strict=True)]))
            for shift in (asked, [*asked[1:], asked[0]])
        )
        yield {"on": own.name, "search": f"support from {least}", "supported": mine, "by another": others}


if __name__ == "__main__":
    main()
