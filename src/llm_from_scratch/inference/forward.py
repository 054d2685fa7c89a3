"""A forward through slots in as little time as it takes.

Up to SEVERAL tokens of a plain Llama in float32 or in our 8 bits, on a CPU, go through `kernels`, compiled to machine code. More of them,
a gpt, a wrapped model, bitsandbytes' layers and a GPU go through the model's own forward. The numbers are the same but for the last bits,
and in 8 bits but for activations in bfloat16 (see `int8`), which are float32 here. Weights stay where they are, so what changes in place is
seen; a model that is moved or converted afterwards is not.

The machine code is made once a machine, which takes ten seconds, and kept beside the package or in the user's cache folder.

Shapes: B rows, T tokens, M = B · T, V vocabulary, L layers, C width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from llm_from_scratch.inference.decoding import number_of_threads
from llm_from_scratch.inference.int8 import Dynamic, Int8Linear, WeightOnly
from llm_from_scratch.inference.kv_cache import Array, SlotCache, SlotRows
from llm_from_scratch.inference.team import TEAM
from llm_from_scratch.model.llama import Block, Llama
from llm_from_scratch.model.rung import Rung, past_of

Forward = Callable[[Tensor, SlotRows, bool], Tensor]
"""ids (B, T), where they go, and whether all logits are wanted: (B, T, V), or (B, 1, V) of the last place only."""
SEVERAL = 16
"""Tokens up to which the compiled forward is faster than the model's own."""
SMALL = 2**20
"""Multiplications up to which one core is done before another has heard of it."""
NEAR = 2**22
"""Bytes of weights that a core still has at hand when the next token comes."""


def forward_of(model: nn.Module) -> Forward:
    """The quickest there is for `model`. It is in evaluation mode as long as the forward is used."""
    own = partial(_own, model)
    if type(model) is not Llama or not _is_compilable(model):
        return own
    compiled = CompiledLlama(model)
    return lambda ids, rows, every: (compiled if ids.numel() <= SEVERAL else own)(ids, rows, every)


