"""Tokenizers: characters, or byte pairs trained here; both saved as the files Hugging Face reads.

`train` makes one, `save` writes it, `load` reads it back from tokenizer.json alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from llm_from_scratch.section import Section
from llm_from_scratch.tokenizer import export
from llm_from_scratch.tokenizer.base import SPECIAL, Tokenizer, printable
from llm_from_scratch.tokenizer.bpe import BYTE_ORDER, BpeTokenizer, Progress, quiet, train_bpe
from llm_from_scratch.tokenizer.char import CharTokenizer, train_char
from llm_from_scratch.tokenizer.export import digest

__all__ = ["SPECIAL", "BpeTokenizer", "CharTokenizer", "TokenizeParams", "Tokenizer", "digest", "load", "printable", "train"]


READERS: dict[str, Callable[[dict[str, Any]], CharTokenizer | BpeTokenizer]] = {
    "WordLevel": CharTokenizer.from_document,
    "BPE": BpeTokenizer.from_document,
}


class TokenizeParams(Section):
    """Which corpus, which kind, and how many tokens in all (for characters 0: as many as the corpus has)."""

    corpus: str
    kind: Literal["char", "bpe"]
    vocab_size: int

    @model_validator(mode="after")
    def _size_fits_kind(self) -> Self:
        smallest = len(BYTE_ORDER) + len(SPECIAL)
        if self.kind == "char" and self.vocab_size != 0:
            raise ValueError(f"vocab_size is {self.vocab_size}; characters are as many as the corpus has, write 0")
        if self.kind == "bpe" and self.vocab_size < smallest:
            raise ValueError(f"vocab_size is {self.vocab_size}; bytes and special tokens alone are {smallest}, give more")
        return self


def train(params: TokenizeParams, texts: Iterable[str], progress: Progress = quiet) -> CharTokenizer | BpeTokenizer:
    """The tokenizer that `params` asks for, learned from `texts`, which is read once."""
    return train_char(texts) if params.kind == "char" else train_bpe(texts, params.vocab_size, progress)


def load(folder: Path) -> CharTokenizer | BpeTokenizer:
    """The tokenizer saved in `folder`, whatever its kind. Raises BundleError where the file is missing, damaged or somebody else's.

    The check is whole: what was read must be exactly what the tokenizer made of it would write.
    """
    document = export.read(folder)
    try:
        found = READERS[document["model"]["type"]](document)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise export.damaged(folder, f"{type(error).__name__}: {error}") from None
    written = found.document()
    for key in written.keys() | document.keys():
        if written.get(key) != document.get(key):
            raise export.damaged(folder, f"its '{key}' is not what its own merges or characters give")
    return found
