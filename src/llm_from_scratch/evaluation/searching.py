"""Where search fails, and what a citation is worth. Questions that name their entry are its easy case, so it is asked in two harder ways.

By field: some names are shared by more things than others. By description: "1968 film by Stanley Kubrick" instead of the title, with hardly
a word in common with what is sought; many descriptions fit several entries, so nobody could find all. And refusal: how often a question
that has a passage finds so little evidence of it that the service would rather not answer.

A passage is cited where it has enough of an answer's words, which is no proof. How far that can be trusted is counted: how often answers
that are right are cited, and how often those that are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from llm_from_scratch.data.questions import Question
from llm_from_scratch.evaluation.calibration import by_topic
from llm_from_scratch.evaluation.generation import token_f1
from llm_from_scratch.evaluation.retrieval import Reply, rank_means, ranks_of_answers
from llm_from_scratch.retrieval.grounding import checked, content_words
from llm_from_scratch.retrieval.index import Index, Mode

RIGHT = 0.5
"""F1 from which an answer is right; a wrong one has no content word of the wanted answer."""


def search_limits(index: Index, questions: Sequence[Question]) -> dict[str, Any]:
    """`topics`, with recall_at_1 of fused search; `described`, the `rank_means` of each way to search; and `refused`, a share."""
    ranks = np.array(ranks_of_answers(index, questions, "fused"))
    described = [replace(question, question=question.answer) for question in questions]
    least = index.params.search.minimum_evidence
    return {
        "topics": by_topic(questions, {"recall_at_1": (ranks == 1).astype(np.float64)}),
        "described": {mode: rank_means(ranks_of_answers(index, described, mode)) for mode in get_args(Mode)},
        "refused": float(np.mean([index.find(question.question, 1).evidence < least for question in questions])),
    }


def citations(questions: Sequence[Question], replies: Sequence[Reply], sources: Sequence[Sequence[str]], least: float) -> dict[str, float]:
    """Of `replies` by their `sources`: how many are `right` and `wrong` (see RIGHT; the others are neither), and the shares of both that
    cite a source, `right_cited` and `wrong_cited`; `least` is the support that it takes.
    """
    rows = list(zip(questions, replies, sources, strict=True))
    cited = np.array([bool(checked(reply.text, question.question, read, least)[1]) for question, reply, read in rows])
    right = np.array([token_f1(reply.text, question.answer) >= RIGHT for question, reply, _ in rows])
    wrong = np.array([not content_words(reply.text) & content_words(question.answer) for question, reply, _ in rows])
    found = {"right": right, "wrong": wrong}
    return {name: float(which.sum()) for name, which in found.items()} | {
        f"{name}_cited": float(cited[which].mean()) if which.any() else 0.0 for name, which in found.items()
    }
