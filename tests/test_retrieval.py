"""Passages cover their documents, vectors are sentence-transformers', both searches equal brute force, before and after changes."""

from __future__ import annotations

import itertools
import json
import math
import os
import pydoc_data.topics
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from tiny_retrieval import PARAMS, tiny_encoder, tiny_index

from llm_from_scratch import bundle
from llm_from_scratch.data.documents import Document, write_documents
from llm_from_scratch.retrieval import embed
from llm_from_scratch.retrieval.dense import Dense
from llm_from_scratch.retrieval.embed import Embedder, embed_in_parts
from llm_from_scratch.retrieval.index import Found, Index, Mode, Ranking, Where, build_index, fuse, fuse_scores
from llm_from_scratch.retrieval.lexical import K1, B, Lexical, words
from llm_from_scratch.retrieval.passages import Passage, read_passages, split, windows, write_passages

ROOT = Path(__file__).parent.parent
MINILM = Path(os.environ.get("LLM_TEST_MINILM", ROOT / "artifacts/raw/minilm"))

TEXTS = [
    "The cat sat in the river and a dog barked at the star of the film.",
    "A star is a ball of gas.",
    "Who is the dog?",
    "a",
    "",
    "The longest of all: " + "a film of a star and a dog in a river, " * 30,
]
PASSAGES = [
    Passage("cat#0", "cat", "Cat", "The cat is a small animal that purrs and eats mice."),
    Passage("dog#0", "dog", "Dog", "The dog is an animal that barks at strangers and at the moon."),
    Passage("sun#0", "sun", "Sun", "The Sun is the star at the centre of the Solar System."),
    Passage("sun#1", "sun", "Sun", "It is a hot ball of plasma; a star of middling size."),
    Passage("nile#0", "nile", "Nile", "The Nile is a river in Africa."),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("raw") / "tiny")


@pytest.fixture(scope="module")
def embedder(encoder: Path) -> Embedder:
    return Embedder.open(encoder)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    if not MINILM.is_dir():
        pytest.skip(f"no all-MiniLM-L6-v2 in {MINILM}: dvc repro download@minilm brings it, or name its folder in LLM_TEST_MINILM")
    if (MINILM / bundle.MANIFEST).exists():
        return Embedder.open(MINILM)
    sealed = tmp_path_factory.mktemp("raw") / "minilm"
    shutil.copytree(MINILM, sealed / "files")
    bundle.seal(sealed, "corpus", "download@minilm")
    return Embedder.open(sealed)


@pytest.fixture
def index(tmp_path: Path, embedder: Embedder) -> Index:
    return tiny_index(tmp_path / "index", embedder, PASSAGES)


# Passages


def test_windows_worked_by_hand_are_of_equal_length_rather_than_full_ones_and_a_crumb() -> None:
    every_word_one_token = [True] * 11
    assert windows(every_word_one_token, size=10, overlap=1) == [(0, 6), (5, 11)]
    assert windows(every_word_one_token, size=11, overlap=1) == [(0, 11)]
    assert windows([], size=10, overlap=1) == []


def test_a_cut_falls_between_words_unless_the_word_is_longer_than_a_window() -> None:
    three_words_of_four_tokens = [place % 4 == 0 for place in range(12)]
    assert windows(three_words_of_four_tokens, size=9, overlap=4) == [(0, 8), (4, 12)]
    one_word = [True] + [False] * 9
    assert windows(one_word, size=4, overlap=0) == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize(("size", "overlap"), [(1, 0), (2, 1), (7, 3), (16, 4), (16, 15)])
def test_windows_cover_every_token_and_keep_their_size_and_overlap(size: int, overlap: int) -> None:
    rng = np.random.default_rng(size * 100 + overlap)
    for tokens in range(1, 60):
        starts_word = [True, *(rng.random(tokens - 1) < 0.6).tolist()]
        found = windows(starts_word, size, overlap)
        assert found[0][0] == 0
        assert found[-1][1] == tokens
        assert all(0 < end - begin <= size for begin, end in found)
        for (begin, end), (later, later_end) in itertools.pairwise(found):
            assert begin < later <= end < later_end
            assert end - later <= overlap


