"""Is a choice as often right as the model is sure of it? And in which fields is it right at all?

How sure: the softmax of the scores that it chose by, so of mean log probabilities a token. That makes a cautious number, nearer to guessing
than a sum would; the expected calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599) is measured of just that number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_from_scratch.data.questions import Question
from llm_from_scratch.evaluation.multiple_choice import credit
from llm_from_scratch.evaluation.retrieval import Reply

BINS = 10
Floats = NDArray[np.float64]


def answering(questions: Sequence[Question], found: Mapping[str, Sequence[Reply]]) -> dict[str, Any]:
    """Of the replies without a passage (`none`) and with what was `retrieved`: accuracy by `topics`, and the latter's `calibration`."""
    right = {condition: marks(questions, found[condition]) for condition in ("none", "retrieved")}
    said = confidences([reply.scores for reply in found["retrieved"]])
    return {"topics": by_topic(questions, right), "calibration": reliability(said, right["retrieved"])}


def confidences(scores: Sequence[Sequence[float]]) -> Floats:
    """(Q,) the probability of the likeliest choice, by the softmax of each row of scores."""
    highest = [max(row) for row in scores]
    return np.array([1 / np.exp(np.subtract(row, top)).sum() for row, top in zip(scores, highest, strict=True)])


def marks(questions: Sequence[Question], found: Sequence[Reply]) -> Floats:
    """(Q,) 1 where the choice is right, 0 where it is wrong, the chance where several are equally likely."""
    pairs = zip(questions, found, strict=True)
    return np.array([credit(reply.scores, question.choices.index(question.answer)) for question, reply in pairs])


def reliability(said: Floats, right: Floats, bins: int = BINS) -> dict[str, Any]:
    """`ece`, the mean distance of what was `said` from how often it was `right`, weighted by questions; and the `bins` that have any."""
    place = np.minimum((said * bins).astype(np.int64), bins - 1)
    rows = [
        {"said": float(said[inside].mean()), "right": float(right[inside].mean()), "questions": int(inside.sum())}
        for each in range(bins)
        if (inside := place == each).any()
    ]
    ece = sum(abs(row["said"] - row["right"]) * row["questions"] for row in rows) / len(said)
    return {"ece": float(ece), "said": float(said.mean()), "right": float(right.mean()), "bins": rows}


def by_topic(questions: Sequence[Question], right: Mapping[str, Floats]) -> list[dict[str, Any]]:
    """A row a topic with its number of `questions` and the mean of each column of `right`, by the last column, lowest first."""
    topics = np.array([question.topic for question in questions])
    rows = [
        {"topic": str(topic), "questions": int((inside := topics == topic).sum())}
        | {name: float(column[inside].mean()) for name, column in right.items()}
        for topic in np.unique(topics)
    ]
    last = list(right)[-1]
    return sorted(rows, key=lambda row: (row[last], row["topic"]))
