"""From a corpus to two sides: what is learned, and what is held out, on which nobody has practised.

A corpus holds documents, of which records and prompts are made, or files of people: chat records, or preferences.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llm_from_scratch.data.chat import PASSAGE_CHARACTERS, ChatRecord, read_records, records, split_records
from llm_from_scratch.data.documents import DOCUMENTS, Document, Split, read_documents, with_splits
from llm_from_scratch.data.lessons import lessons
from llm_from_scratch.data.preferences import Preference, read_preferences
from llm_from_scratch.data.questions import questions
from llm_from_scratch.evaluation.generation import Task, task_of, task_of_record
from llm_from_scratch.finetune.pairs import encode_prompt, openings
from llm_from_scratch.tokenizer.base import Tokenizer

SPLITS: tuple[Split, Split] = ("train", "validation")


def conversations(corpus: Path, share: float, seed: int) -> tuple[list[ChatRecord], list[ChatRecord], list[Task]]:
    """(to learn, held out, to ask): made from a corpus' documents, or, where it holds only files, the chat records in them as they are.

    Lessons in reading stand among what is learned, or what the base was taught of it fades.
    """
    if (corpus / DOCUMENTS).exists():
        train, held_out = (list(read_documents(corpus, split)) for split in SPLITS)
        asked = questions(held_out, len(held_out), choices=1, seed=seed)
        taught = [*records(train, seed), *lessons(train, seed, PASSAGE_CHARACTERS)]
        return taught, records(held_out, seed), [task_of(question, with_passage=True) for question in asked]
    found = [record for path in sorted(corpus.rglob("*.jsonl")) for record in read_records(path)]
    learnable, tested = split_records(found, share)
    return learnable, tested, [task_of_record(record) for record in tested]


def split_preferences(corpus: Path, share: float) -> tuple[list[Preference], list[Preference]]:
    """(to learn, held out): the preferences in a corpus' files, those to one prompt on the same side.

    Raises RecordError for a bad line, and ValueError where one side would have none.
    """
    found = [one for path in sorted(corpus.rglob("*.jsonl")) for one in read_preferences(path)]
    prompts = {json.dumps(one.prompt): None for one in found}
    split = with_splits([Document(prompt, "", "") for prompt in prompts], share)
    held_out = {document.id for document in split if document.split == "validation"}
    sides: tuple[list[Preference], list[Preference]] = ([], [])
    for one in found:
        sides[json.dumps(one.prompt) in held_out].append(one)
    if not all(sides):
        found_there = f"{len(held_out)} of {len(prompts)} prompts of the preferences in {corpus.name} are held out"
        raise ValueError(f"{found_there}, wanted some on each side; change sources.{corpus.name}.validation, now {share}, or give more")
    return sides


def answerable(preferences: Sequence[Preference], words: Tokenizer, room: int) -> list[list[int]]:
    """The prompts that leave room for an answer, each once, as ids of `room` tokens at most. Raises ValueError where none does."""
    encoded = dict.fromkeys(tuple(encode_prompt(one.prompt, words)[0]) for one in preferences)
    if not (found := [list(ids) for ids in encoded if len(ids) <= room]):
        raise ValueError(f"none of {len(encoded)} prompts has at most {room} tokens, so that an answer has room; lower answer_tokens")
    return found


def prompts_of(
    corpus: Path, words: Tokenizer, tokens: int, seed: int, most: int | None, tested: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(to learn from, to measure on): beginnings of the documents of each side, `most` (None: all) and `tested` of them at most.

    Raises ValueError where a side has none that is long enough.
    """
    rng = random.Random(seed)
    sides: list[list[list[int]]] = []
    for split, wanted in zip(SPLITS, (most, tested), strict=True):
        found = openings((document.text for document in read_documents(corpus, split)), words, tokens)
        if not found:
            raise ValueError(f"no {split} document of {corpus.name} is longer than {tokens} tokens; lower prompt_tokens")
        sides.append(rng.sample(found, min(len(found), wanted or len(found))))
    return sides[0], sides[1]


def ids_of(texts: Sequence[str], words: Tokenizer) -> np.ndarray:
    """The texts as one row of ids, each behind its end."""
    ends = np.array([words.eot], dtype=np.uint32)
    return np.concatenate([part for ids in words.encode_batch(texts) for part in (ids, ends)]).astype(np.int64)