def test_passages_of_a_document_are_its_own_words_and_neighbours_share_some(embedder: Embedder) -> None:
    text = " ".join(f"the {number} film of star {number * 7}." for number in range(20))
    found = split([Document("doc", "Title", text)], embedder.spans, passage_tokens=24, overlap_tokens=6, maximum=0)

    assert [passage.id for passage in found] == [f"doc#{place}" for place in range(len(found))]
    assert len(found) > 3
    assert all(passage.text in text for passage in found)
    assert all(len(tokens) <= 24 for tokens in embedder.spans([passage.text for passage in found]))
    end = 0
    for passage in found:
        begin = text.index(passage.text)
        assert begin <= end
        assert begin == 0 or text[begin - 1] == " "
        end = begin + len(passage.text)
    assert end == len(text)


def test_a_short_document_is_one_passage_and_an_empty_one_is_none(embedder: Embedder) -> None:
    documents = [Document("short", "Short", "the cat."), Document("empty", "Empty", "  "), Document("last", "Last", "a dog")]
    assert [passage.text for passage in split(documents, embedder.spans, 24, 6, maximum=0)] == ["the cat.", "a dog"]
    assert [passage.text for passage in split(documents, embedder.spans, 24, 6, maximum=1)] == ["the cat."]
    with pytest.raises(ValueError, match=r"overlap_tokens: found 24, wanted 0 or more and less than passage_tokens, 24"):
        split(documents, embedder.spans, 24, 24, maximum=0)


def test_a_passage_knows_its_topic_and_the_page_it_begins_on(embedder: Embedder) -> None:
    pages = ["the cat " * 8, "", "a dog " * 8 + "is", "the end"]
    found = split([Document("doc", "T", "\f".join(pages), topic="Pets")], embedder.spans, 12, 0, maximum=0)
    assert {passage.metadata["topic"] for passage in found} == {"Pets"}
    assert [passage.metadata["page"] for passage in found] == ["1", "1", "3", "3"]
    assert not any("\f" in passage.text for passage in found)
    assert split([Document("doc", "T", "no pages")], embedder.spans, 12, 0, maximum=0)[0].metadata == {}


def test_passages_come_back_from_their_file(tmp_path: Path) -> None:
    odd = [*PASSAGES, Passage("é#0", "é", "line\u2028break", 'quote " and\nnewline', {"topic": "Ünd"})]
    write_passages(tmp_path / "passages.jsonl", odd)
    assert read_passages(tmp_path / "passages.jsonl") == odd


# Vectors


def one_at_a_time(embedder: Embedder, text: str) -> np.ndarray:
    """The oracle: sentence-transformers' recipe for one text, without batch, padding or sorting."""
    tokens = embedder.tokenizer(text, truncation=True, max_length=embedder.limit, return_tensors="pt")
    with torch.no_grad():
        states = embedder.model(**tokens).last_hidden_state[0]
    mean = states.mean(0).double()
    return (mean / mean.norm()).numpy()


def test_batched_vectors_are_those_of_each_text_alone(embedder: Embedder) -> None:
    expected = np.stack([one_at_a_time(embedder, text) for text in TEXTS])
    for batch in (1, 2, 64):
        vectors = embedder.embed(TEXTS, batch)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1)
    assert embedder.embed([]).shape == (0, embedder.dimension)


def test_minilm_vectors_are_those_of_each_text_alone_and_place_paraphrases_near(minilm: Embedder) -> None:
    texts = [*TEXTS, "How old is the universe?", "What is the age of the cosmos?", "Butter the pan before you bake the cake."]
    vectors = minilm.embed(texts, batch=4)
    np.testing.assert_allclose(vectors, np.stack([one_at_a_time(minilm, text) for text in texts]), atol=2e-6)
    assert vectors.shape == (len(texts), 384)
    assert minilm.limit == 256
    question, paraphrase, other = vectors[-3:]
    assert question @ paraphrase > 0.75
    assert question @ other < 0.2


def test_half_a_surrogate_pair_is_embedded_as_a_question_mark(embedder: Embedder) -> None:
    np.testing.assert_array_equal(embedder.embed(["the \ud800 cat"]), embedder.embed(["the ? cat"]))


