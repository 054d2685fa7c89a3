"""A tokenized corpus on disk: two flat files of ids that training maps into memory instead of reading.

Documents follow one another, each closed by the end-of-text token, so their borders can be found again. Which document goes into which
file was decided at download: two tokenizers of one corpus hold out the same bytes, and the facts carry the sha256 that shows it.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_from_scratch import bundle
from llm_from_scratch.data.documents import Split

Ids = NDArray[np.unsignedinteger[Any]]
Texts = Sequence[str]
EncodeBatch = Callable[[Texts], Sequence[Sequence[int] | Ids]]

FILES: dict[Split, str] = {"train": "train", "validation": "val"}
BATCH_CHARACTERS = 1 << 20
EXCERPT = 40  # characters
BINS = 30


@dataclass(frozen=True)
class Shards:
    """Both splits as read-only memory maps of ids, (tokens,) each, and what a model must know of the vocabulary."""

    train: Ids
    val: Ids
    eot: int
    vocab_size: int


@dataclass(frozen=True)
class Piece:
    """Consecutive documents: their `ids` as the file has them, their `text` in UTF-8, and what they add up to."""

    ids: bytes
    text: bytes
    documents: int
    tokens: int
    characters: int


@dataclass(frozen=True)
class Encoder:
    """Consecutive documents to a piece. It depends on nothing else, so batches can be encoded anywhere, as long as order is kept."""

    encode_batch: EncodeBatch
    eot: int
    vocab_size: int

    @property
    def dtype(self) -> str:
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"

    def __call__(self, texts: Texts) -> Piece:
        """Raises ValueError for ids outside the vocabulary, and for half a character, whose bytes nobody could count."""
        end = np.array([self.eot], dtype=np.int64)
        # Not "safe": numpy takes an empty list for one of floats.
        closed = np.concatenate([part for ids in self.encode_batch(texts) for part in (ids, end)], dtype=np.int64, casting="unsafe")
        if closed.min() < 0 or closed.max() >= self.vocab_size:
            extremes = f"{closed.min()} … {closed.max()}"
            raise ValueError(f"token ids are {extremes}, the vocabulary has {self.vocab_size}; encode with the tokenizer it belongs to")
        text = b"".join(map(_utf8, texts))
        return Piece(closed.astype(self.dtype).tobytes(), text, len(texts), len(closed), sum(map(len, texts)))


Run = Callable[[Encoder, Iterable[Texts]], Iterable[Piece]]
"""How batches are encoded: one after another (map), across processes, … Pieces must come in the order of the batches."""


def write_shards(
    folder: Path,
    documents_by_split: Mapping[Split, Iterable[str]],
    encode_batch: EncodeBatch,
    eot: int,
    vocab_size: int,
    run: Run = map,
) -> dict[str, Any]:
    """train.bin and val.bin in `folder` from the texts of each split, read once and a batch at a time; the facts for its manifest.

    Raises ValueError as `write_pieces` and `Encoder` do.
    """
    encoder = Encoder(encode_batch, eot, vocab_size)
    return write_pieces(folder, {split: run(encoder, _batches(texts)) for split, texts in documents_by_split.items()}, encoder)


def write_pieces(folder: Path, pieces_by_split: Mapping[Split, Iterable[Piece]], encoder: Encoder) -> dict[str, Any]:
    """train.bin and val.bin in `folder` from the pieces of each split as they come; the facts for its manifest.

    Facts count tokens (one end-of-text a document among them), documents, characters and UTF-8 bytes of each split, with the sha256 of
    its bytes. Raises ValueError for a split without documents.
    """
    facts: dict[str, Any] = {"dtype": encoder.dtype, "eot": encoder.eot, "vocab_size": encoder.vocab_size}
    for split, name in FILES.items():
        count = _Count()
        with (folder / f"{name}.bin").open("wb") as file:
            for piece in pieces_by_split[split]:
                file.write(piece.ids)
                count.add(piece)
        if count.documents == 0:
            raise ValueError(f"the corpus has no {split} documents, wanted one at least; set its share in sources.<corpus>.validation")
        facts |= {f"{name}_{key}": value for key, value in count.facts().items()}
    return facts


def open_shards(folder: Path) -> Shards:
    """The splits of a tokens bundle. Raises BundleError where there is none, or a file is not as long as the manifest says."""
    manifest = bundle.read_manifest(folder)
    if manifest.kind != "tokens":
        raise bundle.BundleError(f"{folder}: found a bundle of kind '{manifest.kind}', wanted tokens; dvc repro tokenize builds one")
    facts = manifest.facts
    train, val = (_mapped(folder / f"{name}.bin", facts["dtype"], facts[f"{name}_tokens"]) for name in FILES.values())
    return Shards(train, val, facts["eot"], facts["vocab_size"])


def document_lengths(ids: Ids, eot: int) -> NDArray[np.int64]:
    """(documents,) tokens in each document, without the one that closes it."""
    return np.diff(np.flatnonzero(ids == eot), prepend=-1) - 1


def write_lengths(path: Path, shards: Shards) -> None:
    """A CSV histogram of tokens a document: `first` to `last` token count of a bar, and the documents of each split in it."""
    train, val = (document_lengths(ids, shards.eot) for ids in (shards.train, shards.val))
    longest = int(max(train.max(), val.max()))
    width = longest // BINS + 1
    edges = np.arange(0, longest + width + 1, width)
    bars = zip(edges[:-1], edges[1:] - 1, np.histogram(train, edges)[0], np.histogram(val, edges)[0], strict=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["first", "last", "train", "validation"])
        table.writerows([int(value) for value in bar] for bar in bars)


class _Count:
    """What one split adds up to."""

    def __init__(self) -> None:
        self.documents = self.tokens = self.characters = self.bytes = 0
        self.sha256 = hashlib.sha256()

    def add(self, piece: Piece) -> None:
        self.documents += piece.documents
        self.tokens += piece.tokens
        self.characters += piece.characters
        self.bytes += len(piece.text)
        self.sha256.update(piece.text)

    def facts(self) -> dict[str, Any]:
        counted = {key: value for key, value in vars(self).items() if key != "sha256"}
        return {**counted, "sha256": self.sha256.hexdigest()}


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        known = f"the document that begins {text[:EXCERPT]!r} holds half a character"
        raise ValueError(f"{known} ({error}); the download gate must refuse it") from None


def _mapped(path: Path, dtype: str, tokens: int) -> Ids:
    found = path.stat().st_size if path.is_file() else 0
    if found != tokens * np.dtype(dtype).itemsize:
        raise bundle.BundleError(f"{path}: {found} bytes, the manifest says {tokens} tokens of {dtype}; dvc repro tokenize rebuilds it")
    return np.memmap(path, dtype=dtype, mode="r")