class CompiledLlama:
    """A Forward for up to SEVERAL tokens, and for one caller at a time."""

    def __init__(self, model: Llama) -> None:
        from llm_from_scratch.inference import kernels

        self._kernels, self._shape, trunk = kernels, model.shape, model.model
        head = trunk.embed_tokens if model.lm_head is None else model.lm_head
        tensors = model.state_dict().values()
        self._parameters, far = sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors) > NEAR
        self._held: list[list[Any]] = [_tensors(cast(Block, block)) for block in trunk.layers]
        layers = np.array([[0 if tensor is None else tensor.data_ptr() for tensor in held] for held in self._held])
        like, rounded = _array(self._held[0][kernels.Q]), isinstance(cast(Block, trunk.layers[0]).mlp.up_proj, Dynamic)
        last = (_array(trunk.norm.weight)[None], _array(head.weight), _array(_scale(head)), isinstance(head, Dynamic))
        self._vocabulary, table = model.vocab_size, _array(trunk.embed_tokens.weight)
        turns = _array(trunk.cos)[:, 0], _array(trunk.sin)[:, 0]
        self._parts = (table, layers, like, rounded, last, float(model.shape.norm_eps), far, turns)
        self._rooms: dict[tuple[int, int], tuple[Array, ...]] = {}
        self(torch.zeros(1, 1, dtype=torch.int64), SlotCache(model, 1, 1).rows(0, 1, 1, ()), False)  # or the first request would wait

    def __call__(self, ids: Tensor, rows: SlotRows, every: bool) -> Tensor:
        B, T = ids.shape
        tokens = B * T
        cores = torch.get_num_threads() if self._parameters * tokens > SMALL else 1
        if rows.length + T > self._shape.context:
            raise ValueError(f"found {rows.length + T} tokens, the context holds {self._shape.context}; give the last of them only")
        each = 1 if every else T
        logits = np.empty((self._padded(tokens // each), self._vocabulary), np.float32)
        state = (_array(ids.contiguous()), *rows.targets(), rows.cache.addresses, rows.cache.shape, self._room(tokens, cores), each, logits)
        TEAM.run(lambda core, meeting: self._kernels.forward(core, cores, meeting, self._parts, state), cores)
        rows.advance(T)
        return torch.from_numpy(logits[: tokens // each]).view(B, -1, self._vocabulary)

    def _room(self, tokens: int, cores: int) -> tuple[Array, ...]:
        """Padded room for x, for what is made of it in between, and a spare x for each core."""
        key = padded, _ = self._padded(tokens), cores
        if key not in self._rooms:
            shape = self._shape
            answers, inside = shape.heads * shape.head_dim, shape.hidden
            sizes = (shape.width, answers + 2 * shape.kv_heads * shape.head_dim, answers, inside, inside, inside)
            shapes = [*((padded, size) for size in sizes), (cores, padded, shape.width)]
            self._rooms[key] = tuple(np.zeros(shape, np.float32) for shape in shapes)
        return self._rooms[key]

    def _padded(self, tokens: int) -> int:
        return -(-tokens // self._kernels.TILE) * self._kernels.TILE


def _is_compilable(model: Llama) -> bool:
    """Whether all of it is what `kernels` computes: in float32 on a CPU, in its matrices our 8 bits or none, and no matrix below a tile."""
    from llm_from_scratch.inference.kernels import TILE

    blocks = [cast(Block, block) for block in model.model.layers]
    attention = {type(layer) for block in blocks for layer in block.self_attn.children() if not isinstance(layer, nn.RMSNorm)}
    mlp = {type(layer) for block in blocks for layer in block.mlp.children()}
    shape, weights = model.shape, list(model.parameters())
    plain = all(weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous() for weight in weights)
    ends = type(model.model.embed_tokens) is nn.Embedding and type(model.lm_head) in (type(None), nn.Linear, WeightOnly, Dynamic)
    biased = any(getattr(layer, "bias", None) is not None for layer in model.modules())
    large = min(shape.width, shape.hidden, shape.vocab_size, shape.kv_heads * shape.head_dim) >= TILE
    kinds = (attention, mlp) in (({nn.Linear},) * 2, ({WeightOnly},) * 2, ({WeightOnly}, {Dynamic}))
    return os.name == "posix" and plain and ends and not biased and large and kinds


def _tensors(block: Block) -> list[Tensor | None]:
    """What `kernels.forward` wants the addresses of, held by themselves: a layer that is converted lets go of its memory."""
    attention, mlp = block.self_attn, block.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    of_heads = (attention.q_norm.weight, attention.k_norm.weight) if attention.qk_norm else (None, None)
    before = (block.input_layernorm.weight, block.post_attention_layernorm.weight)
    tensors = [*before, *of_heads, *(layer.weight for layer in linears), *map(_scale, linears)]
    return [None if tensor is None else tensor.detach() for tensor in tensors]


def _scale(layer: nn.Module) -> Tensor:
    """By which each row of its weights is still to be multiplied."""
    return layer.scale if isinstance(layer, Int8Linear) else torch.ones(len(cast(Tensor, layer.weight)))


def _array(tensor: Tensor) -> Array:
    """The same memory."""
    return tensor.detach().numpy()


def _own(model: nn.Module, ids: Tensor, rows: SlotRows, every: bool) -> Tensor:
    """The model's own forward; a rung's without the head at places that nobody asks for."""
    with number_of_threads(model, ids.numel()):
        if every or not isinstance(model, Rung):
            logits: Tensor = model(ids, rows)
            return logits if every else logits[:, -1:]
        last = model.unembed(model.mix(model.embed(ids, past_of(rows)), rows)[:, -1:])
        rows.advance(ids.size(1))
        return last
