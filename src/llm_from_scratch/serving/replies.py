"""Answers of the OpenAI API: whole, or a frame at a time as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

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
    return f"data: {json.dumps(fields, ensure_ascii=False, separators=(',', ':'))}\n\n"


@dataclass(frozen=True)
class Reply:
    """The envelope that all parts of one answer share: an id, a time, the model's name and its fingerprint."""

    form: Literal["completion", "chat"]
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, text: str, finish_reason: str, tokens: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        if self.form == "chat":
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            return {**self._envelope("chat.completion"), "choices": [_choice(said, finish_reason)], "usage": tokens}
        return {**self._envelope("text_completion"), "choices": [_choice({"text": text}, finish_reason)], "usage": tokens}

    def opening(self) -> list[str]:
        """The frames before any text: a chat says who speaks."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)] if self.form == "chat" else []

    def text(self, text: str) -> str:
        """A frame with more of the answer."""
        return self._chunk({"delta": {"content": text}} if self.form == "chat" else {"text": text}, None)

    def closing(self, finish_reason: str, tokens: Usage | None) -> list[str]:
        """The frames after the text: why it ended, and what it took if that was asked for."""
        last = self._chunk({"delta": {}} if self.form == "chat" else {"text": ""}, finish_reason)
        counted = [frame({**self._envelope(self._chunk_object), "choices": [], "usage": tokens})] if tokens else []
        return [last, *counted, DONE]

    def _chunk(self, said: dict[str, Any], finish_reason: str | None) -> str:
        return frame({**self._envelope(self._chunk_object), "choices": [_choice(said, finish_reason)]})

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


def model_card(name: str) -> dict[str, Any]:
    """An entry of GET /v1/models."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "llm-from-scratch"}


def _choice(said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, **said, "finish_reason": finish_reason, "logprobs": None}
