"""Preferences: a prompt and two answers to it, of which somebody liked one better.

Read in the shapes that people have them in: `prompt`, `chosen` and `rejected` as text; whole dialogues that part in their last answer
(hh-rlhf's "Human:" and "Assistant:"); and lists of messages (UltraFeedback). A prompt that is text is gone on with as it is, one
that is a conversation is answered as an assistant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_from_scratch.data.chat import Message, RecordError, bad_records, record_files

TURN = re.compile(r"\n\n(Human|Assistant): ?")
ROLE = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """`prompt` is a text to go on with or a conversation to answer."""

    prompt: str | list[Message]
    chosen: str
    rejected: str


def read_preferences(path: Path) -> list[Preference]:
    """Preferences from JSON lines, in any of the shapes above. Raises RecordError naming every bad line: all are good, or none is used.

    A line whose two answers are the same says nothing, and is a bad one.
    """
    found: list[Preference] = []
    faults: list[str] = []
    lines = [(number, line) for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1) if line.strip()]
    for number, line in lines:
        try:
            found.append(_preference(json.loads(line)))
        except json.JSONDecodeError as error:
            faults.append(f"line {number}: not JSON ({error.msg})")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults or not found:
        raise RecordError(f"{path}: {bad_records(faults, len(lines))}; correct the file, then run the stage again")
    return found


def gather_preferences(place: Path) -> list[Preference]:
    """The preferences of one .jsonl file, or of all in a folder. Raises RecordError as `read_preferences` does."""
    return [one for path in record_files(place) for one in read_preferences(path)]


def holds_preferences(place: Path) -> bool:
    """Whether the first line of the first .jsonl file speaks of a chosen answer, and not of a conversation alone."""
    with record_files(place)[0].open(encoding="utf-8-sig") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        return "chosen" in json.loads(line)
    except (json.JSONDecodeError, TypeError):
        return False


def write_preferences(path: Path, preferences: Sequence[Preference]) -> None:
    """The preferences as JSON lines, as `read_preferences` reads them."""
    path.write_text("".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in preferences), encoding="utf-8")


def _preference(record: Any) -> Preference:
    """One parsed line. Raises ValueError saying what is wrong with it."""
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        raise ValueError("wanted an object with chosen and rejected")
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        made = _from_dialogues(list(_messages(chosen, "chosen")), list(_messages(rejected, "rejected")))
    elif prompt is None:
        made = _from_dialogues(_turns(chosen, "chosen"), _turns(rejected, "rejected"))
    else:
        asked = list(_messages(prompt, "prompt")) if isinstance(prompt, list) else _text(prompt, "prompt")
        made = Preference(asked, _text(chosen, "chosen"), _text(rejected, "rejected"))
    if made.chosen == made.rejected:
        raise ValueError("chosen and rejected are the same")
    return made


def _from_dialogues(chosen: list[Message], rejected: list[Message]) -> Preference:
    """Two conversations that are one up to the assistant's last answer."""
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise ValueError("chosen and rejected must be the same conversation up to their last answer")
    if any(messages[-1]["role"] != "assistant" for messages in (chosen, rejected)):
        raise ValueError("chosen and rejected must end in the assistant's answer")
    return Preference(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _messages(found: list[Any], name: str) -> Iterator[Message]:
    for place, message in enumerate(found):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{name}[{place}]: wanted an object of role (system, user or assistant) and content")
        yield {"role": message["role"], "content": _text(message.get("content"), f"{name}[{place}].content")}


def _turns(found: Any, name: str) -> list[Message]:
    """hh-rlhf's one text as messages."""
    _, *parts = TURN.split(_text(found, name))
    if not parts:
        raise ValueError(f"{name}: wanted a dialogue with Human: and Assistant:, or a prompt beside it")
    speakers, said = parts[::2], parts[1::2]
    return [{"role": ROLE[speaker], "content": text.strip()} for speaker, text in zip(speakers, said, strict=True)]  # type: ignore[typeddict-item]


def _text(found: Any, name: str) -> str:
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"{name}: found {found!r}, wanted some text")
    return found
