"""Week 1. One token back: a table with a row of logits for each token, learned by gradient descent.

It is what the n-gram does at order 2, except that nothing is counted: the loss finds the same numbers. What it cannot do is
look further back than the last token, or let two tokens that behave alike share what was learned of them.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from llm_from_scratch.model.cache import Cache
from llm_from_scratch.model.rung import ANY_LENGTH, Rung
from llm_from_scratch.section import Section


class BigramParams(Section):
    """The vocabulary alone gives its size."""

    architecture: Literal["bigram"]


class Bigram(Rung):
    """The row of a token is the logits of the next one, so mixing and unembedding have nothing to do."""

    def __init__(self, params: BigramParams, vocab_size: int) -> None:
        super().__init__(vocab_size, ANY_LENGTH)
        self.params = params
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.table.weight)  # every token equally likely

    def embed(self, ids: Tensor, past: int | Tensor) -> Tensor:
        row: Tensor = self.table(ids)
        return row

    def mix(self, x: Tensor, cache: Cache | None) -> Tensor:
        return x

    def unembed(self, x: Tensor) -> Tensor:
        return x
