"""Endings scored by likelihood: against transformers on the same weights, against each text read alone, and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_from_scratch.evaluation.multiple_choice import (
    Problem,
    alike,
    bootstrap_interval,
    credit,
    ending_log_probabilities,
    multiple_choice,
    read_problems,
)
from llm_from_scratch.model.attention import AttentionParams
from llm_from_scratch.model.bigram import BigramParams
from llm_from_scratch.model.gpt import GptParams
from llm_from_scratch.model.llama import LlamaParams
from llm_from_scratch.model.mlp import MlpParams
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.model.registry import build, save_model
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.tokenizer import BpeTokenizer, train_char
from llm_from_scratch.tokenizer.bpe import train_bpe
from tests.tiny import SENTENCES

V = 60
RUNGS: dict[str, Any] = {
    "bigram": BigramParams(architecture="bigram"),
    "mlp": MlpParams(architecture="mlp", window=3, width=8, hidden=16),
    "attention": AttentionParams(architecture="attention", context=48, width=24, layers=1, heads=3),
    "gpt": GptParams(architecture="gpt", context=48, width=24, layers=2, heads=3, dropout=0.1),
    "llama": LlamaParams(
        architecture="llama", context=48, width=32, layers=2, heads=4, kv_heads=2, hidden=48, rope_theta=1e4, qk_norm=False, copying=0.0
    ),
}


def noisy(name: str, vocab_size: int = V) -> Rung:
    torch.manual_seed(0)
    model = build(RUNGS[name], vocab_size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(V, size=length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return train_bpe(SENTENCES, 300)


def problems() -> list[Problem]:
    return [
        Problem("The cat is", ("a small animal.", "water that runs to the sea.", "gas", "a sphere that shines in the sky."), 0),
        Problem("A star is ", ("the sea.", " a sphere of gas", "people", "a dog"), 1),
        Problem("The dog", ("barks", "runs", "is a river", "shines brightly over the sea"), 2),
        Problem("", ("A river is water.", "A river is gas.", "The", "A"), 3),
        Problem("The cat is", ("1", "22", "333", "4444"), 3),
    ]


# --- oracles ----------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_scores_and_accuracies_are_those_of_transformers(tmp_path: Path, tokenizer: BpeTokenizer) -> None:
    from transformers import GPT2LMHeadModel

    model = noisy("gpt", tokenizer.vocab_size)
    save_model(model, tmp_path, eot=tokenizer.eot)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()

    sums, norms = [], []
    for problem in problems():
        prompt = tokenizer.encode(problem.context.strip()) or [tokenizer.eot]
        row = []
        for ending in problem.endings:
            added = tokenizer.encode(" " + ending.strip())
            chances = theirs(torch.tensor([prompt + added])).logits[0].log_softmax(-1)
            row.append(sum(chances[len(prompt) - 1 + place, token].item() for place, token in enumerate(added)))
        sums.append(row)
        norms.append([score / len(ending.strip()) for score, ending in zip(row, problem.endings, strict=True)])

    asked = [tokenizer.encode(problem.context.strip()) or [tokenizer.eot] for problem in problems()]
    offered = [[tokenizer.encode(" " + ending.strip()) for ending in problem.endings] for problem in problems()]
    for ours, wanted in zip(ending_log_probabilities(model, asked, offered), sums, strict=True):
        assert ours == pytest.approx(wanted, abs=1e-4)

    found = multiple_choice(model, tokenizer, problems(), seed=1)
    right = [problem.right for problem in problems()]
    assert found["accuracy"] == np.mean([np.argmax(row) == place for row, place in zip(sums, right, strict=True)])
    assert found["accuracy_norm"] == np.mean([np.argmax(row) == place for row, place in zip(norms, right, strict=True)])
    assert (found["chance"], found["n"]) == (0.25, 5)


@pytest.mark.parametrize("name", RUNGS)
@torch.inference_mode()
def test_every_rung_scores_as_it_does_on_each_text_alone(name: str) -> None:
    model = noisy(name)
    prompts = texts([5, 5, 7, 5, 1])
    endings = [texts([3, 1, 4, 2], seed) for seed in range(5)]
    done: list[int] = []
    found = ending_log_probabilities(model, prompts, endings, batch=2, progress=done.append)

    assert sum(done) == 5
    for prompt, offered, scores in zip(prompts, endings, found, strict=True):
        for ending, score in zip(offered, scores, strict=True):
            chances = model(torch.tensor([prompt + ending]))[0].log_softmax(-1)
            alone = sum(chances[len(prompt) - 1 + place, token].item() for place, token in enumerate(ending))
            assert score == pytest.approx(alone, abs=1e-4)


def test_an_ngram_scores_by_its_own_probabilities() -> None:
    rng = np.random.default_rng(0)
    model = NGram.train(rng.integers(9, size=500), 9, 3)
    prompt, endings = [1, 2, 3], [[4, 5], [6], [7, 8, 0]]
    [found] = ending_log_probabilities(model, [prompt], [endings])
    for ending, score in zip(endings, found, strict=True):
        steps = [math.log(model.next_probs((prompt + ending)[: 3 + place])[token]) for place, token in enumerate(ending)]
        assert score == pytest.approx(sum(steps), abs=1e-9)


@torch.inference_mode()
def test_a_text_longer_than_the_context_is_scored_from_its_newest_part() -> None:
    model = noisy("gpt")
    [prompt] = texts([100])
    ending = texts([1, 2])
    [found] = ending_log_probabilities(model, [prompt], [ending])
    for added, score in zip(ending, found, strict=True):
        window = (prompt + added)[-49:]  # the last window of the ruler: 48 tokens to look at, the last target behind them
        chances = model(torch.tensor([window[:-1]]))[0].log_softmax(-1)
        places = range(48 - len(added), 48)
        assert score == pytest.approx(sum(chances[place, window[place + 1]].item() for place in places), abs=1e-4)


def test_the_size_of_a_batch_changes_nothing(tokenizer: BpeTokenizer) -> None:
    model = noisy("llama", tokenizer.vocab_size)
    one, many = (multiple_choice(model, tokenizer, problems(), seed=1, batch=batch) for batch in (1, 16))
    assert one == pytest.approx(many)


# --- by hand ----------------------------------------------------------------------------------------------------------------------


def test_a_model_that_finds_every_token_equally_likely_prefers_short_endings_until_they_are_measured_by_their_bytes() -> None:
    """Characters, probability 1 / V each: the sum prefers the shortest ending, and nats a byte see only the space and width of letters."""
    tokenizer = train_char([chr(code) for code in range(32, 127)] + ["é"])
    model = noisy("gpt", tokenizer.vocab_size)
    with torch.no_grad():
        model.get_parameter("transformer.wte.weight").zero_()
    asked = [Problem("x", ("abcd", "ab", "abc"), 1), Problem("x", ("abcd", "ab", "abc"), 0), Problem("x", ("abc", "ééé"), 1)]

    found = multiple_choice(model, tokenizer, asked, seed=0)
    # Sums: -(1 + length) log V. First: "ab" is right. Second: "ab" again, wrong. Third: a tie, half a point.
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    # By bytes: 5/4 against 3/2 and 4/3, so the longest; "ééé" has the same four tokens over six bytes.
    assert found["accuracy_norm"] == pytest.approx((0 + 1 + 1) / 3)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)


def test_a_tie_is_worth_its_chance() -> None:
    assert credit([-1.0, -2.0], 0) == 1
    assert credit([-1.0, -2.0], 1) == 0
    assert credit([-1.0, -1.0, -1.0, -1.0], 2) == 0.25
    assert credit([-1.0, -1.0, -5.0], 2) == 0


def test_places_with_one_key_go_together_and_none_is_lost() -> None:
    groups = list(alike([3, 4, 3, 3, None, 3], 2))
    assert groups == [(3, [0, 2]), (3, [3, 5]), (4, [1]), (None, [4])]


def test_the_interval_of_hellaswag_is_about_a_point_each_way() -> None:
    """sqrt(0.3 · 0.7 / 10,042) · 1.96 = 0.9 points at its 10,042 questions."""
    low, high = bootstrap_interval(np.array([1.0] * 3013 + [0.0] * 7029), seed=0)
    assert (high - low) / 2 == pytest.approx(0.00896, abs=5e-4)


# --- files ------------------------------------------------------------------------------------------------------------------------


def test_both_forms_of_the_file_say_the_same(tmp_path: Path) -> None:
    official = {"ind": 3, "ctx": "A man", "endings": ["runs.", "sits."], "label": 1, "activity_label": "Sport", "split": "val"}
    (tmp_path / "val.jsonl").write_text(json.dumps(official) + "\n" + json.dumps(official | {"label": "0"}) + "\n\n")
    lettered = {"question": "A man", "choices": {"B": "sits.", "A": "runs."}, "answer": "B", "id": 3}
    (tmp_path / "val.json").write_text(json.dumps({"dataset": "hellaswag", "dev": [lettered, lettered | {"answer": "A"}]}))

    wanted = [Problem("A man", ("runs.", "sits."), 1), Problem("A man", ("runs.", "sits."), 0)]
    assert read_problems(tmp_path / "val.jsonl") == read_problems(tmp_path / "val.json") == wanted


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"ctx": "x", "endings": ["a", "b"], "label": ""}, "ValueError: invalid literal"),
        ({"ctx": "x", "endings": ["a", "b"], "label": 2}, "ValueError: 2 endings, the right one 2"),
        ({"ctx": "x", "endings": ["a", " "], "label": 0}, "ValueError: 2 endings"),
        ({"ctx": "x", "endings": ["a"]}, "KeyError: 'label'"),
        ({"question": "x", "choices": ["a"], "answer": "A"}, "TypeError"),
        ("x", "TypeError|AttributeError|KeyError"),
    ],
    ids=["a test split", "a label beyond", "an empty ending", "no label", "choices in a list", "no object"],
)
def test_a_row_in_another_form_is_named(tmp_path: Path, row: Any, complaint: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"ctx": "x", "endings": ["a"], "label": 0}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"^odd\.jsonl: row 2: wanted ctx, .* found ({complaint})") as refusal:
        read_problems(path)
    assert "\n" not in str(refusal.value)


def test_no_json_and_no_problems_are_said_in_a_line(tmp_path: Path, tokenizer: BpeTokenizer) -> None:
    (tmp_path / "odd.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"^odd\.json: not JSON"):
        read_problems(tmp_path / "odd.json")
    with pytest.raises(ValueError, match="no problems to choose endings for"):
        multiple_choice(noisy("gpt", tokenizer.vocab_size), tokenizer, [], seed=0)
