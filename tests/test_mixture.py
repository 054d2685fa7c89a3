"""The mixture by hand, against a grid of all weights, and what it may not read."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch.evaluation import MixtureParams
from llm_from_scratch.evaluation.likelihood import score, token_nats
from llm_from_scratch.evaluation.mixture import Counted, count, degrees, fit_weight, fit_weights, mixed_nats, mixture
from llm_from_scratch.model.bigram import BigramParams
from llm_from_scratch.model.mlp import MlpParams
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.model.registry import build

VOCAB = 6
ONE_BYTE = np.ones(VOCAB, np.int64)
PROBABILITIES = st.lists(st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)), min_size=1, max_size=30)


def nats(*probabilities: float) -> np.ndarray:
    return -np.log(np.array(probabilities))


def text(n: int, seed: int) -> np.ndarray:
    """Every third token repeats the sum of the two before it."""
    ids = np.random.default_rng(seed).integers(VOCAB, size=n)
    for i in range(2, n, 3):
        ids[i] = (ids[i - 1] + ids[i - 2]) % VOCAB
    return ids.astype(np.uint16)


def counted(train: np.ndarray, order: int, slice_tokens: int) -> Counted:
    return count(train, VOCAB, MixtureParams(order=order, slice_tokens=slice_tokens))


def eighths(doubt: np.ndarray) -> np.ndarray:
    return np.digitize(doubt, [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8])


def mlp() -> torch.nn.Module:
    torch.manual_seed(2)
    return build(MlpParams(architecture="mlp", window=2, width=4, hidden=8), VOCAB)


def test_a_mixture_worked_by_hand() -> None:
    """A quarter of 0.8 and three quarters of 0.4 is 0.5; of 0.1 and 0.5 it is 0.4."""
    found = mixed_nats(nats(0.8, 0.1), nats(0.4, 0.5), 0.25)
    assert np.exp(-found).tolist() == pytest.approx([0.5, 0.4])


def test_a_weight_worked_by_hand() -> None:
    """Twice 0.8 against 0.4, once 0.1 against 0.5: 2 * 0.4 / (0.4 + 0.4 w) = 0.4 / (0.5 - 0.4 w), so 1 - 0.8 w = 0.4 + 0.4 w."""
    assert fit_weight(nats(0.8, 0.8, 0.1), nats(0.4, 0.4, 0.5)) == pytest.approx(0.5)


def test_the_weight_goes_to_the_one_that_is_better_everywhere() -> None:
    assert fit_weight(nats(0.5, 0.6), nats(0.4, 0.1)) == 1
    assert fit_weight(nats(0.4, 0.1), nats(0.5, 0.6)) == pytest.approx(0)
    assert mixed_nats(nats(0.5), nats(0.25), 1.0) == pytest.approx(nats(0.5))
    assert mixed_nats(nats(0.5), nats(0.25), 0.0) == pytest.approx(nats(0.25))


@given(PROBABILITIES)
def test_no_weight_of_a_fine_grid_makes_the_tokens_likelier(pairs: list[tuple[float, float]]) -> None:
    neural, ngram = (nats(*column) for column in zip(*pairs, strict=True))
    weight = fit_weight(neural, ngram)
    grid = np.linspace(0, 1, 1_001)
    costs = [-np.log(each * np.exp(-neural) + (1 - each) * np.exp(-ngram)).sum() for each in grid]
    assert 0 <= weight <= 1
    assert mixed_nats(neural, ngram, weight).sum() <= min(costs) + 1e-9


@given(PROBABILITIES, st.floats(0, 1))
@settings(max_examples=50)
def test_a_mixture_is_nowhere_better_than_the_better_nor_worse_than_the_worse(pairs: list[tuple[float, float]], weight: float) -> None:
    neural, ngram = (nats(*column) for column in zip(*pairs, strict=True))
    mixed = mixed_nats(neural, ngram, weight)
    assert np.all(mixed >= np.minimum(neural, ngram) - 1e-12)
    assert np.all(mixed <= np.maximum(neural, ngram) + 1e-12)


def test_tokens_that_one_of_them_all_but_rules_out_do_not_overflow() -> None:
    """exp(5000) is no float64; the tokens that both give a chance decide."""
    weight = fit_weight(np.array([0.1, 5_000.0]), np.array([5_000.0, 0.1]))
    assert weight == pytest.approx(0.5)
    assert np.isfinite(mixed_nats(np.array([0.1, 5_000.0]), np.array([5_000.0, 0.1]), weight)).all()


def test_each_group_gets_its_own_weight_and_a_rare_one_that_of_all() -> None:
    """Two tokens in a group used to put its weight at 1, and held-out text paid for it."""
    neural = np.concatenate([np.tile(nats(0.8, 0.8, 0.1), 40), nats(0.9, 0.9)])
    ngram = np.concatenate([np.tile(nats(0.4, 0.4, 0.5), 40), nats(0.2, 0.2)])
    groups = np.repeat([1, 0], [120, 2])
    of_all = fit_weight(neural, ngram)
    assert fit_weights(neural, ngram, groups, 3).tolist() == pytest.approx([of_all, 0.5, of_all])
    assert 0.5 < of_all < 1


def test_doubt_falls_into_eight_equal_steps() -> None:
    assert degrees(np.array([0.0, 0.1249, 0.125, 0.5, 0.99, 1.0])).tolist() == [0, 0, 1, 4, 7, 7]


def test_what_is_not_of_the_same_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="found the nats of 2 tokens and 1, wanted those of the same tokens"):
        fit_weight(nats(0.5, 0.5), nats(0.5))
    with pytest.raises(ValueError, match="at least one"):
        fit_weight(np.array([]), np.array([]))
    with pytest.raises(ValueError, match=r"found 30 training tokens, wanted at least 3 more than the slice of 28; lower slice_tokens"):
        count(text(30, 1), VOCAB, MixtureParams(order=3, slice_tokens=28))


def test_the_mixture_is_what_its_parts_give_one_after_the_other() -> None:
    train, val, model = text(400, 1), text(90, 2), mlp()

    found = mixture(model, counted(train, 3, 100), val, 2 * ONE_BYTE, context=8)

    without, full = NGram.train(train[:300], VOCAB, 3), NGram.train(train, VOCAB, 3)
    tail = train[300:]
    weights = fit_weights(token_nats(model, tail, 8), without.token_nats(tail)[1:], eighths(without.doubt(tail)[1:]), 8)
    by_token = weights[eighths(full.doubt(val)[1:])]
    expected = -np.log(by_token * np.exp(-token_nats(model, val, 8)) + (1 - by_token) * np.exp(-full.token_nats(val)[1:]))
    assert found.weights.tolist() == weights.tolist()
    assert found.likelihood.val_loss == pytest.approx(expected.mean())
    assert (found.likelihood.tokens, found.likelihood.bytes) == (89, 178)
    assert found.ngram == score(full, val, 2 * ONE_BYTE, context=8)


def test_a_uniform_model_adds_nothing_to_an_ngram_that_knows_the_text() -> None:
    train = np.tile(np.arange(VOCAB, dtype=np.uint16), 60)
    uniform = build(BigramParams(architecture="bigram"), VOCAB)
    found = mixture(uniform, counted(train, 3, 60), train[:80], ONE_BYTE, context=8)
    assert found.weights.max() < 0.01
    assert found.likelihood.val_loss == pytest.approx(found.ngram.val_loss, rel=1e-2)


def test_the_weights_do_not_depend_on_the_held_out_text() -> None:
    """They are fitted before it is looked at: another held-out text gives the same weights, and what fits them takes no such argument."""
    first, second = (mixture(mlp(), counted(text(400, 1), 3, 100), text(80, seed), ONE_BYTE, context=8) for seed in (2, 3))
    assert first.weights.tolist() == second.weights.tolist()
    assert first.likelihood != second.likelihood
    assert list(inspect.signature(fit_weight).parameters) == ["neural", "ngram"]
    assert list(inspect.signature(fit_weights).parameters) == ["neural", "ngram", "groups", "count"]
    assert list(inspect.signature(count).parameters) == ["ids_train", "vocab_size", "params"]


def test_the_weights_come_from_an_ngram_that_has_not_counted_the_slice() -> None:
    """An n-gram that had counted it would know it by heart and get nearly all the weight, which held-out text would pay for."""
    train = text(400, 1)
    both = counted(train, 5, 200)
    neural, tail = token_nats(mlp(), train[200:], 8), train[200:]

    fair = fit_weight(neural, both.without_slice.token_nats(tail)[1:])
    by_heart = fit_weight(neural, both.whole.token_nats(tail)[1:])

    assert by_heart < 0.05 < 0.2 < fair
    assert both.fitting_slice.tolist() == tail.tolist()
    assert both.without_slice.parameters < both.whole.parameters
