"""A neural rung and the n-gram together: p = w p_neural + (1 - w) p_ngram, from what each paid for every token and nothing else.

They err at different places. Where a context was seen often and always went on alike, counting knows best; everywhere else the vectors
do. So the weight depends on the n-gram's doubt, the share that it hands down to shorter contexts: one weight for each of a few degrees of
it. (Jelinek and Mercer, 1980, who grouped contexts by their counts.) The weights are fitted on a slice of train that the n-gram has not
counted, never on held-out text: `fit_weight` and `fit_weights` get the slice's nats, and `mixture` fits before it looks at the text it
scores. What a mixture cannot do is know more at a token than the better of the two.

Shapes: T tokens, V vocabulary, D degrees of doubt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from llm_from_scratch.evaluation import MixtureParams
from llm_from_scratch.evaluation.likelihood import Likelihood, Progress, score, silent, token_nats
from llm_from_scratch.model.ngram import NGram

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

HALVINGS = 60
"""Of the interval that holds a weight: more than float64 can tell apart."""

TOO_FAR = 30.0
"""Nats between the two beyond which one rules the token out, whatever the weight: exp would overflow, and 1 + gain round to 0."""


DEGREES = 8
"""Of doubt. On Shakespeare's characters 4 to 32 do nearly the same; groups by how many tokens matched help far less."""

ENOUGH = 100
"""Tokens that a weight of their own takes: two or three would put it at 0 or 1."""


@dataclass(frozen=True)
class Counted:
    """One n-gram twice: of the `whole` of train, for scoring, and `without_slice`, for fitting on the slice at the end."""

    whole: NGram
    without_slice: NGram
    fitting_slice: npt.NDArray[Any]


@dataclass(frozen=True)
class Mixture:
    """What the two cost together, and the n-gram alone on the same tokens. `weights` (D,) are the neural shares, from no doubt to much."""

    weights: Floats
    likelihood: Likelihood
    ngram: Likelihood


def fit_weight(neural: Floats, ngram: Floats) -> float:
    """The neural share, from 0 to 1, that makes tokens which cost `neural` and `ngram` (T,) nats likeliest.

    The likelihood is concave in it, so its slope falls: the place where it crosses zero is found by halving. Raises ValueError for nats
    that are not of the same tokens, or of none.
    """
    if neural.shape != ngram.shape or not neural.size:
        raise ValueError(f"found the nats of {neural.size} tokens and {ngram.size}, wanted those of the same tokens, and at least one")
    gain = np.expm1(np.clip(ngram - neural, -TOO_FAR, TOO_FAR))  # p_neural / p_ngram - 1

    low, high = 0.0, 1.0
    if np.sum(gain / (1 + gain)) >= 0:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rising = np.sum(gain / (1 + middle * gain)) > 0
        low, high = (middle, high) if rising else (low, middle)
    return low


def fit_weights(neural: Floats, ngram: Floats, groups: Ints, count: int) -> Floats:
    """One `fit_weight` for each group of tokens, (count,); `groups` (T,) counts from 0. A rare group gets the weight of all."""
    of_all = fit_weight(neural, ngram)
    places = [groups == group for group in range(count)]
    return np.array([fit_weight(neural[here], ngram[here]) if here.sum() >= ENOUGH else of_all for here in places])


def degrees(doubt: Floats) -> Ints:
    """Which of D equal steps of doubt each token (T,) falls into, 0 to D - 1."""
    steps: Ints = np.minimum(doubt * DEGREES, DEGREES - 1).astype(np.int64)
    return steps


def mixed_nats(neural: Floats, ngram: Floats, weight: float | Floats) -> Floats:
    """What each token costs in the mixture, (T,) nats; `weight` is one for all tokens, or (T,)."""
    with np.errstate(divide="ignore"):  # a weight of 0 or 1 leaves one of the two out
        nats: Floats = -np.logaddexp(np.log(weight) - neural, np.log1p(-np.asarray(weight)) - ngram)
    return nats


def count(ids_train: npt.NDArray[Any], vocab_size: int, params: MixtureParams) -> Counted:
    """The n-gram that every model of these tokens is mixed with. Raises ValueError where the slice leaves nothing to count."""
    kept = len(ids_train) - params.slice_tokens
    if kept < params.order:
        wanted = f"at least {params.order} more than the slice of {params.slice_tokens}; lower slice_tokens"
        raise ValueError(f"fitting a mixture: found {len(ids_train)} training tokens, wanted {wanted}")
    without, whole = (NGram.train(ids, vocab_size, params.order) for ids in (ids_train[:kept], ids_train))
    return Counted(whole, without, ids_train[kept:])


def mixture(
    model: nn.Module,
    counted: Counted,
    ids_val: npt.NDArray[Any],
    token_bytes: npt.NDArray[Any],
    context: int,
    batch: int = 8,
    progress: Progress = silent,
) -> Mixture:
    """`ids_val` (N,) scored as `likelihood.score` does, by `model` mixed with the n-gram of all of train.

    The n-gram that fits the weights has not seen the slice; `model` usually has, once or twice, which flatters it a little there. Raises
    ValueError where the tokens do not fit.
    """
    weights = _fitted(counted, token_nats(model, counted.fitting_slice, context, batch, progress))
    ngram = counted.whole
    alone = score(ngram, ids_val, token_bytes, context)
    neural = token_nats(model, ids_val, context, batch, progress)
    nats = mixed_nats(neural, ngram.token_nats(ids_val)[1:], weights[degrees(ngram.doubt(ids_val)[1:])])
    return Mixture(weights, Likelihood(math.fsum(nats), alone.tokens, alone.bytes), alone)


def _fitted(counted: Counted, neural: Floats) -> Floats:
    """Weights (D,) from what the slice's tokens after the first cost the model."""
    ids, ngram = counted.fitting_slice, counted.without_slice
    return fit_weights(neural, ngram.token_nats(ids)[1:], degrees(ngram.doubt(ids)[1:]), DEGREES)
