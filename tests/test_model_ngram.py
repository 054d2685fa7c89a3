"""The n-gram against arithmetic by hand and against the same formula written slowly over dictionaries."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch.model.ngram import NGram, discounts
from llm_from_scratch.model.registry import load_model, parameters, save_model

A, B, C = 0, 1, 2


class SlowKneserNey:
    """Modified Kneser-Ney one n-gram at a time, as the paper says it, sharing no line with the arrays whose oracle it is."""

    def __init__(self, text: Sequence[int], vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        self.counts: list[Counter[tuple[int, ...]]] = []
        for length in range(1, order + 1):
            places = range(len(text) - length + 1)
            if length == order:
                self.counts.append(Counter(tuple(text[i : i + length]) for i in places))
                continue
            before: dict[tuple[int, ...], set[int]] = defaultdict(set)
            for i in places:
                before[tuple(text[i : i + length])].add(text[i - 1] if i else -1)  # -1: the start of the text
            self.counts.append(Counter({gram: len(tokens) for gram, tokens in before.items()}))
        self.discounts = [self.discounts_of(counts) for counts in self.counts]

    @staticmethod
    def discounts_of(counts: Counter[tuple[int, ...]]) -> dict[int, float]:
        """D1, D2 and D3+ of Chen and Goodman, eq. 26, each replaced by half its count where it cannot be estimated from these counts."""
        of = Counter(counts.values())
        taken = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}
        if of[1] and of[2] and of[3]:
            for c in (1, 2, 3):
                estimate = c - (c + 1) * (of[1] / (of[1] + 2 * of[2])) * of[c + 1] / of[c]
                taken[c] = estimate if 0 < estimate < c else taken[c]
        return taken

    def p(self, token: int, context: tuple[int, ...]) -> float:
        if len(context) >= self.order:
            return self.p(token, context[1:] if self.order > 1 else ())
        lower = self.p(token, context[1:]) if context else 1 / self.vocab_size
        counts, taken = self.counts[len(context)], self.discounts[len(context)]
        here = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context}
        if not here:
            return lower
        saved = sum(taken[min(count, 3)] for count in here.values())
        own = here.get(token, 0)
        return float((own - taken[min(own, 3)] + saved * lower) / sum(here.values()))


def text(n: int, vocab_size: int, seed: int) -> np.ndarray:
    """Tokens with structure to find: low ones are likelier, and often the last two repeat."""
    rng = np.random.default_rng(seed)
    ids = (rng.random(n) ** 2 * vocab_size).astype(np.int64)
    for i in range(4, n):
        if rng.random() < 0.6:
            ids[i] = (ids[i - 1] + ids[i - 3]) % vocab_size
    return ids


def test_a_bigram_worked_by_hand() -> None:
    """The text a b a b a c. Too small to estimate discounts, so 0.5, 1 and 1.5.

    Continuation: a was seen after the start and after b (2), b after a (1), c after a (1); 4 in all.
    p(a) = (2 - 1 + (1 + 0.5 + 0.5) / 3) / 4 = 5/12; p(b) = (1 - 0.5 + 2/3) / 4 = 7/24, and p(c) too.
    After a: b twice, c once, so p(b | a) = (2 - 1 + (1 + 0.5) p(b)) / 3 and p(c | a) = (1 - 0.5 + 1.5 p(c)) / 3.
    """
    model = NGram.train([A, B, A, B, A, C], vocab_size=3, order=2)

    assert model.next_probs([]) == pytest.approx([5 / 12, 7 / 24, 7 / 24])
    assert model.next_probs([A]) == pytest.approx([1.5 * 5 / 12 / 3, (1 + 1.5 * 7 / 24) / 3, (0.5 + 1.5 * 7 / 24) / 3])
    assert model.next_probs([C]) == pytest.approx(model.next_probs([])), "nothing ever followed c, so the shorter context decides"


def test_discounts_are_those_of_chen_and_goodman() -> None:
    counts = np.array([1] * 40 + [2] * 10 + [3] * 5 + [4] * 2 + [9])
    y = 40 / (40 + 2 * 10)
    assert discounts(counts) == pytest.approx([0, 1 - 2 * y * 10 / 40, 2 - 3 * y * 5 / 10, 3 - 4 * y * 2 / 5])


def test_a_text_large_enough_for_its_own_discounts_worked_by_hand() -> None:
    """Counts 1, 1, 1, 2, 3, 4 of a … f, and g never: Y = 3 / (3 + 2) = 0.6; D1 = 1 - 2 Y / 3 = 0.6, D2 = 2 - 3 Y = 0.2, D3 = 3 - 4 Y = 0.6.

    So 3 * 0.6 + 0.2 + 0.6 + 0.6 = 3.2 of 12 is handed to the seven alike.
    """
    model = NGram.train([0, 1, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5], vocab_size=7, order=1)
    shared = 3.2 / 7
    expected = [(c + shared) / 12 for c in (0.4, 0.4, 0.4, 1.8, 2.4, 3.4, 0)]
    assert model.next_probs([]).tolist() == pytest.approx(expected)
    assert model.token_nats([3, 6]).tolist() == pytest.approx([-np.log(expected[3]), -np.log(expected[6])])


def test_a_discount_never_reaches_zero_or_exceeds_its_count() -> None:
    """An estimate of zero would give a token not yet seen after a context no probability at all, and infinite nats."""
    for n1, n2, n3, n4 in [(0, 5, 5, 5), (5, 0, 5, 5), (1, 1, 9, 1), (9, 1, 1, 50), (1, 1, 1, 1)]:
        found = discounts(np.repeat([1, 2, 3, 4], [n1, n2, n3, n4]))
        assert found[0] == 0
        assert all(0 < d <= c for c, d in enumerate(found[1:], 1))


@pytest.mark.parametrize("order", range(1, 8))
def test_the_arrays_compute_what_the_dictionaries_do(order: int) -> None:
    train, held_out = text(400, 7, seed=1), text(60, 7, seed=2)
    fast, slow = NGram.train(train, 7, order), SlowKneserNey(train.tolist(), 7, order)

    oracle = [-np.log(slow.p(int(token), tuple(held_out[max(0, i - order + 1) : i].tolist()))) for i, token in enumerate(held_out)]

    assert fast.token_nats(held_out) == pytest.approx(oracle, abs=1e-12)


@pytest.mark.parametrize("order", range(1, 8))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_after_every_context_seen_or_not_the_probabilities_are_the_slow_ones_and_sum_to_one(order: int, data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(1, 5))
    tokens = st.integers(0, vocab_size - 1)
    train = data.draw(st.lists(tokens, min_size=order, max_size=40))
    strange = data.draw(st.lists(tokens, max_size=order + 1))
    fast, slow = NGram.train(train, vocab_size, order), SlowKneserNey(train, vocab_size, order)

    seen = [train[i - length : i] for length in range(order) for i in range(length, len(train) + 1)]
    for context in [*seen, strange]:
        p = fast.next_probs(context)
        assert abs(p.sum() - 1) < 1e-9
        assert p.min() > 0
    for context in [train[-order + 1 :] if order > 1 else [], strange]:
        oracle = [slow.p(token, tuple(context)) for token in range(vocab_size)]
        scored = [np.exp(-fast.token_nats([*context, token])[-1]) for token in range(vocab_size)]
        assert fast.next_probs(context).tolist() == pytest.approx(oracle, abs=1e-12)
        assert scored == pytest.approx(oracle, abs=1e-12)


@pytest.mark.parametrize("order", range(1, 8))
@pytest.mark.parametrize("vocab_size", [5, 300, 65_536])
def test_probabilities_sum_to_one_in_large_vocabularies_too(vocab_size: int, order: int) -> None:
    train = text(3_000, min(vocab_size, 300), seed=3)
    model = NGram.train(train, vocab_size, order)
    rng = np.random.default_rng(4)
    for length in [0, 1, 3, order - 1, 50]:
        for context in (rng.integers(0, vocab_size, length), train[100 : 100 + length], train[len(train) - length :]):
            assert abs(model.next_probs(context).sum() - 1) < 1e-9


def test_the_largest_vocabulary_at_order_seven_does_not_overflow() -> None:
    """As powers of the vocabulary, 7 tokens of 2**31 would need 217 bits; an id and a token need 31 more than the ids do."""
    vocab_size = 2**31
    train = np.array([0, vocab_size - 1, 5, vocab_size - 1, 5] * 40)
    model = NGram.train(train, vocab_size, order=7)
    assert all(level.keys.min() >= 0 and level.keys.max() < len(train) * vocab_size for level in model.levels)
    assert model.token_nats(train)[7:].max() < 0.1


def test_doubt_is_what_the_longest_followed_context_hands_down() -> None:
    """The text a b a b a c at order 2. Nothing before: 4 continuations, from which 1 + 0.5 + 0.5 are taken. After a: 1 + 0.5 of 3.

    After b: 1 of 2. Nothing followed c, so what the empty context hands down counts.
    """
    model = NGram.train([A, B, A, B, A, C], vocab_size=3, order=2)
    assert model.doubt([A, B, C, B]).tolist() == pytest.approx([2 / 4, 1.5 / 3, 1 / 2, 2 / 4])
    assert model.doubt([A, B, A]).tolist() == pytest.approx([2 / 4, 1.5 / 3, 1 / 2])
    assert model.doubt([]).tolist() == []


def test_scoring_a_text_and_asking_token_by_token_agree() -> None:
    model = NGram.train(text(500, 9, seed=5), 9, order=3)
    held_out = text(40, 9, seed=6)

    one_by_one = [-np.log(model.next_probs(held_out[:i])[token]) for i, token in enumerate(held_out)]

    assert model.token_nats(held_out) == pytest.approx(one_by_one)
    assert model.token_nats([]).shape == (0,)


def test_a_longer_context_helps_on_held_out_text() -> None:
    train, held_out = text(6_000, 12, seed=7), text(1_000, 12, seed=8)
    losses = [NGram.train(train, 12, order).token_nats(held_out).mean() for order in (1, 2, 4)]
    assert np.log(12) > losses[0] > losses[1] > losses[2]


def test_an_ngram_comes_back_from_its_folder_equal(tmp_path: Path) -> None:
    model, held_out = NGram.train(text(2_000, 40, seed=9), 40, order=4), text(200, 40, seed=10)

    save_model(model, tmp_path, eot=39)
    loaded = load_model(tmp_path)

    assert isinstance(loaded, NGram)
    assert np.array_equal(loaded.token_nats(held_out), model.token_nats(held_out))
    assert (loaded.order, loaded.vocab_size, parameters(loaded)) == (4, 40, parameters(model))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llm_from_scratch_ngram"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}, "no pickle"
    assert (tmp_path / "model.safetensors").stat().st_size < 12 * parameters(model) + 2_000, "a key and a count for each n-gram"


def test_two_trainings_on_the_same_text_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        save_model(NGram.train(text(500, 9, seed=5).astype(np.uint16), 9, order=3), tmp_path / name, eot=8)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_what_cannot_be_counted_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="found 2 tokens and order 3; the order must be from 1"):
        NGram.train([A, B], vocab_size=3, order=3)
    with pytest.raises(ValueError, match="found token ids from 0 to 2, the vocabulary has 0 to 1"):
        NGram.train([A, B, C], vocab_size=2, order=1)
    model = NGram.train([A, B, C], vocab_size=3, order=1)
    with pytest.raises(ValueError, match="ids from 7 to 7"):
        model.token_nats([7])
    with pytest.raises(ValueError, match=r"order 2 has keys and counts for each order; counts\.2 is missing"):
        NGram.from_arrays(model.arrays(), vocab_size=3, order=2)
