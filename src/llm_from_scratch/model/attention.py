"""Week 3. Attention: each token asks all earlier ones, and weighs what they say by how well they fit the question.

The window is gone: the weights depend on what the tokens are, not on how far back they stand, and one set of them serves
every place. What it cannot do is think about what it gathered: there is no MLP, so a layer can only pass on sums of what was there.

Everything is spelled out here, one head first. The GPT rung does the same in one fused call, which hides the weights.

Shapes: B batch, T tokens, C width, H heads, D = C / H head width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from llm_from_scratch.model.cache import Cache
from llm_from_scratch.model.positions import cos_sin
from llm_from_scratch.model.rung import Rung
from llm_from_scratch.section import Section


class AttentionParams(Section):
    """`layers` of `heads` heads that share `width`, over at most `context` tokens."""

    architecture: Literal["attention"]
    context: PositiveInt
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt


class SingleHead(nn.Module):
    """One question, one key and one value a token. (Vaswani et al., 2017, eq. 1, with a causal mask.)"""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, head_width, bias=False)
        self.key = nn.Linear(width, head_width, bias=False)
        self.value = nn.Linear(width, head_width, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        """x (B, T, C) to (B, T, T): row t is how much of each token up to t goes into the answer for t; it sums to 1."""
        q, k = self.query(x), self.key(x)
        return causal_softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) to (B, T, D)."""
        answer: Tensor = self.weights(x) @ self.value(x)
        return answer


class MultiHead(nn.Module):
    """`heads` single heads side by side, in one product, and a projection that mixes their answers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}; every head needs the same share of it")
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        """x (B, T, C) to (B, H, T, T)."""
        q, k = self._split(self.query(x)), self._split(self.key(x))
        return causal_softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) to (B, T, C)."""
        answers = self.weights(x) @ self._split(self.value(x))
        mixed: Tensor = self.project(answers.transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, H, T, D)."""
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)


def causal_softmax(scores: Tensor) -> Tensor:
    """Scores (…, T, T) to weights: the future gets -inf before the softmax, so exactly 0 after it."""
    T = scores.size(-1)
    future = torch.tril(torch.ones(T, T, device=scores.device)) == 0
    return scores.masked_fill(future, float("-inf")).softmax(-1)


class Attention(Rung):
    """Token and position vectors, then attention layers that add what they find to what was there; each reads it normalised."""

    def __init__(self, params: AttentionParams, vocab_size: int) -> None:
        super().__init__(vocab_size, params.context)
        self.params = params
        self.tokens = nn.Embedding(vocab_size, params.width)
        self.positions = nn.Embedding(params.context, params.width)
        self.norms = nn.ModuleList(nn.LayerNorm(params.width) for _ in range(params.layers))
        self.layers = nn.ModuleList(MultiHead(params.width, params.heads) for _ in range(params.layers))
        self.last_norm = nn.LayerNorm(params.width)
        self.head = nn.Linear(params.width, vocab_size)
        with torch.no_grad():
            self.positions.weight.copy_(waves(params.context, params.width))

    def embed(self, ids: Tensor, past: int | Tensor) -> Tensor:
        x: Tensor = self.tokens(ids) + self.positions.weight[: ids.size(1)]
        return x

    def mix(self, x: Tensor, cache: Cache | None) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x

    def unembed(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.last_norm(x))
        return logits

    @torch.no_grad()
    def attention_maps(self, ids: Tensor) -> Tensor:
        """The weights of one text, ids (T,) or (1, T), to (layers, H, T, T)."""
        x, maps = self.embed(ids.view(1, -1), 0), []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            assert isinstance(layer, MultiHead)
            maps.append(layer.weights(norm(x))[0])
            x = x + layer(norm(x))
        return torch.stack(maps)


def waves(context: int, width: int) -> Tensor:
    """Sines and cosines of the position at `width` / 2 wavelengths, (context, width). (Vaswani et al., 2017, section 3.5.)

    Learned positions start here and not at random, because one step back is the same rotation everywhere: a head finds "the token
    before this one" at once, and with random positions it has to learn that for each place anew.
    """
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = cos_sin(torch.outer(torch.arange(context), frequencies))
    return torch.stack((sin, cos), -1).flatten(1)[:, :width]