def test_progress_counts_every_text_once(embedder: Embedder) -> None:
    done: list[int] = []
    embedder.embed(TEXTS, 4, done.append)
    assert done == [4, 2]


def test_a_killed_embedding_goes_on_where_it_was(embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "PART", 2)
    whole = embed_in_parts(embedder, TEXTS, 2, tmp_path / "whole")
    assert whole.resumed_at == 0
    np.testing.assert_allclose(whole.vectors, embedder.embed(TEXTS), atol=2e-6)

    def killed_in_the_third_part() -> Iterator[None]:
        yield from (None, None)
        raise KeyboardInterrupt

    life = killed_in_the_third_part()
    with pytest.raises(KeyboardInterrupt):
        embed_in_parts(embedder, TEXTS, 2, tmp_path / "killed", lambda done: next(life))
    again = embed_in_parts(embedder, TEXTS, 2, tmp_path / "killed")
    assert again.resumed_at == 4
    np.testing.assert_array_equal(again.vectors, whole.vectors)


def test_a_damaged_or_foreign_encoder_is_refused(encoder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(encoder, damaged)
    weights = next(damaged.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(bundle.BundleError, match="sha256"):
        Embedder.open(damaged)

    texts = tmp_path / "texts"
    texts.mkdir()
    write_documents(texts / "documents.jsonl", [Document("a", "A", "text")])
    bundle.seal(texts, "corpus", "download@texts")
    with pytest.raises(bundle.BundleError, match=r"found no config\.json, wanted an encoder"):
        Embedder.open(texts)


# Search


def test_faiss_finds_what_brute_force_finds(tmp_path: Path, embedder: Embedder) -> None:
    rng = np.random.default_rng(0)
    letters = list("abcdefghij   ")
    passages = [Passage(f"{n}#0", str(n), str(n), "".join(rng.choice(letters, 30))) for n in range(200)]
    index = tiny_index(tmp_path / "index", embedder, passages)
    vectors = embedder.embed([passage.searched for passage in passages])

    for query in ("abc def", "j", "the cat"):
        similar = vectors @ embedder.embed([query])[0]
        best = np.argsort(-similar, kind="stable")[:10]
        hits = index.search(query, 10, "dense")
        np.testing.assert_allclose([hit.score for hit in hits], similar[best], atol=1e-6)
        assert {hit.passage for hit in hits[:9]} <= {passages[place] for place in np.argsort(-similar)[:11]}
        assert [hit.rank for hit in hits] == list(range(1, 11))


def bm25_by_formula(query: list[str], passages: list[list[str]]) -> list[float]:
    """Robertson's formula with Lucene's idf, a term and a passage at a time."""
    mean_length = sum(map(len, passages)) / len(passages)

    def term(word: str, passage: list[str]) -> float:
        holding = sum(word in other for other in passages)
        idf = math.log(1 + (len(passages) - holding + 0.5) / (holding + 0.5))
        often = Counter(passage)[word]
        return idf * often / (often + K1 * (1 - B + B * len(passage) / mean_length))

    return [sum(term(word, passage) for word in query) for passage in passages]


@pytest.mark.parametrize("query", ["the star", "STAR, star!", "who barks at the moon?", "a river in Africa unheard"])
def test_bm25_scores_are_those_of_the_formula(index: Index, query: str) -> None:
    expected = bm25_by_formula(words(query), [words(passage.searched) for passage in PASSAGES])
    np.testing.assert_allclose(index.lexical.scores(words(query)), expected, rtol=1e-5)
    hits = index.search(query, 5, "bm25")
    assert [hit.score for hit in hits] == pytest.approx(sorted((score for score in expected if score > 0), reverse=True))
    assert hits[0].passage == PASSAGES[int(np.argmax(expected))]


def test_bm25_is_that_of_bm25s_over_a_real_text() -> None:
    import bm25s

    pages = [words(page) for page in pydoc_data.topics.topics.values()]
    peer = bm25s.BM25(k1=K1, b=B, method="lucene")
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(word for page in pages for word in page))}
    peer.index(([[vocabulary[word] for word in page] for page in pages], vocabulary), create_empty_token=False, show_progress=False)
    ours = Lexical.build(pages)
    for query in ("how are decorators evaluated", "the the of", "metaclass keyword argument of a class definition"):
        expected = peer.get_scores_from_ids(peer.get_tokens_ids(words(query)))
        np.testing.assert_allclose(ours.scores(words(query)), expected, rtol=1e-4)


