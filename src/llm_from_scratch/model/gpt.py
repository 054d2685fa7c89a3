"""Week 4. GPT-2: after each attention layer, which gathers, comes an MLP, which thinks about what was gathered.

With `hidden` four times the width and 50,257 tokens this is OpenAI's model to the last parameter, its module names included, so
their weights load. What it cannot do is know a position it was not trained on, or shrink its cache: each head keeps its own keys.
(Radford et al., 2019; the fused attention is the one that the attention rung spells out.)

Shapes: B batch, T tokens, C width, H heads, D = C / H head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from llm_from_scratch.model.cache import Cache
from llm_from_scratch.model.causal import attend, attention_weights
from llm_from_scratch.model.rung import Rung, places
from llm_from_scratch.section import Section


class GptParams(Section):
    """`dropout` acts where GPT-2's does: on the embeddings, the attention weights and what each half of a block adds."""

    architecture: Literal["gpt"]
    context: PositiveInt
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    dropout: Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class GptShape:
    """All that fixes the parameters and the function."""

    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    hidden: int
    dropout: float
    norm_eps: float

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; every head needs the same share of it")


class SelfAttention(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.c_attn = nn.Linear(shape.width, 3 * shape.width)
        self.c_proj = nn.Linear(shape.width, shape.width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) to queries, keys and values, each (B, H, T, D)."""
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v

    def forward(self, x: Tensor, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = self.project(x)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        answers = attend(q, k, v, self.dropout if self.training else 0.0, None if cache is None else cache.mask)
        mixed: Tensor = self.c_proj(answers.transpose(1, 2).flatten(2))
        return mixed


class FeedForward(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.width, shape.hidden)
        self.c_proj = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        thought: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return thought


class Block(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.attn = SelfAttention(shape)
        self.ln_2 = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)
        self.drop = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache, layer))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class Transformer(nn.Module):
    """Everything but the head, under the name that Hugging Face gives it."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.width)
        self.wpe = nn.Embedding(shape.context, shape.width)
        self.drop = nn.Dropout(shape.dropout)
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width, eps=shape.norm_eps)


class Gpt(Rung):
    """The head is the token embedding used backwards: it has no parameters of its own."""

    supports_cache: ClassVar[bool] = True

    def __init__(self, shape: GptShape) -> None:
        super().__init__(shape.vocab_size, shape.context)
        self.shape = shape
        self.transformer = Transformer(shape)
        self.apply(_initialise)
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 * layers of them add up in the residual stream
                nn.init.normal_(weight, std=0.02 / (2 * shape.layers) ** 0.5)

    def embed(self, ids: Tensor, past: int | Tensor) -> Tensor:
        positions = self.transformer.wpe.weight[places(past, ids.size(1))]
        x: Tensor = self.transformer.drop(self.transformer.wte(ids) + positions)
        return x

    def mix(self, x: Tensor, cache: Cache | None) -> Tensor:
        for layer, block in enumerate(self.transformer.h):
            x = self.run(block, x, cache, layer)
        return x

    def unembed(self, x: Tensor) -> Tensor:
        return F.linear(self.normed(x), self.transformer.wte.weight)

    def normed(self, x: Tensor) -> Tensor:
        """What the head reads, (B, T, C): another head can stand in its place."""
        normed: Tensor = self.transformer.ln_f(x)
        return normed

    @torch.no_grad()
    def attention_maps(self, ids: Tensor) -> Tensor:
        """The weights of one text, ids (T,) or (1, T), to (layers, H, T, T). Call it in eval mode."""
        x, maps = self.embed(ids.view(1, -1), 0), []
        for layer, block in enumerate(self.transformer.h):
            assert isinstance(block, Block)
            q, k, _ = block.attn.project(block.ln_1(x))
            maps.append(attention_weights(q, k)[0])
            x = block(x, None, layer)
        return torch.stack(maps)


@torch.no_grad()
def with_vocabulary(model: Gpt, vocab_size: int) -> Gpt:
    """The same model with rows for more tokens, so that OpenAI's 50,257 make room for special tokens that a tokenizer puts after them.

    The logits of the old tokens stay as they were. New rows start at the mean of the old ones, so none is likely for its size alone
    (Hewitt 2021). Raises ValueError for fewer tokens than there are.
    """
    if (extra := vocab_size - model.shape.vocab_size) < 0:
        raise ValueError(f"the model has {model.shape.vocab_size} tokens, and {vocab_size} would cut some off; give as many or more")
    with torch.random.fork_rng(devices=[]):
        grown = Gpt(replace(model.shape, vocab_size=vocab_size))
    state, table = model.state_dict(), model.transformer.wte.weight
    grown.load_state_dict(state | {"transformer.wte.weight": torch.cat((table, table.mean(0, keepdim=True).expand(extra, -1)))})
    return grown.train(model.training)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
