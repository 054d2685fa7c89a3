"""Questions with known answers, made from documents that no model was trained on.

Each asks what an entry is; the right answer is its description, and the wrong choices are descriptions of other entries of the same field,
so that naming the field alone does not win. A model that reads does better with the entry's passage than without.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llm_from_scratch.data.chat import PASSAGE_CHARACTERS, passage, question_about
from llm_from_scratch.data.documents import Document


@dataclass(frozen=True)
class Question:
    """A question, its answer among `choices` (shuffled), and the passage of the document that holds the answer."""

    id: str
    question: str
    answer: str
    choices: tuple[str, ...]
    passage: str
    document: str
    topic: str


def questions(
    documents: Sequence[Document], count: int, choices: int, seed: int, passage_characters: int = PASSAGE_CHARACTERS
) -> list[Question]:
    """Up to `count` questions on `documents` (pass the held-out ones), each with `choices` distinct choices of one topic.

    Entries without a description, or of a topic with too few others, are left out. Deterministic. Raises ValueError when none is left.
    """
    entries = [document for document in documents if document.description]
    by_topic: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in entries:
        by_topic[entry.topic].setdefault(entry.description.casefold(), entry.description)
    usable = [entry for entry in entries if len(by_topic[entry.topic]) >= choices]
    if not usable:
        raise ValueError(
            f"no question can be made: found {len(entries)} of {len(documents)} documents with a description, "
            f"wanted {choices} different ones in a topic; hold out more documents (sources.*.validation)"
        )
    random.Random(seed).shuffle(usable)
    return [_question(entry, list(by_topic[entry.topic].values()), choices, seed, passage_characters) for entry in usable[:count]]


def _question(entry: Document, descriptions: list[str], choices: int, seed: int, characters: int) -> Question:
    rng = random.Random(f"{seed}:{entry.id}")
    others = [description for description in descriptions if description.casefold() != entry.description.casefold()]
    offered = [entry.description, *rng.sample(others, choices - 1)]
    rng.shuffle(offered)
    return Question(
        id=f"{entry.id}:question",
        question=question_about(entry),
        answer=entry.description,
        choices=tuple(offered),
        passage=passage(entry.text, characters),
        document=entry.id,
        topic=entry.topic,
    )
