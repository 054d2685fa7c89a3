"""A forward through slots in as few calls as it takes: at one token a time, the calls cost more than the arithmetic of a small model.

Queries, keys and values are one product instead of three, and so are gate and up; heads turn together; the query heads of one key-value
head are read as so many queries; only the last place goes through the head. The numbers are those of the model's own forward but for the
last bits. What is no plain Llama (a gpt, a wrapped one, bitsandbytes' layers) goes through its own forward.

The packed matrices take the place of those they were made from, which become views of them: same names, no more memory. Those that no
longer learn lie in memory by columns, inputs first. For a few tokens at once that is where a CPU's BLAS is quick: eight rows of 576 numbers
by a matrix of 3,072 take it 1.3 times as long as one row, and by rows three times (MKL, AVX-512); a small matrix is read twice as fast by
one. Those that may learn on stay by rows, because an optimizer may write to a matrix as if it were one piece.

8-bit matrices stay by rows, as their kernels want them, but for small ones: those are unpacked to float32 for this forward, because out of
a core's own cache four bytes come sooner than activations are rounded to one.

Shapes: B rows, T tokens, M = B · T, V vocabulary, C width, H query heads, G key-value heads, R = H / G, S cached places, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.inference.decoding import SMALL_WEIGHT
from llm_from_scratch.inference.int8 import KERNELS, Int8Linear, dequantize
from llm_from_scratch.inference.kv_cache import SlotRows
from llm_from_scratch.model.llama import Block, Llama, LlamaShape
from llm_from_scratch.model.rung import Rung, past_of

Forward = Callable[[Tensor, SlotRows, bool], Tensor]
"""ids (B, T), where they go, and whether all logits are wanted: (B, T, V), or (B, 1, V) of the last place only."""
Product = Callable[[Tensor], Tensor]
"""(M, inputs) to (M, outputs)."""
Matrix = Tensor | Int8Linear
"""By columns, (inputs, outputs), or in 8 bits."""
FEW, SEVERAL, ROWS = 3, 32, 512
"""More tokens than the first and no more than the second are multiplied by so many rows of the head at a time: for eight of them in two
thirds of the time (49,152 rows, MKL)."""


def forward_of(model: nn.Module) -> Forward:
    """The quickest there is for `model`. It is in evaluation mode as long as the forward is used."""
    if type(model) is Llama:
        kinds = {type(layer) for block in model.model.layers for layer in _linears(block)}
        if kinds == {nn.Linear} or kinds <= set(KERNELS.values()):
            return FusedLlama(model)
    return lambda ids, rows, every: _own(model, ids, rows, every)


class FusedLlama:
    def __init__(self, model: Llama) -> None:
        self.trunk, self.shape, self.turns = model.model, model.shape, model.turns
        self.norm, self.head = norm(model.model.norm), head_of(model)
        self.layers = [FusedBlock(cast(Block, block), model.shape, place) for place, block in enumerate(model.model.layers)]

    def __call__(self, ids: Tensor, rows: SlotRows, every: bool) -> Tensor:
        B, T = ids.shape
        x = torch.embedding(self.trunk.embed_tokens.weight, ids.flatten())
        cos, sin = (table.view(-1, 1, self.shape.head_dim).to(x.dtype) for table in self.turns(past_of(rows), T))
        for layer in self.layers:
            x = layer(x, cos, sin, rows, B)
        rows.advance(T)
        x = x if every else x.view(B, T, -1)[:, -1]
        return self.head(self.norm(x)).view(B, -1, self.shape.vocab_size)


class FusedBlock:
    """One layer, (M, C) to (M, C)."""

    def __init__(self, block: Block, shape: LlamaShape, place: int) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.place, self.shape = place, shape
        self.before_attention, self.before_mlp = norm(block.input_layernorm), norm(block.post_attention_layernorm)
        self.qk_norms = (norm(attention.q_norm), norm(attention.k_norm)) if shape.qk_norm else None
        self.qkv = product(packed([attention.q_proj, attention.k_proj, attention.v_proj]))
        self.gate_up = product(packed([mlp.gate_proj, mlp.up_proj]))
        self.out, self.down = added(packed([attention.o_proj])), added(packed([mlp.down_proj]))

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, rows: SlotRows, B: int) -> Tensor:
        x = self.out(x, self.attend(self.before_attention(x), cos, sin, rows, B))
        gate, up = self.gate_up(self.before_mlp(x)).chunk(2, -1)
        return self.down(x, F.silu(gate) * up)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, rows: SlotRows, B: int) -> Tensor:
        """What the heads gathered, (M, H·D)."""
        H, G, D = self.shape.heads, self.shape.kv_heads, self.shape.head_dim
        qk, v = self.qkv(x).view(len(x), H + 2 * G, D).split_with_sizes([H + G, G], 1)
        if self.qk_norms is not None:
            q, k = qk.split_with_sizes([H, G], 1)
            qk = torch.cat((self.qk_norms[0](q), self.qk_norms[1](k)), 1)
        turned = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
        q, k = turned.view(B, -1, H + G, D).split_with_sizes([H, G], 2)
        keys, values = rows.put(self.place, k, v.view(B, -1, G, D))
        if len(x) == B:
            return F.scaled_dot_product_attention(q.reshape(B, G, H // G, D), keys, values, attn_mask=rows.mask).reshape(B, H * D)
        answers = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=rows.mask, enable_gqa=H != G)
        return answers.transpose(1, 2).reshape(len(x), H * D)


def packed(layers: Sequence[nn.Module]) -> Matrix:
    """One matrix in place of several of the same input, their outputs side by side; the layers then hold views of it."""
    sizes = [cast(int, layer.out_features) for layer in layers]
    if not isinstance(layers[0], Int8Linear):
        return _side_by_side([cast(nn.Parameter, layer.weight) for layer in layers], sizes)
    whole = layers[0] if len(layers) == 1 else _joined(cast(Sequence[Int8Linear], layers), sizes)
    small = whole.weight.numel() <= SMALL_WEIGHT
    return dequantize(whole.weight, whole.SCB).t().contiguous() if small else whole


def product(matrix: Matrix) -> Product:
    """x to x · matrix."""
    if not isinstance(matrix, Int8Linear):
        return partial(torch.mm, mat2=matrix)
    sums, scale = matrix.sums(), matrix.scale
    return lambda x: sums(x).mul(scale)


def added(matrix: Matrix) -> Callable[[Tensor, Tensor], Tensor]:
    """x and y to x + y · matrix."""
    if not isinstance(matrix, Int8Linear):
        return partial(torch.addmm, mat2=matrix)
    sums, scale = matrix.sums(), matrix.scale
    return lambda x, y: x.addcmul(sums(y), scale)


def _joined(layers: Sequence[Int8Linear], sizes: list[int]) -> Int8Linear:
    whole = type(layers[0])(torch.cat([layer.weight for layer in layers]), torch.cat([layer.SCB for layer in layers]), None).eval()
    held = (torch.split(tensor, sizes) for tensor in (whole.weight, whole.SCB, whole.scale))
    for layer, weight, largest, scale in zip(layers, *held, strict=True):
        layer.weight, layer.SCB, layer.scale = weight, largest, scale
    return whole


def _side_by_side(weights: Sequence[nn.Parameter], sizes: list[int]) -> Tensor:
    """(C, N) of weights (…, C). Where they lie in memory as they should, because this was done before, nothing is copied."""
    first, width, inputs = weights[0].data, sum(sizes), weights[0].size(1)
    learning = any(weight.requires_grad for weight in weights)
    strides, step = ((inputs, 1), inputs) if learning else ((1, width), 1)
    begins = [first.data_ptr() + first.element_size() * step * sum(sizes[:place]) for place in range(len(sizes))]
    one_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if one_storage and all(weight.stride() == strides and weight.data_ptr() == at for weight, at in zip(weights, begins, strict=True)):
        return first.as_strided((inputs, width), strides[::-1])
    rows = [weight.data for weight in weights]
    whole = torch.cat(rows).t() if learning else torch.cat([part.t() for part in rows], 1).contiguous()
    for weight, part in zip(weights, torch.split(whole, sizes, 1), strict=True):
        weight.data = part.t()
    return whole


def head_of(model: Llama) -> Product:
    """(M, C) to logits (M, V)."""
    head: nn.Module | None = model.lm_head
    if isinstance(head, Int8Linear):
        return product(head)
    weight = cast(nn.Parameter, (head or model.model.embed_tokens).weight)
    return lambda x: _in_parts(x, weight) if FEW < len(x) <= SEVERAL else F.linear(x, weight)


def _in_parts(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, C) times weight (V, C), whose rows the embedding wants whole: a batch of small products, and what is left over."""
    parts, width = len(weight) // ROWS, weight.size(1)
    blocks = weight[: parts * ROWS].view(parts, ROWS, width)
    found = torch.matmul(x, blocks.transpose(1, 2)).transpose(0, 1).reshape(len(x), parts * ROWS)
    return torch.cat((found, F.linear(x, weight[parts * ROWS :])), 1)


def norm(layer: nn.Module) -> Product:
    """RMSNorm, (…, C), in as few operations as it takes; F.rms_norm needs twice as long to find them on a CPU."""
    weight, eps = cast(nn.RMSNorm, layer).weight, cast(nn.RMSNorm, layer).eps
    assert eps is not None
    share, least = 1 / weight.numel(), torch.tensor(eps, device=weight.device, dtype=weight.dtype)

    def normed(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True)
        return (x * weight).mul_(torch.addcmul(least, length, length, value=share).rsqrt_())

    return normed


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
