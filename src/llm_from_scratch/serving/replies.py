"""Answers of the OpenAI API: whole, or a frame at a time as server-sent events.

A stream that ended well ends in [DONE]. One that failed ends in a frame with an `error`, and there is neither a [DONE] after it nor a
`finish_reason` in the answers it cut off, so that nobody can take them for complete; OpenAI's clients raise at that frame.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from llm_from_scratch.inference.sampling import TokenLogprob
from llm_from_scratch.serving.logprobs import Names, chat_logprobs, completion_logprobs

DONE = "data: [DONE]\n\n"
"""The last frame of a stream that ended well."""


class Usage(TypedDict):
    """Tokens of the prompt, of the answer, and both."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


def frame(fields: Mapping[str, Any]) -> str:
    """One server-sent event, on one line: JSON escapes every line break."""
    return f"data: {json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


@dataclass(frozen=True)
class Delta:
    """More of one answer: text that begins `offset` characters into it, and the tokens read since the last one.

    A token comes without its log probability where it is the first of all. Only the last delta has a `finish_reason`; the counts of tokens
    are up to date in each. `annotations` are those of the whole text, None where nobody asked for any.
    """

    text: str
    offset: int = 0
    tokens: tuple[tuple[int, TokenLogprob | None], ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    annotations: tuple[dict[str, Any], ...] | None = None


def merged(deltas: Sequence[Delta]) -> Delta:
    """Deltas that follow each other as one."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return Delta(
        text="".join(delta.text for delta in deltas),
        offset=deltas[0].offset,
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        finish_reason=last.finish_reason,
        prompt_tokens=last.prompt_tokens,
        completion_tokens=last.completion_tokens,
        annotations=last.annotations,
    )


@dataclass(frozen=True)
class Reply:
    """The envelope that all answers to one request share: `choices` of them for each prompt, one prompt after another.

    `names` spells tokens where log probabilities were asked for, and is None where not.
    """

    form: Literal["completion", "chat"]
    model: str
    fingerprint: str
    choices: int = 1
    names: Names | None = None
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, answers: Sequence[Delta]) -> dict[str, Any]:
        """The answers in one piece, in the order of their parts."""
        kind = "chat.completion" if self.form == "chat" else "text_completion"
        return {
            **self._envelope(kind),
            "choices": [self._whole(*numbered) for numbered in enumerate(answers)],
            "usage": self.counted(answers),
        }

    def counted(self, answers: Sequence[Delta]) -> Usage:
        """What they took together; a prompt counts once, however many answers it got."""
        return usage(sum(answer.prompt_tokens for answer in answers[:: self.choices]), sum(answer.completion_tokens for answer in answers))

    def opening(self, place: int) -> str:
        """The frame before any text of an answer: a chat says who speaks."""
        return self._chunk(place, {"delta": {"role": "assistant", "content": ""}}) if self.form == "chat" else ""

    def more(self, place: int, delta: Delta) -> str:
        """The frames with more of an answer, and with why it ended when it did."""
        frames = ""
        if delta.text or delta.annotations is not None:
            said: dict[str, Any] = {"text": delta.text}
            if self.form == "chat":
                said = {"delta": {"content": delta.text, **_noted(delta)}}
            frames = self._chunk(place, said, delta)
        if delta.finish_reason is not None:
            ended: dict[str, Any] = {"text": ""} if self.form == "completion" else {"delta": {}}
            left = delta if not frames and delta.tokens else None
            frames += self._chunk(place, ended, left, delta.finish_reason)
        return frames

    def closing(self, answers: Sequence[Delta]) -> str:
        """The frames after all answers: what they took, if that was asked for, and the end."""
        counted = frame({**self._envelope(self._chunk_object), "choices": [], "usage": self.counted(answers)}) if self.include_usage else ""
        return counted + DONE

    def _whole(self, place: int, answer: Delta) -> dict[str, Any]:
        said: dict[str, Any] = {"text": answer.text}
        if self.form == "chat":
            said = {"message": {"role": "assistant", "content": answer.text, "refusal": None, **_noted(answer)}}
        return {"index": place, **said, "finish_reason": answer.finish_reason, "logprobs": self._logprobs(answer)}

    def _chunk(self, place: int, said: Mapping[str, Any], delta: Delta | None = None, finish_reason: str | None = None) -> str:
        choice = {"index": place, **said, "finish_reason": finish_reason, "logprobs": self._logprobs(delta)}
        uncounted = {"usage": None} if self.include_usage else {}
        return frame({**self._envelope(self._chunk_object), "choices": [choice], **uncounted})

    def _logprobs(self, delta: Delta | None) -> dict[str, Any] | None:
        if self.names is None or delta is None:
            return None
        if self.form == "chat":
            return chat_logprobs(delta.tokens, self.names)
        return completion_logprobs(delta.tokens, self.names, delta.offset)

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.form == "chat" else "text_completion"

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.form == 'chat' else 'cmpl'}-{self.key}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def model_card(name: str, digest: str | None = None) -> dict[str, Any]:
    """An entry of GET /v1/models; `digest` is that of the bundle behind it, where it is known."""
    card = {"id": name, "object": "model", "created": 0, "owned_by": "llm-from-scratch"}
    return card if digest is None else card | {"digest": digest}


def _noted(delta: Delta) -> dict[str, Any]:
    return {} if delta.annotations is None else {"annotations": list(delta.annotations)}
