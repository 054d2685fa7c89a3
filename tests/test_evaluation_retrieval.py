"""Question answering and search quality, scored against slow paths, a model that knows everything and one that knows nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_retrieval import tiny_encoder, tiny_index
from torch.nn.functional import cross_entropy

from llm_from_scratch.data.chat import question_messages
from llm_from_scratch.data.questions import Question
from llm_from_scratch.evaluation import EvaluateParams, MixtureParams, PromotionParams
from llm_from_scratch.evaluation.retrieval import (
    CONDITIONS,
    Reply,
    bootstrap_interval,
    graded,
    passages_for,
    question_answering,
    rank_means,
    ranks_of_answers,
    replies,
    retrieval_quality,
)
from llm_from_scratch.evaluation.selection import ServeRule, ServeWeights
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.model.bigram import BigramParams
from llm_from_scratch.model.gpt import GptParams
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.model.registry import build
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.retrieval.embed import Embedder
from llm_from_scratch.retrieval.index import Index
from llm_from_scratch.retrieval.passages import Passage
from llm_from_scratch.retrieval.rag import NUMBERED, fit_passages, prompt_tokens
from llm_from_scratch.tokenizer import CharTokenizer, train_char
from llm_from_scratch.tokenizer.chat import render

LLAMA = LlamaParams(
    architecture="llama", context=192, width=32, layers=2, heads=2, kv_heads=1, hidden=64, rope_theta=1e4, qk_norm=False, copying=0.0
)
GPT = GptParams(architecture="gpt", context=192, width=32, layers=2, heads=2, dropout=0.1)
FACTS = {
    "Mars": "red planet",
    "Nile": "river in Africa",
    "Sirius": "brightest star",
    "Oslo": "capital of Norway",
    "Ada": "English mathematician",
    "Rex": "dog",
}
PARAMS = EvaluateParams(
    seed=1,
    questions=6,
    choices=4,
    passages=1,
    answer_tokens=24,
    latency_tokens=1,
    latency_repeats=1,
    kl_tokens=1,
    heatmap_text="x",
    mixture=MixtureParams(order=3, slice_tokens=100),
    serve_rule=ServeRule(maximum_loss_increase=0.01, weights=ServeWeights(megabytes=1.0, milliseconds=1.0)),
    promotion=PromotionParams(
        metric="val_bpb",
        finetune_metric="val_loss",
        alignment_metric="gold_cost",
        minimum_gain=0.0,
        units=50,
        minimum_units=2,
        resamples=100,
        confidence=0.95,
    ),
)


def passage_of(name: str) -> str:
    return f"{name} is known as the {FACTS[name]}."


def questions() -> list[Question]:
    names = list(FACTS)
    made = []
    for place, name in enumerate(names):
        choices = [FACTS[names[(place + step) % len(names)]] for step in range(4)]
        choices = choices[place % 4 :] + choices[: place % 4]
        made.append(Question(name, f"What is {name}?", FACTS[name], tuple(choices), passage_of(name), name, "Things"))
    return made


@pytest.fixture(scope="module")
def tokenizer() -> CharTokenizer:
    return train_char([chr(code) for code in range(32, 127)] + ["\n"])


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder: Path = tmp_path_factory.mktemp("index")
    embedder = Embedder.open(tiny_encoder(folder / "tiny"))
    return tiny_index(folder / "index", embedder, [Passage(f"{name}#0", name, name, passage_of(name)) for name in FACTS])


def random_model(shape: LlamaParams | GptParams, tokenizer: CharTokenizer) -> Rung:
    torch.manual_seed(0)
    model = build(shape, tokenizer.vocab_size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))  # blocks start as the identity, which would hide a wrong cache
    return model.eval()


def taught(tokenizer: CharTokenizer) -> Rung:
    """A model that was shown the six answers, without passages, until it knew them."""
    torch.manual_seed(0)
    model = build(LLAMA, tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows, masks = zip(
        *(
            render([*question_messages(q.question, []), {"role": "assistant", "content": q.answer}], tokenizer, prompt=False)
            for q in questions()
        ),
        strict=True,
    )
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    learned = torch.nn.utils.rnn.pad_sequence([torch.tensor(mask) for mask in masks], batch_first=True)
    targets = ids.masked_fill(~learned, -100)[:, 1:]
    for _ in range(80):
        loss = cross_entropy(model(ids[:, :-1]).transpose(1, 2), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return model.eval()


def test_a_model_that_knows_the_answers_is_always_right(tokenizer: CharTokenizer, index: Index) -> None:
    found = question_answering(taught(tokenizer), tokenizer, index, questions(), PARAMS, conditions=("none",))
    right = {"accuracy": 1, "accuracy_low": 1, "accuracy_high": 1, "f1": 1, "exact_match": 1, "n": 6}
    assert found == {"none": right | {"accuracy_pmi": 0.25}}, "without a passage nothing changed, which is a tie of four"


def test_a_model_that_finds_everything_equally_likely_is_right_one_time_in_four(tokenizer: CharTokenizer, index: Index) -> None:
    model = random_model(LLAMA, tokenizer)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").zero_()
    found = question_answering(model, tokenizer, index, questions(), PARAMS)
    assert list(found) == list(CONDITIONS)
    for condition in CONDITIONS:
        assert found[condition]["accuracy"] == 0.25
        assert found[condition]["n"] == 6


def test_a_model_that_answers_at_random_is_right_about_one_time_in_four() -> None:
    rng = np.random.default_rng(0)
    many = questions() * 200
    found = graded(many, [Reply(tuple(rng.random(4)), "") for _ in many], seed=1)
    assert found["accuracy"] == pytest.approx(0.25, abs=0.04)
    assert found["accuracy_low"] < 0.25 < found["accuracy_high"]


def test_what_a_passage_changes_counts_apart_from_what_was_likely_anyway() -> None:
    """The wrong choice stays the likeliest, but it is the right one that the passage helped."""
    (question,) = questions()[:1]
    right = question.choices.index(question.answer)
    before = [-1.0, -1.0, -1.0, -1.0]
    before[right] = -5.0
    after = [-1.0, -1.0, -1.0, -1.0]
    after[right] = -3.0
    found = graded([question], [Reply(tuple(after), "")], seed=1, unread=[Reply(tuple(before), "")])
    assert (found["accuracy"], found["accuracy_pmi"]) == (0, 1)


@pytest.mark.parametrize("shape", [LLAMA, GPT], ids=["llama", "gpt"])
def test_shared_prompts_score_as_each_choice_read_alone_from_its_beginning(
    shape: LlamaParams | GptParams, tokenizer: CharTokenizer
) -> None:
    model = random_model(shape, tokenizer)
    prompts, choices = [], []
    for place, question in enumerate(questions() * 4):  # of many lengths, and a half of them begin alike
        asked = question_messages(question.question, [f"A passage about something. {question.passage}"] * (place % 2))
        prompts.append(render(asked, tokenizer, prompt=True)[0])
        choices.append([[*tokenizer.encode(choice), tokenizer.special["<|end|>"]] for choice in question.choices])
    done: list[int] = []
    found = replies(model, tokenizer, prompts, choices, 12, done.append)

    assert sum(done) == len(prompts) > len(done)
    engine = Engine(model, tokenizer)
    for prompt, offered, reply in zip(prompts, choices, found, strict=True):
        for choice, score in zip(offered, reply.scores, strict=True):
            with torch.no_grad():
                log_probabilities = model(torch.tensor([prompt + choice]))[0].log_softmax(-1)
            alone = [log_probabilities[len(prompt) - 1 + place, token].item() for place, token in enumerate(choice)]
            assert score == pytest.approx(sum(alone) / len(alone), abs=1e-4)
        written = engine.complete(prompt, Sampling(temperature=0, max_tokens=12))
        assert reply.text == "".join(piece.text for piece in written).strip()


def test_a_long_choice_is_not_at_a_disadvantage_for_being_long(tokenizer: CharTokenizer) -> None:
    model = random_model(LLAMA, tokenizer)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").zero_()  # every token has probability 1 / V
    end = tokenizer.special["<|end|>"]
    [reply] = replies(model, tokenizer, [[end]], [[[*tokenizer.encode("ox"), end], [*tokenizer.encode("hippopotamus"), end]]], 1)
    assert reply.scores == pytest.approx((-math.log(tokenizer.vocab_size),) * 2, abs=1e-5)


def test_each_condition_puts_its_own_passage_before_the_question(index: Index) -> None:
    asked = questions()
    assert passages_for("none", asked, index, PARAMS) == [[]] * 6
    assert passages_for("oracle", asked, index, PARAMS) == [[question.passage] for question in asked]
    assert passages_for("oracle", asked, index, PARAMS, NUMBERED) == [[f"{question.document}: {question.passage}"] for question in asked]

    found = passages_for("retrieved", asked, index, PARAMS)
    assert found == [[index.search(question.question, 1)[0].passage.text] for question in asked]
    both = passages_for("retrieved", asked, index, PARAMS.model_copy(update={"passages": 2}))
    assert all(len(texts) == 2 and texts[:1] == first for texts, first in zip(both, found, strict=True))

    with pytest.raises(ValueError, match="no condition 'gold'; there is none, random, retrieved, oracle"):
        passages_for("gold", asked, index, PARAMS)


def test_a_passage_is_told_by_the_title_in_the_index_and_without_one_by_its_document(index: Index, tmp_path: Path) -> None:
    asked = questions()[:2]
    titled = tiny_index(tmp_path / "index", index.embedder, [Passage("Mars#0", "Mars", "The planet Mars", passage_of("Mars"))])
    told = passages_for("oracle", asked, titled, PARAMS, NUMBERED)
    assert told == [[f"The planet Mars: {asked[0].passage}"], [f"Nile: {asked[1].passage}"]]
    assert passages_for("oracle", asked, None, PARAMS) == [[question.passage] for question in asked]
    with pytest.raises(ValueError, match="retrieved passages come from an index"):
        passages_for("retrieved", asked, None, PARAMS)


def test_a_random_passage_is_another_document_s_and_each_is_used_once(index: Index) -> None:
    asked = questions()
    for seed in range(20):
        given = passages_for("random", asked, index, PARAMS.model_copy(update={"seed": seed}))
        assert all(texts != [question.passage] for texts, question in zip(given, asked, strict=True))
        assert sorted(given) == sorted([question.passage] for question in asked)
    twins = [asked[0], replace(asked[0], id="twin"), asked[1]]
    assert all(texts[0] != twin.passage for texts, twin in zip(passages_for("random", twins, index, PARAMS), twins, strict=True))
    with pytest.raises(ValueError, match="ask about two or more"):
        passages_for("random", asked[:1], index, PARAMS)


def test_prompts_leave_room_for_the_longest_choice_and_the_answer(tokenizer: CharTokenizer, index: Index) -> None:
    long = [replace(question, passage=" ".join([question.passage] * 12)) for question in questions()]
    model = random_model(LLAMA, tokenizer)
    found = question_answering(model, tokenizer, index, long, PARAMS, conditions=("oracle",))
    assert found["oracle"]["n"] == 6
    room = model.context - PARAMS.answer_tokens
    kept = fit_passages(long[0].question, [long[0].passage], tokenizer, room)
    assert prompt_tokens(long[0].question, kept, tokenizer) <= room < prompt_tokens(long[0].question, [long[0].passage], tokenizer)


def test_a_rung_without_a_cache_is_refused(tokenizer: CharTokenizer, index: Index) -> None:
    bigram = build(BigramParams(architecture="bigram"), tokenizer.vocab_size)
    with pytest.raises(ValueError, match="Bigram keeps no keys and values, so it cannot be asked; ask a gpt or llama rung"):
        question_answering(bigram, tokenizer, index, questions(), PARAMS)


def test_the_bootstrap_interval_is_that_of_the_binomial() -> None:
    values = np.array([1.0, 0.0] * 200)
    low, high = bootstrap_interval(values, seed=1)
    half_width = 1.96 * math.sqrt(0.25 / 400)
    assert (low, high) == pytest.approx((0.5 - half_width, 0.5 + half_width), abs=0.005)
    assert bootstrap_interval(values, seed=1) == (low, high)
    assert bootstrap_interval(np.ones(5), seed=1) == (1, 1)


def test_recall_and_mean_reciprocal_rank_worked_by_hand(index: Index) -> None:
    mars = questions()[0]
    asked = [
        replace(mars, question="planet", document="Mars"),  # the only passage with the word: rank 1
        replace(mars, question="planet Mars brightest", document="Sirius"),  # Mars has two of the words, Sirius one: rank 2
        replace(mars, question="planet", document="Oslo"),  # no passage of Oslo has the word: not found
    ]
    assert ranks_of_answers(index, asked, "bm25") == [1, 2, 0]
    quality = retrieval_quality(index, asked)
    assert list(quality) == ["fused", "rrf", "dense", "bm25"]
    by_hand = {"recall_at_1": 1 / 3, "recall_at_5": 2 / 3, "mrr": 1 / 2, "ndcg_at_10": (1 + 1 / math.log2(3)) / 3}
    assert quality["bm25"] == pytest.approx(by_hand)


def test_ndcg_is_that_of_scikit_learn_and_nothing_below_the_tenth_counts() -> None:
    from sklearn.metrics import ndcg_score

    ranks = [1, 2, 3, 9, 10, 11, 40, 0]
    relevant = np.zeros((len(ranks), 100))
    for row, rank in enumerate(ranks[:-1]):
        relevant[row, rank - 1] = 1
    scores = np.tile(np.arange(100, 0, -1), (len(ranks), 1))
    assert rank_means(ranks)["ndcg_at_10"] == pytest.approx(ndcg_score(relevant, scores, k=10))
    assert rank_means([11, 0])["ndcg_at_10"] == 0
