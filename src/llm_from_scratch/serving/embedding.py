"""The embedding model as many threads may use it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from typing import Any, Literal

from llm_from_scratch.retrieval.embed import Embedder, Progress, Vectors, quiet
from llm_from_scratch.serving.errors import ApiError

ENDS = 2
"""Tokens that the encoder puts around every text."""


class SharedEmbedder(Embedder):
    """One thread at a time: transformers' tokenizer keeps its truncation in the object, and raises when two change it at once."""

    def __init__(self, model: Any, tokenizer: Any, limit: int, digest: str) -> None:
        super().__init__(model, tokenizer, limit, digest)
        self._turn = threading.Lock()

    def embed(self, texts: Sequence[str], batch: int = 16, progress: Progress = quiet) -> Vectors:
        with self._turn:
            return super().embed(texts, batch, progress)

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        with self._turn:
            return super().spans(texts)


def counted(embedder: Embedder, texts: Sequence[str]) -> int:
    """How many tokens `texts` are. Raises ApiError 400 where one is longer than the encoder reads, which would drop the rest in silence."""
    lengths = [len(spans) for spans in embedder.spans(texts)]
    for place, length in enumerate(lengths):
        if length > embedder.limit - ENDS:
            message = f"input {place} is {length} tokens, and no more than {embedder.limit - ENDS} are read; cut it into passages"
            raise ApiError(400, message, "context_length_exceeded", param="input")
    return sum(lengths)


def reply(vectors: Vectors, tokens: int, model: str, encoding: Literal["float", "base64"]) -> dict[str, Any]:
    """The body of POST /v1/embeddings: base64 is of little-endian 32-bit floats, as OpenAI's clients read it."""
    rows = vectors.astype("<f4")
    told = [row.tolist() if encoding == "float" else base64.b64encode(row.tobytes()).decode("ascii") for row in rows]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": place, "embedding": row} for place, row in enumerate(told)],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
