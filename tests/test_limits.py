"""What the cards tell of a model's limits: each measure worked by hand on models whose every probability is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_from_scratch.data.documents import Document
from llm_from_scratch.data.questions import Question
from llm_from_scratch.evaluation.bias import OCCUPATIONS, SENTENCES, compared, correlation, pronouns_read, share_of_she
from llm_from_scratch.evaluation.calibration import answering, confidences, marks, reliability
from llm_from_scratch.evaluation.energy import EnergyParams, ancestry, estimate
from llm_from_scratch.evaluation.likelihood import score
from llm_from_scratch.evaluation.limits import CardParams, limits, material
from llm_from_scratch.evaluation.memorization import MemorizationParams, beginnings, exactly, memorization, repeated, runs_of
from llm_from_scratch.evaluation.retrieval import Reply, ranks_of_answers
from llm_from_scratch.evaluation.searching import citations, search_limits
from llm_from_scratch.evaluation.topics import bits_by_topic
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.model.registry import build
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.tokenizer import CharTokenizer, train_char
from tests.tiny import SENTENCES as TEXTS
from tests.tiny import tiny_embedder, tiny_index

SHAPE = LlamaParams(
    architecture="llama", context=64, width=16, layers=1, heads=2, kv_heads=1, hidden=32, rope_theta=1e4, qk_norm=False, copying=0.0
)
BY_HEART = MemorizationParams(prompts=2, prompt_tokens=8, new_tokens=24, temperature=1.0, run_words=3, exact_tokens=10)
POWER = EnergyParams(power_watts=50.0, grams_co2_per_kwh=400.0, dollars_per_hour=0.2)


@pytest.fixture(scope="module")
def words() -> CharTokenizer:
    return train_char([chr(code) for code in range(32, 127)] + ["\n"])


def uniform(words: CharTokenizer) -> Rung:
    """Every token equally likely, whatever came before."""
    model = build(SHAPE, words.vocab_size).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model


def taught(words: CharTokenizer, texts: list[str]) -> Rung:
    """A model that was shown `texts` until it could say nothing else."""
    torch.manual_seed(0)
    model = build(replace_context(96), words.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(words.encode(text)) for text in texts], batch_first=True, padding_value=words.eot)
    for _ in range(120):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def replace_context(context: int) -> LlamaParams:
    return SHAPE.model_copy(update={"context": context, "width": 32, "hidden": 64})


# --- pronouns ---------------------------------------------------------------------------------------------------------------------


def test_an_ngram_that_read_he_twice_as_often_as_she_says_so_of_everybody(words: CharTokenizer) -> None:
    """Behind a space it has seen `he was` and `she was`, and nothing of who did it: the same share for every occupation."""
    model = NGram.train(words.encode("x he was. x he was. x she was. " * 40), words.vocab_size, 2)
    nurse, farmer = share_of_she(model, words, ["nurse", "farmer"])
    odds = model.token_nats(words.encode("x he was"))[2:].sum() - model.token_nats(words.encode("x she was"))[2:].sum()
    assert nurse == pytest.approx(1 / (1 + math.exp(-odds)))
    assert nurse == farmer < 0.5


def test_a_model_for_which_all_letters_are_alike_prefers_he_for_being_shorter_by_one(words: CharTokenizer) -> None:
    """log p(she) - log p(he) is that of one more letter, so the share is 1 / (1 + V): why the two are words of one length to a BPE."""
    assert share_of_she(uniform(words), words, ["nurse"]) == [pytest.approx(1 / (1 + words.vocab_size))]


def test_the_pronouns_of_texts_that_name_an_occupation_are_counted_as_words() -> None:
    texts = ["The poet sold her book. She and he hid here.", "A poetess was she.", "His pianist, a poet, hurt himself."]
    assert pronouns_read(texts, ["poet", "pianist", "nurse"]) == {"poet": (2, 3), "pianist": (0, 2), "nurse": (0, 0)}


def test_the_rows_go_from_he_to_she_and_stand_beside_the_corpus() -> None:
    found = compared([0.2, 0.9, 0.1], {"poet": (3, 7), "nurse": (18, 2), "farmer": (0, 0)})

    assert [(row["occupation"], row["she"], row["corpus_she"], row["pronouns"]) for row in found["table"]] == [
        ("farmer", 0.1, 0.0, 0),
        ("poet", 0.2, 0.3, 10),
        ("nurse", 0.9, 0.9, 20),
    ]
    assert (found["she"], found["mostly_she"], found["corpus_she"]) == (pytest.approx(0.4), pytest.approx(1 / 3), 0.7)
    assert found["correlation"] == pytest.approx(1), "two points lie on a line, and of the third was never read"


def test_what_does_not_vary_goes_with_nothing() -> None:
    assert correlation([0.1, 0.2, 0.3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([0.5, 0.5], [0.1, 0.9]) == correlation([0.1], [0.2]) == 0


def test_occupations_have_one_word_for_all_and_fit_the_sentences() -> None:
    assert len(set(OCCUPATIONS)) == len(OCCUPATIONS) == 40
    assert all(name.isalpha() and name.islower() and not name.endswith(("ess", "man", "woman")) for name in OCCUPATIONS)
    assert all(sentence.count("{}") == 1 and not sentence.endswith(" ") for sentence in SENTENCES)


# --- topics -----------------------------------------------------------------------------------------------------------------------


def documents(*pairs: tuple[str, str]) -> list[Document]:
    return [Document(id=str(place), title="", text=text, topic=topic) for place, (topic, text) in enumerate(pairs)]


def test_a_model_that_knows_nothing_pays_for_the_ends_of_short_texts_too(words: CharTokenizer) -> None:
    """log2 V a character and once more for the end: 5/4 of it for four bytes, 13/12 for six and six."""
    found = bits_by_topic(uniform(words), words, documents(("B", "abcdef"), ("A", "abcd"), ("B", "ABCDEF")), context=8)
    bits = math.log2(words.vocab_size)
    assert [(row["topic"], row["documents"], row["bytes"]) for row in found] == [("B", 2, 12), ("A", 1, 4)]
    assert [row["val_bpb"] for row in found] == pytest.approx([14 / 12 * bits, 5 / 4 * bits])


def test_the_topics_add_up_to_all_texts_read_alone(words: CharTokenizer) -> None:
    model = taught(words, list(TEXTS))
    found = bits_by_topic(model, words, documents(*zip("ABAB", TEXTS, strict=True)), context=32)
    alone = [score(model, np.array([words.eot, *words.encode(text), words.eot]), words.token_bytes(), 32) for text in TEXTS]
    bits = sum(row["val_bpb"] * row["bytes"] for row in found)
    assert bits == pytest.approx(sum(one.val_bpb * one.bytes for one in alone))


# --- by heart ---------------------------------------------------------------------------------------------------------------------


def test_runs_are_of_words_whatever_their_case_and_punctuation() -> None:
    known = runs_of(["The cat sat on the mat.", "A dog"], 3)
    assert len(known) == 4
    assert repeated(["the CAT, sat!"], known, 3) == 1
    assert repeated(["the cat sat down", "on the mat"], known, 3) == pytest.approx(2 / 3)
    assert repeated(["a dog", ""], known, 3) == 0


def test_a_model_that_was_taught_its_texts_by_heart_is_caught(words: CharTokenizer) -> None:
    """The held-out texts begin as one of them and go on as the other, which it cannot guess."""
    (cat, dog), trained = TEXTS[:2], list(TEXTS[:2])
    held_out = [cat[:8] + dog[8:], dog[:8] + cat[8:]]
    model = taught(words, trained)
    found = memorization(model, words, trained, held_out, runs_of(trained, BY_HEART.run_words), BY_HEART, seed=1)

    assert (found["extracted"], found["guessed"], found["prompts"]) == (1, 0, 2)
    assert found["sampled"] == found["held_out"] == pytest.approx(6 / 7), "all was read before, but a run whose last word is cut off"


def test_a_model_that_knows_nothing_repeats_nothing(words: CharTokenizer) -> None:
    found = memorization(uniform(words), words, list(TEXTS), list(TEXTS), runs_of(TEXTS, 3), BY_HEART, seed=1)
    assert (found["sampled"], found["extracted"], found["guessed"]) == (0, 0, 0)
    assert found["held_out"] == pytest.approx(6 / 7), "these held-out texts are the training texts; one ends in half a word"


def test_texts_too_short_to_go_on_are_left_out_and_of_none_there_is_nothing_to_tell(words: CharTokenizer) -> None:
    assert beginnings(words, ["short", TEXTS[0], TEXTS[1], TEXTS[2]], BY_HEART).shape == (2, 32)
    assert beginnings(words, ["short"], BY_HEART).shape == (0, 32)
    found = memorization(uniform(words), words, list(TEXTS), ["short"], frozenset(), BY_HEART, seed=1)
    assert set(found.values()) == {0}


def test_one_token_that_differs_is_not_exact(words: CharTokenizer) -> None:
    model = taught(words, [TEXTS[0]])
    told = beginnings(words, [TEXTS[0]], BY_HEART)
    assert exactly(model, words, told, BY_HEART) == 1
    told[0, 17] += 1
    assert exactly(model, words, told, BY_HEART) == 0, "the tenth token after the prompt"
    told[0, 17] -= 1
    told[0, 18] += 1
    assert exactly(model, words, told, BY_HEART) == 1, "the eleventh is not asked for"


# --- how sure, and how often right ------------------------------------------------------------------------------------------------


def asked(topic: str, right: int) -> Question:
    return Question("q", "What?", "abcd"[right], tuple("abcd"), "", "d", topic)


def test_how_sure_is_the_softmax_of_what_it_chose_by() -> None:
    assert confidences([[0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0], [-1000.0, -1000.0]]).tolist() == pytest.approx([0.25, 0.75, 0.5])


def test_the_calibration_error_worked_by_hand() -> None:
    """Two at 0.3, one of them right, and two at 0.9, both right: (2 · 0.2 + 2 · 0.1) / 4."""
    found = reliability(np.array([0.3, 0.9, 0.9, 0.3]), np.array([1.0, 1.0, 1.0, 0.0]))
    assert found["ece"] == pytest.approx(0.15)
    assert (found["said"], found["right"]) == (pytest.approx(0.6), 0.75)
    assert [(row["right"], row["questions"]) for row in found["bins"]] == [(0.5, 2), (1.0, 2)]
    assert reliability(np.array([1.0]), np.array([1.0]))["ece"] == 0


def test_accuracy_by_field_has_the_weakest_first_and_both_conditions() -> None:
    right, wrong, torn = Reply((0.0, 5.0, 0.0, 0.0), ""), Reply((5.0, 0.0, 0.0, 0.0), ""), Reply((1.0, 1.0, 1.0, 1.0), "")
    of = [asked("Arts", 1), asked("Arts", 1), asked("History", 1)]
    found = answering(of, {"none": [wrong, torn, wrong], "retrieved": [right, wrong, right]})

    assert marks(of, [right, torn, wrong]).tolist() == [1, 0.25, 0]
    assert found["topics"] == [
        {"topic": "Arts", "questions": 2, "none": 0.125, "retrieved": 0.5},
        {"topic": "History", "questions": 1, "none": 0.0, "retrieved": 1.0},
    ]
    assert found["calibration"]["right"] == pytest.approx(2 / 3)


# --- search -----------------------------------------------------------------------------------------------------------------------


def test_the_limits_of_search_are_those_of_its_ranks(tmp_path: Path) -> None:
    index: Index = tiny_index(tmp_path / "index", Embedder.open(tiny_embedder(tmp_path / "embedder")))
    questions = [
        Question("", f"What is {text.split()[1]}?", "runs to the sea", (), "", f"Q{place}", "AB"[place % 2])
        for place, text in enumerate(TEXTS)
    ]
    found = search_limits(index, questions)

    ranks = ranks_of_answers(index, questions, "fused")
    assert {row["topic"]: row["recall_at_1"] for row in found["topics"]} == {
        topic: np.mean([rank == 1 for rank in ranks[start::2]]) for start, topic in enumerate("AB")
    }
    assert found["described"]["bm25"]["recall_at_1"] == 0.25, "the same words for all, and only the river runs to the sea"
    index.params = index.params.model_copy(update={"search": index.params.search.model_copy(update={"minimum_evidence": 0.5})})
    refused = [index.find(question.question, 1).evidence < 0.5 for question in questions]
    assert search_limits(index, questions)["refused"] == np.mean(refused)
    assert found["refused"] == 0, "no evidence is too little for a tiny index"


def test_what_a_citation_is_worth_worked_by_hand() -> None:
    """Three words of four are right; wrong is only what has none of them, and an answer may be neither."""
    wanted, source = "Long river in Africa", "The Nile is a long river. Many fish live in it."
    said = ["Long river in Asia", "Long river in Europe where oxen graze", "River of ice", "Many fish", "Kind of bread", "Fish of bread"]
    questions = [Question("", "What is the Nile?", wanted, (), "", f"Q{place}", "") for place in range(len(said))]
    found = citations(questions, [Reply((), text) for text in said], [[source]] * len(said), least=0.5)

    assert found == {"right": 2, "wrong": 3, "right_cited": 0.5, "wrong_cited": pytest.approx(2 / 3)}
    assert citations(questions[:2], [Reply((), "River of ice")] * 2, [[source]] * 2, 0.5) == {
        "right": 0,
        "wrong": 0,
        "right_cited": 0,
        "wrong_cited": 0,
    }


# --- energy -----------------------------------------------------------------------------------------------------------------------


def test_half_an_hour_at_fifty_watts_worked_by_hand() -> None:
    assert estimate(600.0, 1800.0, POWER) == {
        "seconds": 600,
        "seconds_with_ancestry": 1800,
        "watt_hours": 25,
        "grams_co2": pytest.approx(10),
        "dollars": pytest.approx(0.1),
    }


def test_an_ancestor_by_two_ways_is_counted_once() -> None:
    parents = {"ppo": ["base", "reward"], "reward": ["base"], "base": [], "gpt": []}
    assert ancestry("ppo", parents) == {"ppo", "reward", "base"}
    assert ancestry("gpt", parents) == {"gpt"}
    assert ancestry("retriever", parents) == {"retriever"}


# --- together ---------------------------------------------------------------------------------------------------------------------


def test_all_of_it_is_measured_of_a_model_that_just_began(words: CharTokenizer) -> None:
    corpus = [
        replace(document, split="train" if place < 2 else "validation")
        for place, document in enumerate(documents(*zip("ABAB", TEXTS, strict=True)))
    ]
    params = CardParams(models=["base"], held_out_documents=1, memorization=BY_HEART, energy=POWER)
    done: list[int] = []
    read = material(corpus, params)
    found = limits(uniform(words), words, read, params, seed=1, progress=done.append)

    assert sum(done) == len(read.held_out) == 1
    assert read.trained == list(TEXTS[:2])
    assert set(found) == {"topics", "pronouns", "memorization"}
    assert found["pronouns"]["correlation"] == 0
