"""A forward through slots in as few calls as it takes: at one token a time, the calls cost more than the arithmetic of a small model.

Queries, keys and values are one product instead of three, and so are gate and up; heads turn together; the query heads of one key-value
head are read as so many queries; only the last place goes through the head. The numbers are those of the model's own forward but for the
last bits. The packed matrices take the place of those they were made from, which become views of them: same names, no more memory.

What is no plain Llama (a gpt, a wrapped one, bitsandbytes' layers) goes through its own forward.

Shapes: B rows, T tokens, V vocabulary, C width, H query heads, G key-value heads, R = H / G, S places in the cache, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.inference.int8 import KERNELS, Int8Linear
from llm_from_scratch.inference.kv_cache import SlotRows
from llm_from_scratch.model.llama import Block, Llama, LlamaShape
from llm_from_scratch.model.rung import Rung, past_of

Forward = Callable[[Tensor, SlotRows, bool], Tensor]
"""ids (B, T), where they go, and whether all logits are wanted: (B, T, V), or (B, 1, V) of the last place only."""


def forward_of(model: nn.Module) -> Forward:
    """The quickest there is for `model`. It is in evaluation mode as long as the forward is used."""
    if type(model) is Llama:
        kinds = {type(layer) for block in model.model.layers for layer in _linears(block)}
        if len(kinds) == 1 and kinds <= {nn.Linear, *KERNELS.values()}:
            return FusedLlama(model)
    return lambda ids, rows, every: _own(model, ids, rows, every)


class FusedLlama:
    def __init__(self, model: Llama) -> None:
        self.trunk, self.shape, self.turns = model.model, model.shape, model.turns
        self.head = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
        self.layers = [FusedBlock(cast(Block, block), model.shape, place) for place, block in enumerate(model.model.layers)]

    def __call__(self, ids: Tensor, rows: SlotRows, every: bool) -> Tensor:
        B, T = ids.shape
        x = F.embedding(ids.flatten(), self.trunk.embed_tokens.weight)
        cos, sin = (table.view(-1, 1, self.shape.head_dim).to(x.dtype) for table in self.turns(past_of(rows), T))
        for layer in self.layers:
            x = layer(x, cos, sin, rows, B)
        rows.advance(T)
        x = x.view(B, T, -1) if every else x.view(B, T, -1)[:, -1:]
        return F.linear(_normed(x, self.trunk.norm), self.head)


class FusedBlock:
    """One layer, (B·T, C) to (B·T, C)."""

    def __init__(self, block: Block, shape: LlamaShape, place: int) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.place, self.shape, self.block = place, shape, block
        self.qkv = packed([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up = packed([mlp.gate_proj, mlp.up_proj])
        self.out, self.down = packed([attention.o_proj]), packed([mlp.down_proj])

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, rows: SlotRows, B: int) -> Tensor:
        x = x + self.out(self.attend(_normed(x, self.block.input_layernorm), cos, sin, rows, B))
        gate, up = self.gate_up(_normed(x, self.block.post_attention_layernorm)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, rows: SlotRows, B: int) -> Tensor:
        """What the heads gathered, (B·T, H·D)."""
        H, G, D = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        qk, v = torch.split(self.qkv(x).view(len(x), H + 2 * G, D), [H + G, G], 1)
        if self.shape.qk_norm:
            attention = self.block.self_attn
            qk = torch.cat((_normed(qk[:, :H], attention.q_norm), _normed(qk[:, H:], attention.k_norm)), 1)
        turned = qk * cos + qk.roll(D // 2, -1) * sin
        q, k = torch.split(turned.view(B, -1, H + G, D), [H, G], 2)
        keys, values = rows.put(self.place, k, v.view(B, -1, G, D))
        if len(x) == B:
            return F.scaled_dot_product_attention(q.reshape(B, G, H // G, D), keys, values, attn_mask=rows.mask).reshape(B, H * D)
        answers = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=rows.mask, enable_gqa=H != G)
        return answers.transpose(1, 2).reshape(len(x), H * D)


def packed(layers: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """One product in place of several of the same input, their outputs side by side; the layers then hold views of its weight."""
    sizes = [cast(int, layer.out_features) for layer in layers]
    if isinstance(layers[0], Int8Linear):
        if len(layers) == 1:
            return layers[0]
        parts: list[Any] = list(layers)
        whole = type(layers[0])(torch.cat([part.weight for part in parts]), torch.cat([part.SCB for part in parts]), None)
        held = (torch.split(tensor, sizes) for tensor in (whole.weight, whole.SCB, whole.scale))
        for part, weight, largest, scale in zip(parts, *held, strict=True):
            part.weight, part.SCB, part.scale = weight, largest, scale
        return whole.eval()
    weights = [cast(nn.Parameter, layer.weight) for layer in layers]
    weight = weights[0] if len(weights) == 1 else _joined(weights, sizes)
    return lambda x: F.linear(x, weight)


def _joined(weights: Sequence[nn.Parameter], sizes: list[int]) -> Tensor:
    """The weights on top of each other, (N, C). Where they are so already, because this was done before, nothing is copied."""
    first = weights[0].data
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    one_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if one_storage and all(weight.is_contiguous() for weight in weights) and [weight.data_ptr() for weight in weights[1:]] == ends[:-1]:
        return first.as_strided((sum(sizes), first.size(1)), (first.size(1), 1))
    whole = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, torch.split(whole, sizes), strict=True):
        weight.data = part
    return whole


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    """RMSNorm, (…, C), in its six operations; F.rms_norm takes twice as long to find them on a CPU."""
    norm = cast(nn.RMSNorm, norm)
    assert norm.eps is not None
    return x * x.square().mean(-1, keepdim=True).add_(norm.eps).rsqrt_() * norm.weight


def _linears(block: nn.Module) -> list[nn.Module]:
    assert isinstance(block, Block)
    return [part for part in (*block.self_attn.children(), *block.mlp.children()) if not isinstance(part, nn.RMSNorm)]


def _own(model: nn.Module, ids: Tensor, rows: SlotRows, every: bool) -> Tensor:
    """The model's own forward; a rung's without the head at places that nobody asks for."""
    if every or not isinstance(model, Rung):
        logits: Tensor = model(ids, rows)
        return logits if every else logits[:, -1:]
    last = model.unembed(model.mix(model.embed(ids, past_of(rows)), rows)[:, -1:])
    rows.advance(ids.size(1))
    return last
