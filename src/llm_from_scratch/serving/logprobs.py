"""Log probabilities in the two shapes that OpenAI's API has for them: parallel lists for completions, an object a token for chats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_from_scratch.inference.sampling import TokenLogprob
from llm_from_scratch.tokenizer import Tokenizer

LEAST = -9999.0
"""What the API says for a token that cannot come: JSON has no minus infinity."""

Told = Sequence[tuple[int, TokenLogprob | None]]
"""Tokens, each with its log probability or, for the first of a text, None."""


class Names:
    """How tokens are spelled: as their text, in the API's own way where they are parts of characters, special tokens by name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = {token: name.encode() for name, token in tokenizer.special.items()}
        self._tokenizer = tokenizer

    def bytes_of(self, token: int) -> bytes:
        return self._special.get(token) or self._tokenizer.bytes_of(token)

    def text_of(self, token: int) -> str:
        piece = self.bytes_of(token)
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def starts(self, tokens: Told, offset: int) -> list[int]:
        """Where in the text each token begins, in characters; special tokens take no room."""
        read = b""
        starts = []
        for token, _ in tokens:
            starts.append(offset + len(read.decode("utf-8", errors="ignore")))
            read += b"" if token in self._special else self._tokenizer.bytes_of(token)
        return starts


def completion_logprobs(tokens: Told, names: Names, offset: int) -> dict[str, Any]:
    """The `logprobs` of a completion whose first token begins at `offset`. `top_logprobs` holds the token itself too, as OpenAI's does."""
    return {
        "tokens": [names.text_of(token) for token, _ in tokens],
        "token_logprobs": [None if said is None else _finite(said.logprob) for _, said in tokens],
        "top_logprobs": [
            None if said is None else {names.text_of(one): _finite(logprob) for one, logprob in (*said.top, (said.token_id, said.logprob))}
            for _, said in tokens
        ],
        "text_offset": names.starts(tokens, offset),
    }


def chat_logprobs(tokens: Told, names: Names) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    content = [
        {**_spelled(token, said.logprob, names), "top_logprobs": [_spelled(one, logprob, names) for one, logprob in said.top]}
        for token, said in tokens
        if said is not None
    ]
    return {"content": content, "refusal": None}


def _spelled(token: int, logprob: float, names: Names) -> dict[str, Any]:
    return {"token": names.text_of(token), "logprob": _finite(logprob), "bytes": list(names.bytes_of(token))}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
