"""Week 2. A fixed window: an MLP looks at the embeddings of the last few tokens side by side.

Tokens are vectors now, so those that behave alike share what is learned, and order matters, because each place in the window
has its own weights. What it cannot do is look further back than the window, or use what it learned at one place one place over.
(Bengio et al., 2003, A Neural Probabilistic Language Model.)

Shapes: B batch, T tokens, C embedding width, W window, H hidden units, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from llm_from_scratch.model.cache import Cache
from llm_from_scratch.model.rung import ANY_LENGTH, Rung
from llm_from_scratch.section import Section


class MlpParams(Section):
    """`window` tokens, each an embedding of `width`, into one layer of `hidden` units."""

    architecture: Literal["mlp"]
    window: PositiveInt
    width: PositiveInt
    hidden: PositiveInt


class Mlp(Rung):
    """Every position is predicted from its last `window` tokens; before the text there is one more token that means "nothing yet"."""

    def __init__(self, params: MlpParams, vocab_size: int) -> None:
        super().__init__(vocab_size, ANY_LENGTH)
        self.params = params
        self.tokens = nn.Embedding(vocab_size + 1, params.width)
        self.places = nn.Linear(params.window * params.width, params.hidden)
        self.head = nn.Linear(params.hidden, vocab_size)

    def embed(self, ids: Tensor, past: int | Tensor) -> Tensor:
        """(B, T) to (B, W - 1 + T, C), what comes before the text included."""
        x: Tensor = self.tokens(F.pad(ids, (self.params.window - 1, 0), value=self.vocab_size))
        return x

    def mix(self, x: Tensor, cache: Cache | None) -> Tensor:
        """(B, W - 1 + T, C) to (B, T, H)."""
        windows = x.unfold(1, self.params.window, 1)  # (B, T, C, W)
        return F.gelu(self.places(windows.flatten(2)))

    def unembed(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return logits
