"""What a model writes when asked, scored against what a person wrote.

Exact match and token F1 are SQuAD's (Rajpurkar et al. 2016): case, punctuation and articles do not count. Both are strict with a right
answer in other words; a likelihood over given choices is kinder to a small model.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from llm_from_scratch.data.chat import ChatRecord, Message, question_messages
from llm_from_scratch.data.questions import Question
from llm_from_scratch.inference.decoding import prompt_limit
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.tokenizer.chat import render

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Progress = Callable[[Iterable["Task"]], Iterable["Task"]]


@dataclass(frozen=True)
class Task:
    """A conversation that waits for its answer, and the answer that is wanted."""

    messages: list[Message]
    wanted: str


@dataclass(frozen=True)
class Exam:
    """The answers to some tasks, and their mean scores, each from 0 to 1."""

    answers: list[str]
    exact_match: float
    f1: float


def task_of(question: Question, with_passage: bool) -> Task:
    """The question as it is put to a model, with the passage that holds its answer or without."""
    return Task(question_messages(question.question, [question.passage] if with_passage else []), question.answer)


def task_of_record(record: ChatRecord) -> Task:
    """A record whose last answer is asked for instead of shown."""
    *asked, answer = record["messages"]
    return Task(asked, answer["content"])


def fitting(tasks: Sequence[Task], engine: Engine, max_tokens: int) -> list[Task]:
    """Those tasks that leave the engine's model room for an answer of `max_tokens`."""
    limit = prompt_limit(engine.model)
    return [task for task in tasks if limit is None or len(render(task.messages, engine.tokenizer, prompt=True)[0]) + max_tokens <= limit]


def answers(engine: Engine, tasks: Sequence[Task], max_tokens: int, progress: Progress = iter) -> list[str]:
    """The engine's greedy answer to each task, at most `max_tokens` long. `progress` wraps the tasks, as tqdm does."""
    greedy = Sampling(temperature=0, max_tokens=max_tokens)
    return ["".join(piece.text for piece in engine.chat(task.messages, greedy)).strip() for task in progress(tasks)]


def examine(engine: Engine, tasks: Sequence[Task], max_tokens: int, progress: Progress = iter) -> Exam:
    """Ask each task and score what comes back. Raises ValueError when there is nothing to ask."""
    if not tasks:
        raise ValueError("no tasks to examine the model with; ask at least one question")
    found = answers(engine, tasks, max_tokens, progress)
    pairs = [(answer, task.wanted) for answer, task in zip(found, tasks, strict=True)]
    return Exam(found, fmean(exact_match(*pair) for pair in pairs), fmean(token_f1(*pair) for pair in pairs))


def exact_match(found: str, wanted: str) -> bool:
    """Whether the two are the same words in the same order."""
    return normalized(found) == normalized(wanted)


def token_f1(found: str, wanted: str) -> float:
    """The harmonic mean of precision and recall over words, each word counted as often as it stands."""
    ours, theirs = normalized(found).split(), normalized(wanted).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