def test_a_plural_is_compared_as_its_singular_and_what_only_looks_like_one_stays() -> None:
    plurals = {"Cities": "city", "houses": "house", "churches": "churche", "stars": "star", "shoes": "shoe"}
    assert {word: words(word)[0] for word in plurals} == plurals
    unchanged = ["glass", "virus", "bus", "is", "was", "naïve"]
    assert words(" ".join(unchanged)) == unchanged


def test_words_that_come_and_go_leave_the_scores_of_a_fresh_build() -> None:
    rng = np.random.default_rng(3)
    pages = [rng.choice(list("abcdefgh"), size=rng.integers(0, 12)).tolist() for _ in range(60)]
    kept = rng.random(60) < 0.6
    grown = Lexical.build(pages[:25]).plus(Lexical.build(pages[25:40])).plus(Lexical.build(pages[40:]))
    for changed, left in ((grown, pages), (grown.only(kept), [page for page, stays in zip(pages, kept, strict=True) if stays])):
        for query in (["a"], ["c", "h", "c"], ["unknown", "b"]):
            np.testing.assert_array_equal(changed.scores(query), Lexical.build(left).scores(query))
    assert Lexical.build(pages).only(np.zeros(60, bool)).scores(["a"]).shape == (0,)


def test_reciprocal_rank_fusion_worked_by_hand() -> None:
    by_meaning, by_words = [(7, 0.9), (3, 0.8), (5, 0.1)], [(3, 12.0), (9, 2.0)]
    assert fuse([by_meaning, by_words]) == [
        (3, 1 / 62 + 1 / 61),  # second and first: agreement wins
        (7, 1 / 61),
        (9, 1 / 62),
        (5, 1 / 63),
    ]
    assert fuse([[(2, 1.0)], [(1, 1.0)]]) == [(1, 1 / 61), (2, 1 / 61)]  # a tie goes to the earlier passage
    assert fuse([[], []]) == []


def test_the_fusion_of_scores_worked_by_hand() -> None:
    by_meaning, by_words = [(7, 0.9), (3, 0.8), (5, 0.5)], [(3, 12.0), (9, 3.0)]
    three_deep = fuse_scores(by_meaning, by_words, dense_share=0.5, depth=3)  # cosines from 0.5 up, and BM25 from 0: it found only two
    assert three_deep == [(3, pytest.approx(0.5 * 0.75 + 0.5)), (7, 0.5), (9, 0.5 * 0.25), (5, 0.0)]
    assert [place for place, _ in fuse_scores(by_meaning, by_words, dense_share=1.0, depth=3)[:2]] == [7, 3]
    assert fuse_scores([], by_words, 0.5) == [(3, 0.5), (9, 0.125)]
    assert fuse_scores([(1, 0.4), (2, 0.4)], [], 0.5, depth=2) == [(1, 0.5), (2, 0.5)]  # all alike is all the best


def test_fused_search_is_the_fusion_of_both_searches(index: Index) -> None:
    query = "the star of the dog"
    places = {passage.id: place for place, passage in enumerate(PASSAGES)}

    def ranking(mode: Mode) -> Ranking:
        return [(places[hit.passage.id], hit.score) for hit in index.search(query, 5, mode)]

    dense, lexical = ranking("dense"), ranking("bm25")
    assert ranking("rrf") == fuse([dense, lexical])
    fused, expected = ranking("fused"), fuse_scores(dense, lexical, PARAMS.search.dense_share)
    assert [place for place, _ in fused] == [place for place, _ in expected]
    np.testing.assert_allclose(fused, expected, rtol=1e-6)
    hits = index.search(query, 5)
    assert index.find(query, 5) == Found(hits, index.evidence(query, dense[0][1], hits[0].passage))
    assert index.find(" ", 5) == Found([], -1.0)


