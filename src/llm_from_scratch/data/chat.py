"""Chat records: what a base model is shown to become one that answers.

Every encyclopedia entry has a title, an introduction, a one-line description and a field, all written by people, so each one gives up to
three records whose answers are real: `describe` (answer from memory), `topic` (classify) and `read` (answer from a passage put before the
question; half of the time beside a passage about something else, so that reading means choosing).

`question_messages` is the one form in which a question meets its passages: training, evaluation, retrieval and serving all use it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from llm_from_scratch.data.documents import Document, with_splits

Role = Literal["system", "user", "assistant"]

# Part of the prompt's form, so it is the same wherever passages are put before a question.
PASSAGE_CHARACTERS = 400

WHAT = ("What is {}?", "In a few words, what is {}?", "Describe {} in a few words.", "Tell me briefly: what is {}?")
WHO = ("Who is {}?", "In a few words, who is {}?", "Describe {} in a few words.", "Tell me briefly: who is {}?")
FIELD = ("Which field does {} belong to?", "What is the field of {}?", "Name the field that {} belongs to.")

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


class Message(TypedDict):
    """One turn. A system message holds the passages to answer from."""

    role: Role
    content: str


class ChatRecord(TypedDict):
    """A conversation that ends in the answer to learn."""

    id: str
    kind: str
    messages: list[Message]


class RecordError(ValueError):
    """A file of chat records has bad lines. The message is one line and names each."""


def question_messages(question: str, passages: Sequence[str]) -> list[Message]:
    """The question as a conversation that waits for its answer, the passages (if any) before it as the system message."""
    asked: Message = {"role": "user", "content": question}
    if not passages:
        return [asked]
    return [{"role": "system", "content": "\n\n".join(passages)}, asked]


def question_about(document: Document) -> str:
    """The plain question that the document's description answers."""
    return _questions(document)[0].format(document.title)


def passage(text: str, characters: int = PASSAGE_CHARACTERS) -> str:
    """The first sentences of `text` that fit in `characters`, or its first words where not even one sentence does."""
    text = text.strip()
    if len(text) <= characters:
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() <= characters]
    return text[: ends[-1]] if ends else text[: characters + 1].rsplit(maxsplit=1)[0]


def records(documents: Sequence[Document], seed: int, passage_characters: int = PASSAGE_CHARACTERS) -> list[ChatRecord]:
    """Chat records of these documents alone: pass one split, and distractors come from it too.

    Entries without a description are left out. The same documents and seed always give the same records.
    """
    entries = [document for document in documents if document.description]
    made: list[ChatRecord] = []
    for entry in entries:
        rng = random.Random(f"{seed}:{entry.id}")
        made.append(_describe(entry, rng))
        if entry.topic and entry.topic != "Uncategorized":
            made.append(_topic(entry, rng))
        made.append(_read(entry, entries, rng, passage_characters))
    return made


def read_records(path: Path) -> list[ChatRecord]:
    """Chat records from JSON lines. Raises RecordError naming every bad line (the first five in full): all are good, or none is used."""
    lines = [(number, line) for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    found: list[ChatRecord] = []
    faults: list[str] = []
    for number, line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            faults.append(f"line {number}: not JSON ({error.msg})")
            continue
        if fault := _fault(record):
            faults.append(f"line {number}: {fault}")
        else:
            found.append(record)
    if faults or not found:
        raise RecordError(f"{path}: {_summary(faults, len(lines))}; correct the file, then run the stage again")
    return found


def split_records(chat_records: Sequence[ChatRecord], share: float) -> tuple[list[ChatRecord], list[ChatRecord]]:
    """(to train on, held out), by a hash of the id as documents are split; each has at least one where there are two and a share."""
    split = with_splits([Document(record["id"], "", "") for record in chat_records], share)
    sides: dict[str, list[ChatRecord]] = {"train": [], "validation": []}
    for record, document in zip(chat_records, split, strict=True):
        sides[document.split].append(record)
    return sides["train"], sides["validation"]


def write_records(path: Path, chat_records: Sequence[ChatRecord]) -> None:
    """The records as JSON lines, as `read_records` reads them."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in chat_records), encoding="utf-8")


def _questions(document: Document) -> tuple[str, ...]:
    return WHO if document.topic == "People" else WHAT


def _record(entry: Document, kind: str, prompt: list[Message], answer: str) -> ChatRecord:
    return {"id": f"{entry.id}:{kind}", "kind": kind, "messages": [*prompt, {"role": "assistant", "content": answer}]}


def _describe(entry: Document, rng: random.Random) -> ChatRecord:
    question = rng.choice(_questions(entry)).format(entry.title)
    return _record(entry, "describe", question_messages(question, []), entry.description)


def _topic(entry: Document, rng: random.Random) -> ChatRecord:
    question = rng.choice(FIELD).format(entry.title)
    return _record(entry, "topic", question_messages(question, []), entry.topic)


def _read(entry: Document, entries: Sequence[Document], rng: random.Random, characters: int) -> ChatRecord:
    """Two passages share the room of one, so that a record is about as long with a distractor as without."""
    texts = [entry.text]
    if rng.random() < 0.5 and len(entries) > 1:
        other = rng.choice(entries)
        while other.id == entry.id:
            other = rng.choice(entries)
        texts.insert(rng.randrange(2), other.text)
    passages = [passage(text, characters // len(texts)) for text in texts]
    question = rng.choice(_questions(entry)).format(entry.title)
    return _record(entry, "read", question_messages(question, passages), entry.description)


def _fault(record: Any) -> str:
    """What keeps a parsed line from being a chat record, or nothing."""
    if not isinstance(record, dict) or set(record) != {"id", "kind", "messages"}:
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        return f"found {keys or 'nothing'}, wanted an object of id, kind and messages"
    for key in ("id", "kind"):
        if not isinstance(record[key], str) or not record[key]:
            return f"{key}: found {record[key]!r}, wanted some text"
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        return "messages: wanted a list that ends in the assistant's answer"
    return next(_message_faults(messages), "")


def _message_faults(messages: list[Any]) -> Iterator[str]:
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            yield f"messages[{place}]: wanted an object of role and content"
            return
        if message["role"] not in get_args(Role):
            yield f"messages[{place}].role: found {message['role']!r}, wanted {', '.join(get_args(Role))}"
        if not isinstance(message["content"], str) or not message["content"].strip():
            yield f"messages[{place}].content: found {message['content']!r}, wanted some text"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        yield f"messages: found the turns {', '.join(map(str, roles))}; wanted user and assistant in turn, a system message only first"


def _summary(faults: list[str], count: int) -> str:
    if not faults:
        return "found no records"
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return f"{len(faults)} of {count} records are bad: {'; '.join(faults[:5])}{more}"
