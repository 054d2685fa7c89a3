"""The simplest tokenizer: one id a character.

Nothing to train and nothing to explain, but a sequence is as long as the text, a model spends its first layers on spelling, and a
character the corpus never had can only be <unk>.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_from_scratch.tokenizer import export
from llm_from_scratch.tokenizer.base import SPECIAL, Vocabulary, well_formed

UNKNOWN = "<unk>"  # a user may type any character, so this one is always there


class CharTokenizer(Vocabulary):
    """Ids follow `characters`, then <unk>, then the five special tokens."""

    def __init__(self, characters: Sequence[str]) -> None:
        if any(len(one) != 1 for one in characters):
            raise ValueError("found a token of several characters, wanted one character each")
        super().__init__([one.encode("utf-8") for one in characters], (UNKNOWN, *SPECIAL))
        self.characters = tuple(characters)
        self._ids = {one: place for place, one in enumerate(characters)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> CharTokenizer:
        """From a parsed tokenizer.json. Raises KeyError, TypeError or ValueError when it is not one of these."""
        ids: dict[str, int] = document["model"]["vocab"]
        return cls(sorted(ids, key=ids.__getitem__)[: -len(SPECIAL) - 1])

    def document(self) -> dict[str, Any]:
        """tokenizer.json as a value."""
        return export.word_level(self.characters, self.special, UNKNOWN)

    def save(self, folder: Path) -> None:
        export.write(folder, self.document(), UNKNOWN)

    def encode(self, text: str) -> list[int]:
        unknown = self.special[UNKNOWN]
        return [self._ids.get(one, unknown) for one in well_formed(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]


def train_char(texts: Iterable[str]) -> CharTokenizer:
    """The alphabet of `texts`, in the order of Unicode."""
    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(well_formed(text))
    return CharTokenizer(sorted(alphabet))