def test_the_evidence_worked_by_hand(index: Index) -> None:
    """Of the rivers' names, the Nile is in one of five passages and the Congo in none, so it counts for more."""
    [nile] = [passage for passage in PASSAGES if passage.document == "nile"]
    share, known, unknown = PARAMS.search.word_share, math.log(1 + 4.5 / 1.5), math.log(1 + 5.5 / 0.5)
    assert (len(PASSAGES), sum("nile" in words(passage.searched) for passage in PASSAGES)) == (5, 1)
    assert index.lexical.coverage({"nile", "congo"}, {"the", "nile"}) == pytest.approx(known / (known + unknown))
    for question, covered in (("What is the Nile?", 1.0), ("Nile or Congo?", known / (known + unknown)), ("And the Congo?", 0.0)):
        assert index.evidence(question, 0.5, nile) == pytest.approx((1 - share) * 0.5 + share * covered), question
    assert index.evidence("What was it?", 0.5, nile) == 0.5, "no content words"
    with pytest.raises(ValueError, match="no words are asked for"):
        index.lexical.coverage((), {"nile"})


def test_an_empty_query_finds_nothing_and_strange_words_only_neighbours_in_meaning(index: Index) -> None:
    for mode in get_args(Mode):
        assert index.search("", 3, mode) == []
        assert index.search(" \n", 3, mode) == []
    assert index.search("?!", 3, "bm25") == []
    assert index.search("zzz", 3, "bm25") == []
    assert len(index.search("zzz", 99, "dense")) == len(PASSAGES)
    assert index.search_all(["", "the Nile", " "], 1, "bm25")[1][0].passage.document == "nile"
    with pytest.raises(ValueError, match="k = 0, wanted at least 1"):
        index.search("cat", 0)
    with pytest.raises(ValueError, match="no mode 'sparse'; there is fused, rrf, dense, bm25"):
        index.search("cat", 1, "sparse")  # type: ignore[arg-type]


def test_minilm_and_bm25_together_answer_a_paraphrase_and_a_name(minilm: Embedder, tmp_path: Path) -> None:
    index = tiny_index(tmp_path / "index", minilm, PASSAGES)
    assert index.search("feline pet", 1, "bm25") == []
    assert index.search("feline pet", 1)[0].passage.document == "cat"
    assert index.search("Which waterway crosses Egypt?", 1)[0].passage.document == "nile"
    assert index.search("What is the Solar System's star?", 1)[0].passage.id == "sun#0"


# Filters, and documents that come and go


@pytest.fixture
def fields(tmp_path: Path, embedder: Embedder) -> Index:
    topics = {"cat": "Animals", "dog": "Animals", "sun": "Space", "nile": "Places"}
    return tiny_index(tmp_path / "fields", embedder, [replace(each, metadata={"topic": topics[each.document]}) for each in PASSAGES])


@pytest.mark.parametrize(
    ("where", "documents"),
    [
        ({"topic": "Animals"}, {"cat", "dog"}),
        ({"topic": ["Animals", "Space"]}, {"cat", "dog", "sun"}),
        ({"document": "sun"}, {"sun"}),
        ({"title": "Nile", "topic": "Places"}, {"nile"}),
        ({"title": "Nile", "topic": "Space"}, set()),
        ({"topic": "Sports"}, set()),
        ({}, {"cat", "dog", "sun", "nile"}),
    ],
)
def test_a_filter_keeps_what_matches_and_no_other_search_gives_more(fields: Index, where: Where, documents: set[str]) -> None:
    for mode in get_args(Mode):
        hits = fields.search("the dog is a star of the river, the cat barks", 99, mode, where)
        everything = fields.search("the dog is a star of the river, the cat barks", 99, mode)
        assert {hit.passage.document for hit in hits} == documents
        assert {hit.passage.id for hit in hits} == {hit.passage.id for hit in everything if hit.passage.document in documents}
        if mode in ("dense", "bm25"):
            kept = [(hit.passage.id, hit.score) for hit in everything if hit.passage.document in documents]
            assert [(hit.passage.id, hit.score) for hit in hits] == kept


