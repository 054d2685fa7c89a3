"""Lessons in reading: a passage and questions whose answers stand in it, for a model that is still learning the language.

Descriptions alone teach the form of an answer, because much of one can be guessed without the passage. So two exercises stand beside it
whose answers cannot: how a sentence goes on, and which words there are. Whoever wants them right has to look, and looking is what then
helps with the description. Passages are short, as each costs its length again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from llm_from_scratch.data.chat import ChatRecord, Message, asked_about, passage, question_messages
from llm_from_scratch.data.documents import Document

GO_ON = "How does it go on: {}"
WORDS = "Which words are in it?"
QUOTED = 12  # words of a sentence, of which the first one to three are given
NAMED = 8  # words
STRANGERS = 0.3  # of the lessons have a passage about something else beside theirs

_SENTENCES = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[\w'-]+")
_SHORTEST_SENTENCE = 30  # characters
# The commonest words of English; they stand in every passage, so naming them shows nothing.
_COMMON = frozenset(
    [
        "the",
        "a",
        "an",
        "of",
        "in",
        "and",
        "to",
        "is",
        "was",
        "are",
        "were",
        "for",
        "on",
        "by",
        "as",
        "with",
        "from",
        "it",
        "its",
        "at",
        "that",
        "which",
        "or",
        "be",
        "this",
        "his",
        "her",
        "also",
        "has",
        "have",
        "had",
        "not",
        "but",
        "he",
        "she",
        "they",
        "their",
        "who",
        "been",
        "one",
        "most",
    ]
)


def lessons(documents: Sequence[Document], seed: int, passage_characters: int) -> list[ChatRecord]:
    """A conversation for each document with a description: its passage, then up to three questions in any order. Deterministic.

    Pass one split: the passages beside it come from the same documents.
    """
    entries = [document for document in documents if document.description]
    return [_lesson(entry, entries, random.Random(f"{seed}:{entry.id}"), passage_characters) for entry in entries]


def _lesson(entry: Document, entries: Sequence[Document], rng: random.Random, characters: int) -> ChatRecord:
    texts = [entry.text]
    if rng.random() < STRANGERS:
        texts.insert(rng.randrange(2), rng.choice(entries).text)
    passages = [passage(text, characters // len(texts)) for text in texts]
    turns = [(asked_about(entry, rng), entry.description), *_gone_on(passages, rng), *_named(passages, rng)]
    rng.shuffle(turns)
    (first, answer), *others = turns
    messages: list[Message] = [*question_messages(first, passages), {"role": "assistant", "content": answer}]
    for question, answer in others:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"{entry.id}:lesson", "kind": "lesson", "messages": messages}


def _gone_on(passages: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """A stretch of a sentence, its first words the question."""
    sentences = [sentence for text in passages for sentence in _SENTENCES.split(text) if len(sentence) > _SHORTEST_SENTENCE]
    if not sentences:
        return []
    words = rng.choice(sentences).split()
    start, given = rng.randrange(max(1, len(words) - QUOTED)), rng.randint(1, 3)
    stretch = words[start : start + QUOTED]
    return [(GO_ON.format(" ".join(stretch[:given])), " ".join(stretch[given:]))] if len(stretch) > given else []


def _named(passages: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """Some of the words that say what the passages are about."""
    words = [word for word in dict.fromkeys(_WORD.findall(" ".join(passages))) if word.lower() not in _COMMON]
    return [(WORDS, " ".join(rng.sample(words, NAMED)))] if len(words) > NAMED else []
