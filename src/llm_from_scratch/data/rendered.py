"""Conversations as ids on disk, beside the shards of a text: one row after another, each token marked as learned from or only read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llm_from_scratch.bundle import load_tensors, save_tensors

CONVERSATIONS = "conversations.safetensors"

Rendered = tuple[Sequence[int], Sequence[bool]]
"""A conversation's ids, and for each whether a model is to learn to say it."""


def write_conversations(folder: Path, rendered: Iterable[Rendered]) -> int:
    """All of them in one file of `folder`; how many. Raises ValueError where there are none."""
    rows = list(rendered)
    if not rows:
        raise ValueError("the corpus gives no lessons: none of its training documents has a description; set lessons to false")
    tensors = {
        "ids": torch.tensor([token for ids, _ in rows for token in ids], dtype=torch.int32),
        "learned": torch.tensor([said for _, learned in rows for said in learned]),
        "lengths": torch.tensor([len(ids) for ids, _ in rows]),
    }
    save_tensors(folder / CONVERSATIONS, tensors)
    return len(rows)


def read_conversations(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """(ids, learned) of each, (T,) int64 and bool. Raises BundleError where the file is missing or cut short."""
    tensors = load_tensors(folder / CONVERSATIONS)
    lengths = tensors["lengths"].tolist()
    return list(zip(torch.split(tensors["ids"].long(), lengths), torch.split(tensors["learned"], lengths), strict=True))