def test_a_filter_by_what_no_passage_has_is_refused(fields: Index) -> None:
    with pytest.raises(ValueError, match=r"no passage has a 'topik'; there is document, title, topic"):
        fields.search("star", 1, where={"topik": "Space"})


def answers_of(index: Index) -> list[list[tuple[str, float]]]:
    """All that a query gives in every mode; the float of a sum may depend on the order of its terms."""
    found = (index.search("a star or an animal that barks at the river", 99, mode) for mode in get_args(Mode))
    return [[(hit.passage.id, round(hit.score, 5)) for hit in hits] for hits in found]


def test_an_index_that_was_changed_answers_like_one_built_anew(tmp_path: Path, embedder: Embedder) -> None:
    documents = [Document(name, name.title(), f"{text} " * 9) for name, text in zip("abcdefg", itertools.cycle(TEXTS[:3]), strict=False)]
    whole = split(documents, embedder.spans, PARAMS.passage_tokens, PARAMS.overlap_tokens, maximum=0)
    changed = tiny_index(tmp_path / "changed", embedder, [each for each in whole if each.document in "abc"])

    assert changed.remove(["b"]) == sum(each.document == "b" for each in whole)
    assert changed.add(documents[4:]) == sum(each.document in "efg" for each in whole)
    assert changed.remove(["a", "f"]) > 0
    assert changed.add(documents[:2]) > 0

    left = [each for name in "cegab" for each in whole if each.document == name]
    assert changed.passages == left
    assert answers_of(changed) == answers_of(tiny_index(tmp_path / "anew", embedder, left))
    with bundle.writing(tmp_path / "written") as partial:
        changed.write(partial)
        bundle.seal(partial, "index", "index", {"embedder": embedder.digest})
    assert answers_of(Index.open(tmp_path / "written", embedder)) == answers_of(changed)


def test_what_is_there_is_not_added_twice_and_what_is_not_is_not_removed(index: Index) -> None:
    before = answers_of(index)
    with pytest.raises(ValueError, match="document 'sun' is in the index already; remove it first"):
        index.add([Document("moon", "Moon", "a star?"), Document("sun", "Sun", "a star")])
    with pytest.raises(ValueError, match="no document 'moon' in the index, so nothing is removed"):
        index.remove(["cat", "moon"])
    assert index.add([Document("empty", "Empty", " ")]) == 0
    assert answers_of(index) == before
    assert index.remove(["cat", "dog", "sun", "nile"]) == len(PASSAGES)
    assert answers_of(index) == [[], [], [], []]
    assert index.add([Document("cat", "Cat", "the cat")]) == 1
    assert index.search("cat", 1)[0].passage.id == "cat#0"


# Cells


