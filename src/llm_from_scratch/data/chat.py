"""Chat records: what a base model is shown to become one that answers.

Every encyclopedia entry has a title, an introduction, a one-line description and a field, all written by people, so each one gives up to
three records whose answers are real: `describe` (answer from memory), `topic` (classify) and `read` (answer from a passage put before the
question; half of the time beside a passage about something else, so that reading means choosing).

`question_messages` is the one form in which a question meets its passages: training, evaluation, retrieval and serving all use it.

Conversations that people have already are read from JSON lines in the three shapes that are common: lists of messages, Alpaca's
instruction, input and output, and pairs of prompt and completion.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from llm_from_scratch.data.documents import Document, with_splits

Role = Literal["system", "user", "assistant"]

# Part of the prompt's form, so it is the same wherever passages are put before a question.
PASSAGE_CHARACTERS = 240

WHAT = ("What is {}?", "In a few words, what is {}?", "Describe {} in a few words.", "Tell me briefly: what is {}?")
WHO = ("Who is {}?", "In a few words, who is {}?", "Describe {} in a few words.", "Tell me briefly: who is {}?")
FIELD = ("Which field does {} belong to?", "What is the field of {}?", "Name the field that {} belongs to.")

PAIRS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"))
"""What a question and its answer are called in a record without messages. Beside an instruction there may be an `input` to work on."""
SHAPES = "messages, instruction and output, prompt and completion, or prompt and response"

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


def asked_about(document: Document, rng: random.Random) -> str:
    """One of the questions that the document's description answers."""
    return rng.choice(_questions(document)).format(document.title)


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
    """Chat records from JSON lines of `messages`, of `instruction`, `input` and `output`, or of `prompt` and `completion` (or `response`).

    Where a line has no `id`, one is made of its content; other keys are left aside. Raises RecordError naming every bad line (the first
    five in full): all are good, or none is used.
    """
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()]
    found: list[ChatRecord] = []
    faults: list[str] = []
    for number, line in lines:
        try:
            found.append(_parsed(line))
        except RecordError as fault:
            faults.append(f"line {number}: {fault}")
    if faults or not found:
        raise RecordError(f"{path}: {bad_records(faults, len(lines))}; correct the file, then run the stage again")
    return found


def gather_records(place: Path) -> list[ChatRecord]:
    """The chat records of one .jsonl file, or of all in a folder, in the order of their paths.

    Raises RecordError as `read_records` does, and for a place with no such file.
    """
    return [record for path in record_files(place) for record in read_records(path)]


def record_files(place: Path) -> list[Path]:
    """The .jsonl file at `place`, or all in that folder, in the order of their paths. Raises RecordError where there is none."""
    paths = [place] if place.is_file() else sorted(path for path in place.rglob("*.jsonl") if path.is_file())
    if not paths:
        raise RecordError(f"{place}: found no .jsonl file, wanted one of chat records or a folder of them; correct the path in params.yaml")
    return paths


def split_records(chat_records: Sequence[ChatRecord], share: float) -> tuple[list[ChatRecord], list[ChatRecord]]:
    """(to train on, held out), by a hash of the first question, as documents are split by one of their id.

    So a question that stands in several records is never asked of a model that was trained on it. Each side has something where there are
    two questions and a share.
    """
    asked = [next(message["content"] for message in record["messages"] if message["role"] == "user") for record in chat_records]
    split = with_splits([Document(question, "", "") for question in dict.fromkeys(asked)], share)
    held_out = {document.id for document in split if document.split == "validation"}
    sides: tuple[list[ChatRecord], list[ChatRecord]] = ([], [])
    for question, record in zip(asked, chat_records, strict=True):
        sides[question in held_out].append(record)
    return sides


def write_records(path: Path, chat_records: Sequence[ChatRecord]) -> None:
    """The records as JSON lines, as `read_records` reads them."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in chat_records), encoding="utf-8")


def _questions(document: Document) -> tuple[str, ...]:
    return WHO if document.topic == "People" else WHAT


def _record(entry: Document, kind: str, prompt: list[Message], answer: str) -> ChatRecord:
    return {"id": f"{entry.id}:{kind}", "kind": kind, "messages": [*prompt, {"role": "assistant", "content": answer}]}


def _describe(entry: Document, rng: random.Random) -> ChatRecord:
    question = asked_about(entry, rng)
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
    question = asked_about(entry, rng)
    return _record(entry, "read", question_messages(question, passages), entry.description)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8, then run the stage again") from None


def _parsed(line: str) -> ChatRecord:
    """The chat record on a line. Raises RecordError saying what keeps it from being one."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise RecordError(f"found {type(row).__name__}, wanted an object of {SHAPES}")
    for key in ("id", "kind"):
        if key in row:
            _require_text(row, key)
    messages: Any = row["messages"] if "messages" in row else _turns(row)
    if not isinstance(messages, list) or not messages:
        raise RecordError("messages: wanted a list that ends in the assistant's answer")
    if fault := next(_message_faults(messages), ""):
        raise RecordError(fault)
    return {"id": row.get("id") or _name(messages), "kind": row.get("kind", "chat"), "messages": messages}


def _turns(row: Mapping[str, Any]) -> list[Message]:
    """The question and the answer of a record that has no messages. What an instruction is to work on stands below it."""
    pair = next((pair for pair in PAIRS if row.keys() >= set(pair)), None)
    if pair is None:
        raise RecordError(f"found {', '.join(sorted(row)) or 'nothing'}, wanted {SHAPES}")
    for key in pair:
        _require_text(row, key)
    asked, answered = (row[key] for key in pair)
    if pair[0] == "instruction" and row.get("input"):
        _require_text(row, "input")
        asked = f"{asked}\n\n{row['input']}"
    return [*question_messages(asked, []), {"role": "assistant", "content": answered}]


def _require_text(row: Mapping[str, Any], key: str) -> None:
    if not isinstance(row[key], str) or not row[key].strip():
        raise RecordError(f"{key}: found {row[key]!r}, wanted some text")


def _name(messages: Sequence[Message]) -> str:
    """An id made of what is said: the same conversation has the same one in any file and place."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


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


def bad_records(faults: list[str], count: int) -> str:
    """One line about a file of `count` records: the first five faults in full, and how many more there are."""
    if not faults:
        return "found no records"
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return f"{len(faults)} of {count} records are bad: {'; '.join(faults[:5])}{more}"
