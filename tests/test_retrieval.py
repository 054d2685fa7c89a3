"""Passages cover their documents, vectors are sentence-transformers', both searches equal brute force, and answers cite what was read."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_retrieval import tiny_encoder, tiny_index

from llm_from_scratch import bundle
from llm_from_scratch.data.documents import Document, write_documents
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.model.registry import build
from llm_from_scratch.retrieval import embed
from llm_from_scratch.retrieval.embed import Embedder, embed_in_parts
from llm_from_scratch.retrieval.index import K1, B, Index, IndexParams, build_index, fuse, words
from llm_from_scratch.retrieval.passages import Passage, read_passages, split, windows, write_passages
from llm_from_scratch.retrieval.rag import answer, fit_passages, prompt_tokens
from llm_from_scratch.tokenizer import CharTokenizer, train_char

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
GREEDY = Sampling(temperature=0, max_tokens=8)


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


@pytest.fixture(scope="module")
def tokenizer() -> CharTokenizer:
    return train_char([chr(code) for code in range(32, 127)] + ["\n"])


def engine_of(tokenizer: CharTokenizer, context: int) -> Engine:
    torch.manual_seed(0)
    shape = LlamaParams(
        architecture="llama", context=context, width=16, layers=1, heads=2, kv_heads=1, hidden=32, rope_theta=10000.0, qk_norm=False
    )
    return Engine(build(shape, tokenizer.vocab_size), tokenizer)


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


def test_passages_come_back_from_their_file(tmp_path: Path) -> None:
    odd = [*PASSAGES, Passage("é#0", "é", "line\u2028break", 'quote " and\nnewline')]
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


def test_fused_search_is_the_fusion_of_both_searches(index: Index) -> None:
    query = "the star of the dog"
    places = {passage.id: place for place, passage in enumerate(PASSAGES)}
    both = [[(places[hit.passage.id], hit.score) for hit in index.search(query, 5, mode)] for mode in ("dense", "bm25")]
    hits = index.search(query, 3)
    assert [(places[hit.passage.id], hit.score) for hit in hits] == fuse(both)[:3]


def test_an_empty_query_finds_nothing_and_strange_words_only_neighbours_in_meaning(index: Index) -> None:
    for mode in ("fused", "dense", "bm25"):
        assert index.search("", 3, mode) == []
        assert index.search(" \n", 3, mode) == []
    assert index.search("?!", 3, "bm25") == []
    assert index.search("zzz", 3, "bm25") == []
    assert len(index.search("zzz", 99, "dense")) == len(PASSAGES)
    assert index.search_all(["", "the Nile", " "], 1, "bm25")[1][0].passage.document == "nile"
    with pytest.raises(ValueError, match="k = 0, wanted at least 1"):
        index.search("cat", 0)
    with pytest.raises(ValueError, match="no mode 'sparse'; there is fused, dense, bm25"):
        index.search("cat", 1, "sparse")  # type: ignore[arg-type]


def test_minilm_and_bm25_together_answer_a_paraphrase_and_a_name(minilm: Embedder, tmp_path: Path) -> None:
    index = tiny_index(tmp_path / "index", minilm, PASSAGES)
    assert index.search("feline pet", 1, "bm25") == []
    assert index.search("feline pet", 1)[0].passage.document == "cat"
    assert index.search("Which waterway crosses Egypt?", 1)[0].passage.document == "nile"
    assert index.search("What is the Solar System's star?", 1)[0].passage.id == "sun#0"


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


@pytest.mark.parametrize("name", ["faiss.index", "passages.jsonl", "bm25/data.csc.index.npy", "bm25/vocab.index.json"])
def test_a_damaged_index_is_refused_before_anything_reads_it(index: Index, tmp_path: Path, name: str) -> None:
    path = tmp_path / "index" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(bundle.BundleError, match=f"{Path(name).name}: sha256 is .* dvc repro --force --single-item index"):
        Index.open(tmp_path / "index", index.embedder)


def test_an_index_of_nothing_is_refused(embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 0 passages and 0 vectors"):
        build_index(tmp_path, [], embedder.embed([]))


def test_the_stage_builds_an_index_that_opens_and_leaves_no_state_behind(encoder: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from stages import index as stage

    raw = tmp_path / "artifacts/raw"
    shutil.copytree(encoder, raw / "tiny")
    with bundle.writing(raw / "wiki") as partial:
        write_documents(partial / "documents.jsonl", [Document(each.document, each.title, each.text) for each in PASSAGES])
        bundle.seal(partial, "corpus", "download@wiki")
    section = IndexParams(documents="wiki", embedder="tiny", passage_tokens=40, overlap_tokens=8, batch=4, maximum_passages=0)

    stage.run(SimpleNamespace(index=section), "", tmp_path)  # type: ignore[arg-type]

    index = Index.open(tmp_path / "artifacts/index", Embedder.open(raw / "tiny"))
    manifest = bundle.verify(tmp_path / "artifacts/index", "index")
    assert manifest.facts == {"passages": len(index.passages), "dimension": 16}
    assert manifest.parents["corpus"] == bundle.read_manifest(raw / "wiki").digest
    assert index.search("the river in Africa", 1, "bm25")[0].passage.document == "nile"
    assert (tmp_path / "artifacts/logs/index/metrics.json").exists()
    assert not list((tmp_path / "runs").iterdir())


# Answers


def test_the_answer_is_the_engine_s_to_the_passages_it_cites(index: Index, tokenizer: CharTokenizer) -> None:
    from llm_from_scratch.data.chat import question_messages

    engine = engine_of(tokenizer, context=512)
    question = "What is a star?"
    given = answer(engine, index, question, 2, GREEDY)
    hits = index.search(question, 2)

    assert [(cited.number, cited.title, cited.document, cited.score) for cited in given.citations] == [
        (hit.rank, hit.passage.title, hit.passage.document, hit.score) for hit in hits
    ]
    messages = question_messages(question, [cited.text for cited in given.citations])
    pieces = list(engine.chat(messages, GREEDY))
    assert given.text == "".join(piece.text for piece in pieces).strip()
    assert given.prompt_tokens == prompt_tokens(question, [hit.passage.text for hit in hits], tokenizer)
    assert (given.finish_reason, given.completion_tokens) == (pieces[-1].finish_reason, pieces[-1].completion_tokens)


@pytest.mark.parametrize("context", [40, 60, 90, 130, 200])
def test_the_prompt_never_outgrows_the_context_and_citations_are_what_was_read(
    index: Index, tokenizer: CharTokenizer, context: int
) -> None:
    given = answer(engine_of(tokenizer, context), index, "What is a star?", 3, GREEDY)
    assert given.prompt_tokens + GREEDY.max_tokens <= context
    assert given.prompt_tokens == prompt_tokens("What is a star?", [cited.text for cited in given.citations], tokenizer)
    for cited in given.citations:
        own = [passage for passage in PASSAGES if (passage.document, passage.title) == (cited.document, cited.title)]
        assert any(passage.text.startswith(cited.text) for passage in own)


def test_what_does_not_fit_is_trimmed_at_a_word_or_left_out_the_worst_first(tokenizer: CharTokenizer) -> None:
    best, worse = "one two three four five six seven eight nine ten", "eins zwei drei vier fünf sechs sieben acht neun zehn"
    question = "Which?"
    all_of_it = prompt_tokens(question, [best, worse], tokenizer)

    assert fit_passages(question, [best, worse], tokenizer, all_of_it) == [best, worse]
    assert fit_passages(question, [best, worse], tokenizer, None) == [best, worse]
    assert fit_passages(question, [best, worse], tokenizer, all_of_it - 1) == [best, worse.removesuffix(" zehn")]
    assert fit_passages(question, [best, worse], tokenizer, all_of_it - 20) == [best]
    assert fit_passages(question, [best, worse], tokenizer, prompt_tokens(question, [], tokenizer)) == []


def test_passages_share_the_room_of_one_as_they_did_in_training(tokenizer: CharTokenizer) -> None:
    sentence = "This is a sentence of fifty characters, all in all."
    long = " ".join([sentence] * 12)
    assert len(fit_passages("Which?", [long], tokenizer, None)[0]) <= 400
    assert all(len(text) <= 200 for text in fit_passages("Which?", [long, long], tokenizer, None))


def test_a_question_that_is_empty_or_too_long_is_refused(index: Index, tokenizer: CharTokenizer) -> None:
    engine = engine_of(tokenizer, context=64)
    with pytest.raises(ValueError, match="the question is empty"):
        answer(engine, index, "  ", 1, GREEDY)
    with pytest.raises(ValueError, match="the question is 103 tokens, but 56 fit before the answer"):
        answer(engine, index, "x" * 100, 1, GREEDY)
