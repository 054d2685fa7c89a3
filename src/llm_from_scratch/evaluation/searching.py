"""Where search fails. Questions that name their entry are its easy case, so it is asked in two harder ways as well.

By field: some names are shared by more things than others. By description: "1968 film by Stanley Kubrick" instead of the title, with hardly
a word in common with what is sought; many descriptions fit several entries, so nobody could find all. And refusal: how often a question
that has a passage is so far from the nearest that the service would rather not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from llm_from_scratch.data.questions import Question
from llm_from_scratch.evaluation.calibration import by_topic
from llm_from_scratch.evaluation.retrieval import rank_means, ranks_of_answers
from llm_from_scratch.retrieval.index import Index, Mode


def search_limits(index: Index, questions: Sequence[Question]) -> dict[str, Any]:
    """`topics`, with recall_at_1 of fused search; `described`, the `rank_means` of each way to search; and `refused`, a share."""
    ranks = np.array(ranks_of_answers(index, questions, "fused"))
    described = [replace(question, question=question.answer) for question in questions]
    nearest = index.search_all([question.question for question in questions], 1, "dense")
    least = index.params.search.minimum_similarity
    return {
        "topics": by_topic(questions, {"recall_at_1": (ranks == 1).astype(np.float64)}),
        "described": {mode: rank_means(ranks_of_answers(index, described, mode)) for mode in get_args(Mode)},
        "refused": float(np.mean([not hits or hits[0].score < least for hits in nearest])),
    }