def clustered(count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors (count, 16) around forty centres."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(40, 16))[rng.integers(0, 40, count)] + 0.3 * rng.normal(size=(count, 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_above_the_limit_cells_are_searched_and_all_of_them_find_what_brute_force_finds() -> None:
    vectors, queries = clustered(2000), clustered(20, seed=1)
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    assert Dense.build(vectors, flat_below=2000, cells=32, probes=4).exact
    recall = {}
    for probes in (1, 8, 32):
        cells = Dense.build(vectors, flat_below=1999, cells=32, probes=probes)
        assert not cells.exact
        found = [[number for number, _ in ranking] for ranking in cells.search(queries, 10)]
        recall[probes] = np.mean([len({*row} & {*wanted}) / 10 for row, wanted in zip(found, best.tolist(), strict=True)])
    assert recall[1] < recall[8] <= recall[32] == 1
    assert recall[8] > 0.9


def test_in_cells_a_filter_is_obeyed_exactly_and_vectors_come_and_go() -> None:
    vectors, queries = clustered(500), clustered(5, seed=1)
    cells = Dense.build(vectors, flat_below=0, cells=8, probes=1)
    allowed = np.array([3, 77, 401, 402])
    for row, query in zip(cells.search(queries, 4, allowed), queries, strict=True):
        assert [number for number, _ in row] == allowed[np.argsort(-(vectors[allowed] @ query))].tolist()
    cells.remove(np.array([3, 77]))
    cells.add(vectors[:1], np.array([900]))
    assert {number for number, _ in cells.search(queries[:1], 9, np.array([3, 77, 401, 900]))[0]} == {401, 900}


def test_cells_are_the_same_bytes_every_time_and_need_enough_vectors(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Dense.build(clustered(2000), flat_below=0, cells=32, probes=4).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    opened, query = Dense.open(tmp_path / "one", probes=32), clustered(3, seed=1)
    assert opened.search(query, 5) == Dense.build(clustered(2000), flat_below=0, cells=32, probes=32).search(query, 5)
    with pytest.raises(ValueError, match=r"index.cells: found 32, wanted no more than the 20 vectors"):
        Dense.build(clustered(20), flat_below=0, cells=32, probes=4)


# The folder


def test_an_index_holds_no_pickle_and_is_the_same_bytes_every_time(embedder: Embedder, tmp_path: Path) -> None:
    for name in ("one", "two"):
        tiny_index(tmp_path / name, embedder, PASSAGES)
    assert bundle.read_manifest(tmp_path / "one").digest == bundle.read_manifest(tmp_path / "two").digest
    for path in (tmp_path / "one").rglob("*.npy"):
        np.load(path, allow_pickle=False)
    suffixes = {path.suffix for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert suffixes == {".index", ".npy", ".json", ".jsonl"}


def test_an_index_of_another_embedder_is_refused(index: Index, tmp_path: Path) -> None:
    stranger = Embedder.open(tiny_encoder(tmp_path / "stranger", seed=1))
    with pytest.raises(bundle.BundleError, match=r"was made with the embedder .*, the one here is .*dvc repro index"):
        Index.open(tmp_path / "index", stranger)


def test_an_index_with_the_params_of_another_version_is_refused_in_a_line(index: Index, tmp_path: Path) -> None:
    old = json.loads((tmp_path / "index" / "params.json").read_text())
    old["search"]["minimum_similarity"] = old["search"].pop("minimum_evidence")
    shutil.copytree(tmp_path / "index", tmp_path / "old")
    (tmp_path / "old" / "params.json").write_text(json.dumps(old))
    (tmp_path / "old" / "manifest.json").unlink()
    bundle.seal(tmp_path / "old", "index", "index", {"embedder": index.embedder.digest})
    wanted = r"was made by another version: params\.json has search\.minimum_evidence: Field required; rebuild it with: dvc repro index$"
    with pytest.raises(bundle.BundleError, match=wanted):
        Index.open(tmp_path / "old", index.embedder)


@pytest.mark.parametrize("name", ["faiss.index", "passages.jsonl", "bm25/counts.npy", "bm25/vocabulary.json"])
def test_a_damaged_index_is_refused_before_anything_reads_it(index: Index, tmp_path: Path, name: str) -> None:
    path = tmp_path / "index" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(bundle.BundleError, match=f"{Path(name).name}: sha256 is .* dvc repro --force --single-item index"):
        Index.open(tmp_path / "index", index.embedder)


def test_an_index_of_nothing_is_refused(embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 0 passages and 0 vectors"):
        build_index(tmp_path, [], embedder.embed([]), PARAMS)


def test_the_stage_builds_an_index_that_opens_and_leaves_no_state_behind(encoder: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from stages import index as stage

    raw = tmp_path / "artifacts/raw"
    shutil.copytree(encoder, raw / "tiny")
    with bundle.writing(raw / "wiki") as partial:
        write_documents(partial / "documents.jsonl", [Document(each.document, each.title, each.text) for each in PASSAGES])
        bundle.seal(partial, "corpus", "download@wiki")
    stage.run(SimpleNamespace(index=PARAMS), "", tmp_path)  # type: ignore[arg-type]

    index = Index.open(tmp_path / "artifacts/index", Embedder.open(raw / "tiny"))
    manifest = bundle.verify(tmp_path / "artifacts/index", "index")
    assert manifest.facts == {"passages": len(index.passages), "dimension": 16}
    assert manifest.parents["corpus"] == bundle.read_manifest(raw / "wiki").digest
    assert index.search("the river in Africa", 1, "bm25")[0].passage.document == "nile"
    assert (tmp_path / "artifacts/logs/index/metrics.json").exists()
    assert not list((tmp_path / "runs").iterdir())
