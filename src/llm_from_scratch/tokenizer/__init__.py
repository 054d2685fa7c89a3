"""Tokenizers: characters, byte pairs trained here, GPT-2's own, or those of imported models; all saved as the files Hugging Face reads.

`train` makes one or `read_gpt2` takes over the published one, `save` writes it, `load` reads it back from tokenizer.json alone (an imported
one from tokenizer_config.json too).
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
from llm_from_scratch.tokenizer.gpt2 import read_gpt2
from llm_from_scratch.tokenizer.imported import ImportedTokenizer, is_imported, read_imported

__all__ = [
    "SPECIAL",
    "BpeTokenizer",
    "CharTokenizer",
    "ImportedTokenizer",
    "TokenizeParams",
    "Tokenizer",
    "digest",
    "load",
    "printable",
    "read_gpt2",
    "read_imported",
    "train",
]

READERS: dict[str, Callable[[dict[str, Any]], CharTokenizer | BpeTokenizer]] = {
    "WordLevel": CharTokenizer.from_document,
    "BPE": BpeTokenizer.from_document,
}


class TokenizeParams(Section):
    """Which corpus, by which tokenizer, and on what.

    `vocabulary_from` is the source whose documents the vocabulary is learned from or, for gpt2, the one that holds its files. `vocab_size`
    counts all tokens; it is 0 where nobody can choose: characters are as many as the corpus has, GPT-2's tokens as many as published.
    `workers` encode: the cores of this machine, or the nodes of a Ray cluster. With `lessons` the corpus' entries also become lessons in
    reading, for the rungs that take some.
    """

    corpus: str
    kind: Literal["char", "bpe", "gpt2"]
    vocabulary_from: str
    vocab_size: int
    workers: Literal["local", "ray"]
    lessons: bool

    @model_validator(mode="after")
    def _size_fits_kind(self) -> Self:
        smallest = len(BYTE_ORDER) + len(SPECIAL)
        if self.kind == "char" and self.vocab_size != 0:
            raise ValueError(f"vocab_size is {self.vocab_size}; characters are as many as the corpus has, write 0")
        if self.kind == "gpt2" and self.vocab_size != 0:
            raise ValueError(f"vocab_size is {self.vocab_size}; GPT-2's tokens are as many as were published, write 0")
        if self.kind == "bpe" and self.vocab_size < smallest:
            raise ValueError(f"vocab_size is {self.vocab_size}; bytes and special tokens alone are {smallest}, give more")
        return self

    @model_validator(mode="after")
    def _characters_are_those_of_the_corpus(self) -> Self:
        if self.kind == "char" and self.vocabulary_from != self.corpus:
            found = f"vocabulary_from is {self.vocabulary_from}, whose characters may not be those of {self.corpus}"
            raise ValueError(f"{found}; write {self.corpus}, or take bpe, which knows every text")
        return self


def train(params: TokenizeParams, texts: Iterable[str], progress: Progress = quiet) -> CharTokenizer | BpeTokenizer:
    """The tokenizer that `params` asks for, learned from `texts`, which is read once. Raises ValueError for gpt2: see `read_gpt2`."""
    match params.kind:
        case "char":
            return train_char(texts)
        case "bpe":
            return train_bpe(texts, params.vocab_size, progress)
        case "gpt2":
            raise ValueError("GPT-2's tokenizer is not trained but read; read_gpt2 takes the folder of its files")


def load(folder: Path) -> CharTokenizer | BpeTokenizer | ImportedTokenizer:
    """The tokenizer saved in `folder`, whatever its kind. Raises BundleError where the file is missing, damaged or somebody else's.

    The check of ours is whole: what was read must be exactly what the tokenizer made of it would write.
    """
    if is_imported(folder):
        return read_imported(folder)
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
