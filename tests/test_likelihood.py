"""The ruler: bits per byte on held-out text, worked by hand and against the slow way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from llm_from_scratch.evaluation.likelihood import Likelihood, score, token_nats
from llm_from_scratch.model.attention import AttentionParams
from llm_from_scratch.model.bigram import BigramParams
from llm_from_scratch.model.ngram import NGram
from llm_from_scratch.model.registry import build
from llm_from_scratch.tokenizer.bpe import train_bpe

ONE_BYTE = np.ones(8, np.int64)


def attention(context: int) -> nn.Module:
    torch.manual_seed(3)
    params = AttentionParams(architecture="attention", context=context, width=8, layers=2, heads=2)
    return build(params, vocab_size=8).eval()


def ids(length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(8, size=length).astype(np.uint16)


@torch.no_grad()
def slowly(model: nn.Module, text: np.ndarray, pasts: list[int]) -> list[float]:
    """Nats of each token after the first, one forward a token, given as many tokens before it as `pasts` says."""
    whole = torch.from_numpy(text.astype(np.int64))
    return [
        -model(whole[place - past : place][None])[0, -1].log_softmax(-1)[whole[place]].item() for place, past in enumerate(pasts, start=1)
    ]


def test_a_model_that_knows_nothing_pays_log2_of_its_vocabulary_a_token() -> None:
    """An untrained bigram is uniform over 8 tokens: 3 bits each, and at two bytes a token 1.5 bits a byte."""
    model = build(BigramParams(architecture="bigram"), vocab_size=8)
    found = score(model, ids(101), 2 * ONE_BYTE, context=16)
    assert (found.tokens, found.bytes) == (100, 200)
    assert found.val_loss == pytest.approx(math.log(8))
    assert found.val_bpb == pytest.approx(1.5)
    assert found.val_ppl == pytest.approx(8.0)
    assert found.metrics() == {"val_loss": found.val_loss, "val_bpb": found.val_bpb, "val_ppl": found.val_ppl}


def test_the_end_of_a_document_costs_nats_and_spells_no_byte() -> None:
    model = build(BigramParams(architecture="bigram"), vocab_size=8)
    spelled = np.array([1, 1, 1, 1, 1, 1, 1, 0])
    found = score(model, np.array([0, 1, 7, 2, 3]), spelled, context=16)
    assert (found.tokens, found.bytes) == (4, 3)
    assert found.val_bpb == pytest.approx(4 * 3 / 3)


def test_a_character_split_over_byte_tokens_counts_all_its_bytes_and_no_more() -> None:
    """An untrained BPE spells é in two tokens of one byte, 語 in three and 🙂 in four; the first token of the text is not scored."""
    words = train_bpe([""], 261)
    text = "xé語🙂"
    tokens = np.array(words.encode(text))
    model = build(BigramParams(architecture="bigram"), vocab_size=261)
    found = score(model, tokens, words.token_bytes(), context=4)
    assert (found.tokens, found.bytes) == (9, len(text.encode()) - 1)
    assert found.val_bpb == pytest.approx(math.log2(261))


@pytest.mark.parametrize("length", [2, 3, 8, 9])
def test_within_one_context_it_is_the_slow_way_that_reads_all_there_is(length: int) -> None:
    model, text = attention(context=8), ids(length)
    expected = slowly(model, text, pasts=list(range(1, length)))
    assert token_nats(model, text, context=8).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize(("context", "length"), [(8, 40), (8, 41), (8, 43), (7, 40), (2, 11), (1, 5)])
def test_past_the_first_context_every_token_is_scored_once_with_half_a_context_or_more(context: int, length: int, batch: int) -> None:
    """Windows start every half context, and the last is pushed back to the end of the text."""
    model, text = attention(context=8), ids(length)
    stride = max(1, context // 2)
    pasts: list[int] = []
    start = 0
    while len(pasts) < length - 1:
        start = min(start, length - 1 - context)
        pasts += [place - start for place in range(len(pasts) + 1, start + context + 1)]
        start += stride
    assert pasts[:context] == list(range(1, context + 1))
    assert all(past > context / 2 for past in pasts[context:])

    expected = slowly(model, text, pasts)
    assert token_nats(model, text, context, batch).tolist() == pytest.approx(expected, rel=1e-5)
    assert score(model, text, ONE_BYTE, context, batch).nats == pytest.approx(math.fsum(expected), rel=1e-5)


def test_an_n_gram_is_scored_on_the_same_tokens_as_a_neural_rung() -> None:
    model, text = NGram.train(ids(300), vocab_size=8, order=3), ids(40)
    found = score(model, text, ONE_BYTE, context=3)
    one_by_one = [-math.log(model.next_probs(text[:place].tolist())[text[place]]) for place in range(1, 40)]
    assert (found.tokens, found.bytes) == (39, 39)
    assert found.nats == pytest.approx(math.fsum(one_by_one))


def test_scoring_leaves_a_model_in_the_mode_it_was_in_and_drops_nothing_out() -> None:
    torch.manual_seed(0)
    model = build(BigramParams(architecture="bigram"), vocab_size=8)
    nn.init.normal_(model.get_parameter("table.weight"))
    model.register_forward_hook(lambda module, _, logits: nn.functional.dropout(logits, 0.5, module.training))
    still, moving = score(model.eval(), ids(50), ONE_BYTE, 8), score(model.train(), ids(50), ONE_BYTE, 8)
    assert model.training
    assert still == moving


def test_progress_goes_through_every_batch() -> None:
    seen: list[int] = []
    score(attention(8), ids(40), ONE_BYTE, 8, batch=4, progress=lambda batches: (seen.append(step) or step for step in batches))
    assert seen == [0, 4, 8]


def test_likelihood_adds_up_by_hand() -> None:
    found = Likelihood(nats=20 * math.log(2), tokens=10, bytes=40)
    assert found.val_loss == pytest.approx(2 * math.log(2))
    assert found.val_bpb == pytest.approx(0.5)
    assert found.val_ppl == pytest.approx(4.0)


def test_what_cannot_be_scored_says_why() -> None:
    model = attention(context=8)
    with pytest.raises(ValueError, match="the model has 8 tokens, the tokenizer 9; score a model with the tokenizer of its own bundle"):
        score(model, ids(40), np.ones(9, np.int64), 8)
    with pytest.raises(ValueError, match="token 8 is outside the model's vocabulary of 8"):
        score(model, np.array([1, 8, 2]), ONE_BYTE, 8)
    with pytest.raises(ValueError, match="1 held-out tokens, wanted at least 2; hold out more text or raise evaluate_tokens"):
        score(model, ids(1), ONE_BYTE, 8)
    with pytest.raises(ValueError, match="the 4 held-out tokens spell no byte"):
        score(model, ids(4), 0 * ONE_BYTE, 8)
    with pytest.raises(ValueError, match="cannot score with a context of 16: Attention sees 8 tokens; lower context"):
        score(model, ids(40), ONE_BYTE, 16)
