"""Week 6. Today's recipe: GPT-2 with RMSNorm, rotary positions, a gated MLP, shared keys and values, and no biases.

Positions turn queries and keys instead of being added to the input, so attention sees how far apart two tokens are; several
query heads share one key-value head, which shrinks the cache. Module names and numbers are Hugging Face's: LlamaForCausalLM,
or Qwen3ForCausalLM when queries and keys are normalised. What it cannot do is follow an instruction; that is finetuning's.
(Touvron et al., 2023; Su et al., 2021, RoPE; Shazeer, 2020, SwiGLU; Ainslie et al., 2023, GQA.)

Shapes: B batch, T tokens, C width, H query heads, K key-value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from llm_from_scratch.model.cache import Cache
from llm_from_scratch.model.causal import attend, attention_weights
from llm_from_scratch.model.positions import cos_sin
from llm_from_scratch.model.rung import Rung, past_of, places
from llm_from_scratch.section import Section


class LlamaParams(Section):
    """`kv_heads` divides `heads`; `hidden` is the inside of the gated MLP; `qk_norm` makes it Qwen3-shaped.

    `copying` is how strongly attention repeats what it reads before it has learned anything, see `start_copying`; 0 is not at all.
    """

    architecture: Literal["llama"]
    context: PositiveInt
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    hidden: PositiveInt
    rope_theta: PositiveFloat
    qk_norm: bool
    copying: NonNegativeFloat


@dataclass(frozen=True)
class LlamaShape:
    """All that fixes the parameters and the function. `tied`: the head is the token embedding used backwards."""

    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    rope_theta: float
    qk_norm: bool
    tied: bool
    norm_eps: float

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; each serves equally many queries")
        if self.head_dim % 2:
            raise ValueError(f"the head width {self.head_dim} is odd, and rotary positions turn pairs; choose width / heads even")


class SelfAttention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.width, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.width, bias=False)
        self.qk_norm = shape.qk_norm
        if shape.qk_norm:
            self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)
            self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) to queries (B, H, T, D), keys and values (B, K, T, D), turned to their positions."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        answers = attend(q, k, v, mask=None if cache is None else cache.mask)
        mixed: Tensor = self.o_proj(answers.transpose(1, 2).flatten(2))
        return mixed


class FeedForward(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down_proj = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        thought: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return thought


class Block(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.self_attn = SelfAttention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Trunk(nn.Module):
    """Everything but the head, under the name that Hugging Face gives it: `model`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        cos, sin = rotation_tables(shape.context, shape.head_dim, shape.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)


class Llama(Rung):
    """Tied, it has no `lm_head`; untied, the head is a layer of its own."""

    supports_cache: ClassVar[bool] = True

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__(shape.vocab_size, shape.context)
        self.shape = shape
        self.model = Trunk(shape)
        self.lm_head = None if shape.tied else nn.Linear(shape.width, shape.vocab_size, bias=False)
        _initialise(self)

    def embed(self, ids: Tensor, past: int | Tensor) -> Tensor:
        x: Tensor = self.model.embed_tokens(ids)
        return x

    def mix(self, x: Tensor, cache: Cache | None) -> Tensor:
        cos, sin = self.turns(past_of(cache), x.size(1))
        for layer, block in enumerate(self.model.layers):
            x = self.run(block, x, cos, sin, cache, layer)
        return x

    def unembed(self, x: Tensor) -> Tensor:
        x = self.normed(x)
        return F.linear(x, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    def normed(self, x: Tensor) -> Tensor:
        """What the head reads, (B, T, C): another head can stand in its place."""
        normed: Tensor = self.model.norm(x)
        return normed

    @torch.no_grad()
    def attention_maps(self, ids: Tensor) -> Tensor:
        """The weights of one text, ids (T,) or (1, T), to (layers, H, T, T)."""
        x, maps = self.embed(ids.view(1, -1), 0), []
        cos, sin = self.turns(0, x.size(1))
        for layer, block in enumerate(self.model.layers):
            assert isinstance(block, Block)
            q, k, _ = block.self_attn.project(block.input_layernorm(x), cos, sin)
            maps.append(attention_weights(q, k)[0])
            x = block(x, cos, sin, None, layer)
        return torch.stack(maps)

    def turns(self, past: int | Tensor, T: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of T tokens from `past` on: (T, 1, D), or (B, T, 1, D) where each row has its own."""
        where = places(past, T)
        return self.model.cos[where], self.model.sin[where]


@torch.no_grad()
def start_copying(model: Llama, strength: float) -> None:
    """Let every layer begin by adding `strength` times the mean of what it reads, as far as its values have room for it.

    The tied head turns that into a higher chance for each token that was read: copying, which from random weights takes more text to find
    than a small model is ever shown. Only the start is set, everything learns on. It is the mimetic initialization of Trockman & Kolter
    (2023) for values and outputs: the output is the transpose of the value, whose rows are orthonormal.
    """
    shape = model.shape
    for block in model.model.layers:
        assert isinstance(block, Block)
        directions = torch.linalg.qr(torch.randn(shape.width, shape.kv_heads * shape.head_dim))[0]  # (C, G * D)
        block.self_attn.v_proj.weight.copy_(directions.T)
        shared = shape.heads // shape.kv_heads
        each = directions.unflatten(1, (shape.kv_heads, shape.head_dim)).repeat_interleave(shared, 1)
        block.self_attn.o_proj.weight.copy_(each.flatten(1) * strength / shared)


def rotation_tables(context: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each (context, 1, D), in the half-split layout: dimension i turns with i + D / 2."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    cos, sin = cos_sin(torch.outer(torch.arange(context, dtype=torch.float32), frequencies)[:, None])
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, T, H, D) by its position: (a, b) to (a cos - b sin, b cos + a sin); rolling by D / 2 swaps a and b."""
    return x * cos.to(x.dtype) + x.roll(x.size(-1) // 2, -1) * sin.to(x.dtype)


def _initialise(model: Llama) -> None:
    """Normal weights that keep the variance; what a block adds starts at zero, so at first every block is the identity."""
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(weight)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            nn.init.normal_(weight, std=0.02)
        elif weight.dim() == 2:
            nn.init.normal_(weight, std=weight.size(1) ** -0.5)
