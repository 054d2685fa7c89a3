"""What every tokenizer is: a table of byte strings, five special tokens after it, and one rule for what counts as text.

A special token stands for no bytes. It can be put into a sequence by whoever builds it (the end of a document, the turns of a chat)
and can never come out of `encode`, whatever the text says: a user who types <|end|> gets the seven characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL = (END_OF_TEXT, *(f"<|{role}|>" for role in ROLES), END_OF_TURN)


class Tokenizer(Protocol):
    """Text to ids and back; a batch as arrays, because lists of numbers would take a corpus a third longer.

    `special` maps each special token to its id, `eot` is the one that ends a document, `end_of_turn` the one that ends what is said in a
    chat (`eot` again, where a vocabulary has no other).
    """

    vocab_size: int
    eot: int
    end_of_turn: int
    special: dict[str, int]

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def bytes_of(self, token: int) -> bytes: ...
    def token_bytes(self) -> NDArray[np.int64]: ...
    def save(self, folder: Path) -> None: ...


class Table:
    """The bytes of every id, nothing for those in `special`."""

    def __init__(self, table: Sequence[bytes], special: Mapping[str, int], eot: int, end_of_turn: int) -> None:
        self.special = dict(special)
        self.eot = eot
        self.end_of_turn = end_of_turn
        self.vocab_size = len(table)
        self._table = tuple(table)

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text: possibly part of a character, and nothing for a special token."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is not one of the vocabulary's {self.vocab_size}; was it made by another tokenizer?")
        return self._table[token]

    def token_bytes(self) -> NDArray[np.int64]:
        """(vocab_size,) how many bytes each token stands for, 0 for special ones: what turns nats a token into bits a byte."""
        return np.array([len(piece) for piece in self._table], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; bytes that are not whole characters become U+FFFD."""
        return b"".join(self.bytes_of(token) for token in ids).decode("utf-8", errors="replace")


class Vocabulary(Table):
    """Ids 0 … n-1 are the byte strings of `tokens`, the ids after them the names of `special`, which stand for no bytes."""

    def __init__(self, tokens: Sequence[bytes], special: Sequence[str]) -> None:
        ids = {name: len(tokens) + place for place, name in enumerate(special)}
        super().__init__((*tokens, *(b"" for _ in special)), ids, ids[END_OF_TEXT], ids.get(END_OF_TURN, ids[END_OF_TEXT]))


def well_formed(text: str) -> str:
    """`text` with each lone surrogate as U+FFFD and each surrogate pair as its character, which is what tiktoken does too.

    A Python string can hold half a UTF-16 pair (JSON such as "\\ud800" makes one), but UTF-8 has no bytes for it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", errors="surrogatepass").decode("utf-16-le", errors="replace")
    return text


def printable(piece: bytes) -> str:
    """A token for the eye: a space as ·, a line's end as ⏎, anything else that cannot be seen as an escape."""
    try:
        characters = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in piece)
    shown = characters.replace(" ", "·").replace("\n", "⏎")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in shown)
