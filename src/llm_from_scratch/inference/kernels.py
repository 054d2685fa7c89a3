"""A forward of a few tokens as machine code: what torch does in sixty small operations a layer, numba makes one function of.

A token for one request costs as long as its weights take to come from memory, so each product reads its matrix once, from the first row to
the last, asks for what comes next AHEAD of time, and nothing is called in between. Every core runs the same function, takes its share of
the rows of a product or of the heads of attention, and meets the others where it needs what they made. What it cannot do is many tokens at
once: their products are bound by arithmetic, and a BLAS is the better one.

8-bit weights are turned to float32 on the way and activations stay float32, or are rounded first where the scheme says so (`rounded`).
Sums are taken in the order that suits the processor, so last bits are not torch's. Those of a token do not depend on the tokens beside it
or on the number of cores, but a FEW may differ from the same among more.

Arrays hold M tokens, padded to a multiple of TILE; what stands in the padding is of no interest. Weights come as addresses, for to unpack
two hundred arrays would take longer than a small model does.

Shapes: L layers, M tokens, C width, I inside the MLP, V vocabulary, H query heads, G key-value heads, D head width, S places in a slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from llm_from_scratch.inference.int8 import STEPS
from llm_from_scratch.inference.intrinsics import SUMS, arrive, exp, let_others, pointer, prefetch, read

Floats = NDArray[np.float32]
Whole = NDArray[np.int64]
Weights = Floats | NDArray[np.int8]
"""By rows: (outputs, inputs)."""
TILE = 4
"""Tokens that share a row of weights, or rows that share a token, once they are in registers."""
AHEAD = 8192
"""Bytes between what is multiplied and what is asked for. Without, two cores read 8-bit weights at half the speed of the memory."""
FEW = 2
"""Tokens that are quicker one by one than in a tile that is half empty."""
PATIENCE = 2000
"""How often a core looks for the others before it lets another thread take its place."""
TINY = np.finfo(np.float32).tiny
BEFORE_ATTENTION, BEFORE_MLP, Q_NORM, K_NORM, Q, K, V, OUT, GATE, UP, DOWN, SCALES = range(12)
"""Places of a layer's addresses: norms, matrices, and behind them, in the same order, the matrices' scales."""


def _kept(function: Callable[..., Any]) -> Any:
    """Compiled on first use, without the interpreter's lock, and kept on disk where there is a place for it."""
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(nogil=True, error_model="numpy")(function)


@_kept
def forward(core: int, cores: int, meeting: Whole, model: tuple[Any, ...], state: tuple[Any, ...]) -> None:
    """This core's share of a forward. `meeting` holds 0 and 0; a core that cannot come sets the second to 1, and nobody waits any more.

    The `model` is: embeddings (V, C); addresses of each layer (L, 18; see BEFORE_ATTENTION; a norm at 0 is none), of matrices of the type
    of `like`; whether the MLPs' activations are rounded to 8 bits; the head's norm (1, C), weights, scales, and whether it rounds, too; the
    norms' epsilon; whether weights come from memory (`far`); and cosines and signed sines of all places, (T, D).

    The `state` is: ids (B, T), the slot of the first row, and where each row begins in its slot, (B,); addresses of keys and values (L, 2)
    and the shape of each, (slots, S, G, D); room for x (M, C), for queries, keys and values side by side, what attention gathers, gate, up,
    and what they make (M, I), and a spare x for each core; of how many tokens one's logits are wanted (`each`), and room for them.

    Raises IndexError for an id that is none of the vocabulary's.
    """
    table, layers, like, rounded, head, eps, far, turns = model
    ids, first, starts, stored, store, room, each, logits = state
    x, qkv, mixed, gate, up, gated, spares = room
    slots, places = _read(ids, table, first, starts, x)
    G, D = store[2:]
    tokens, spare, met, scores, H, C = len(slots), spares[core], 0, np.empty(store[1], np.float32), mixed.shape[1] // D, x.shape[1]
    for layer in range(len(layers)):
        at = layers[layer]
        keys = carray(pointer(stored[layer, 0]), store, np.float32)
        values = carray(pointer(stored[layer, 1]), store, np.float32)
        _norm(x, 0, tokens, carray(pointer(at[BEFORE_ATTENTION]), (1, C), np.float32), eps, spare)
        _product(at, Q, like, H * D, spare, qkv, 0, tokens, far, core, cores)
        _product(at, K, like, G * D, spare, qkv, H * D, tokens, far, core, cores)
        _product(at, V, like, G * D, spare, qkv, (H + G) * D, tokens, far, core, cores)
        met = _meet(meeting, met, cores)
        _place(qkv.reshape(-1, D), at, eps, turns, keys, values, slots, places, core, cores)
        met = _meet(meeting, met, cores)
        _attend(qkv.reshape(-1, D), keys, values, slots, places, scores, mixed.reshape(-1, D), core, cores)
        met = _meet(meeting, met, cores)
        _product(at, OUT, like, C, mixed, spare, 0, tokens, far, core, cores)
        _add(x, spare, tokens, core, cores)
        met = _meet(meeting, met, cores)
        _norm(x, 0, tokens, carray(pointer(at[BEFORE_MLP]), (1, C), np.float32), eps, spare)
        if rounded:
            _round(spare, tokens)
        _product(at, GATE, like, gate.shape[1], spare, gate, 0, tokens, far, core, cores)
        _product(at, UP, like, gate.shape[1], spare, up, 0, tokens, far, core, cores)
        _silu(gate, up, gated, tokens, core, cores)
        met = _meet(meeting, met, cores)
        if rounded and core == 0:
            _round(gated, tokens)
        met = _meet(meeting, met, cores if rounded else 1)
        _product(at, DOWN, like, C, gated, spare, 0, tokens, far, core, cores)
        _add(x, spare, tokens, core, cores)
        met = _meet(meeting, met, cores)
    _last(x, tokens // each, each, head, eps, far, spare, logits, core, cores)
    _meet(meeting, met, cores)


@njit(error_model="numpy")
def _read(ids: Whole, table: Floats, first: int, starts: Whole, x: Floats) -> tuple[Whole, Whole]:
    """Slot and place of each token, (M,). Fills x, each core all of it: the same numbers, and nobody has to wait for them."""
    slots, places, T = np.empty(ids.size, np.int64), np.empty(ids.size, np.int64), ids.shape[1]
    for token in range(ids.size):
        found = ids[token // T, token % T]
        if not 0 <= found < len(table):
            raise IndexError("a token id is not one of the vocabulary's; encode with this model's tokenizer")
        slots[token], places[token] = first + token // T, starts[token // T] + token % T
        for place in range(x.shape[1]):
            x[token, place] = table[found, place]
    return slots, places


@njit(error_model="numpy")
def _last(
    x: Floats, wanted: int, each: int, head: Any, eps: float, far: bool, spare: Floats, logits: Floats, core: int, cores: int
) -> None:
    """This core's share of the logits (M, V) of every `each`-th token."""
    norm, weights, scale, rounded = head
    for token in range(wanted):
        for place in range(x.shape[1]):
            spare[token, place] = x[token * each + each - 1, place]
    _norm(spare, 0, wanted, norm, eps, spare)
    if rounded:
        _round(spare, wanted)
    begin, end = _share(logits.shape[1], core, cores)
    _multiply(weights, scale, spare, logits, 0, wanted, far, begin, end)


@njit(error_model="numpy")
def _product(
    at: Whole, which: int, like: Weights, outputs: int, x: Floats, y: Floats, column: int, tokens: int, far: bool, core: int, cores: int
) -> None:
    """y (M, …), from a column on, of x (M, inputs) and one of a layer's matrices, by this core's share of the rows."""
    weights = carray(pointer(at[which]), (outputs, x.shape[1]), like.dtype)
    scale = carray(pointer(at[which + SCALES - Q]), (outputs,), np.float32)
    begin, end = _share(outputs, core, cores)
    _multiply(weights, scale, x, y, column, tokens, far, begin, end)


@njit(error_model="numpy")
def _multiply(weights: Weights, scale: Floats, x: Floats, y: Floats, column: int, tokens: int, far: bool, begin: int, end: int) -> None:
    """The same by the rows from `begin` to `end`. A last tile that is not full reaches back, and makes some numbers again."""
    tiled = tokens if tokens > FEW else 0
    for first in range(begin, end, TILE):
        row = min(first, len(weights) - TILE)
        if far:
            _ask(weights, row)
        for token in range(0, tiled, TILE):
            _pair(weights, scale, row, x, token, y, column)
            _pair(weights, scale, row + 2, x, token, y, column)
        for token in range(tiled, tokens):
            _rows(weights, scale, row, x, token, y, column)


@njit(error_model="numpy")
def _ask(weights: Weights, row: int) -> None:
    """For TILE rows, AHEAD of this one."""
    flat, inputs, line = weights.reshape(-1), weights.shape[1], 64 // weights.itemsize
    ahead = row * inputs + AHEAD // weights.itemsize
    for place in range(ahead, ahead + TILE * inputs, line):
        prefetch(flat, place)


@njit(fastmath=SUMS, error_model="numpy")
def _rows(weights: Weights, scale: Floats, row: int, x: Floats, token: int, y: Floats, column: int) -> None:
    """One token's products with TILE rows."""
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for place in range(x.shape[1]):
        found = x[token, place]
        a += np.float32(weights[row, place]) * found
        b += np.float32(weights[row + 1, place]) * found
        c += np.float32(weights[row + 2, place]) * found
        d += np.float32(weights[row + 3, place]) * found
    column += row
    y[token, column], y[token, column + 1] = a * scale[row], b * scale[row + 1]
    y[token, column + 2], y[token, column + 3] = c * scale[row + 2], d * scale[row + 3]


@njit(fastmath=SUMS, error_model="numpy")
def _pair(weights: Weights, scale: Floats, row: int, x: Floats, token: int, y: Floats, column: int) -> None:
    """The products of TILE tokens with two rows."""
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    e, f, g, h = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for place in range(x.shape[1]):
        first, second = np.float32(weights[row, place]), np.float32(weights[row + 1, place])
        a += first * x[token, place]
        b += first * x[token + 1, place]
        c += first * x[token + 2, place]
        d += first * x[token + 3, place]
        e += second * x[token, place]
        f += second * x[token + 1, place]
        g += second * x[token + 2, place]
        h += second * x[token + 3, place]
    column += row
    y[token, column], y[token, column + 1] = a * scale[row], e * scale[row + 1]
    y[token + 1, column], y[token + 1, column + 1] = b * scale[row], f * scale[row + 1]
    y[token + 2, column], y[token + 2, column + 1] = c * scale[row], g * scale[row + 1]
    y[token + 3, column], y[token + 3, column + 1] = d * scale[row], h * scale[row + 1]


@njit(error_model="numpy")
def _place(
    heads: Floats, at: Whole, eps: float, turns: Any, keys: Floats, values: Floats, slots: Whole, places: Whole, core: int, cores: int
) -> None:
    """Turns queries, turns and stores keys, and stores values: this core's share of heads (M · (H + 2 G), D)."""
    G, D = keys.shape[2:]
    each = len(heads) // (-(-len(slots) // TILE) * TILE)
    begin, end = _part(len(slots) * each, core, cores)
    for row in range(begin, end):
        token, head = row // each, row % each
        slot, place = slots[token], places[token]
        if head >= each - G:
            for part in range(D):
                values[slot, place, head - each + G, part] = heads[row, part]
            continue
        norm = at[Q_NORM] if head < each - 2 * G else at[K_NORM]
        if norm:
            _norm(heads, row, row + 1, carray(pointer(norm), (1, D), np.float32), eps, heads)
        _turn(heads, row, turns[0], turns[1], place)
        if head >= each - 2 * G:
            for part in range(D):
                keys[slot, place, head - each + 2 * G, part] = heads[row, part]


@njit(error_model="numpy")
def _turn(heads: Floats, row: int, cos: Floats, sin: Floats, place: int) -> None:
    """Rotary positions, in the half-split layout; `sin` is signed (see model.llama.rotation_tables)."""
    half = heads.shape[1] // 2
    for low in range(half):
        high = low + half
        a, b = heads[row, low], heads[row, high]
        heads[row, low] = a * cos[place, low] + b * sin[place, low]
        heads[row, high] = b * cos[place, high] + a * sin[place, high]


@njit(fastmath=SUMS, error_model="numpy")
def _attend(
    heads: Floats, keys: Floats, values: Floats, slots: Whole, places: Whole, scores: Floats, answers: Floats, core: int, cores: int
) -> None:
    """What each query gathers from the values of its slot and group by their keys: this core's share of answers (M · H, D)."""
    G, D = keys.shape[2:]
    H = len(answers) // (-(-len(slots) // TILE) * TILE)
    share, (begin, end) = np.float32(1 / math.sqrt(D)), _part(len(slots) * H, core, cores)
    for query in range(begin, end):
        token, head = query // H, query % H
        row, slot, group, seen = token * (H + 2 * G) + head, slots[token], head // (H // G), places[token] + 1
        largest, total = np.float32(-np.inf), np.float32(0)
        for place in range(seen):
            score = np.float32(0)
            for part in range(D):
                score += keys[slot, place, group, part] * heads[row, part]
            scores[place] = score * share
            largest = max(largest, scores[place])
        for place in range(seen):
            scores[place] = exp(scores[place] - largest)
            total += scores[place]
        for part in range(D):
            answers[query, part] = 0
        for place in range(seen):
            for part in range(D):
                answers[query, part] += scores[place] / total * values[slot, place, group, part]


@njit(fastmath=SUMS, error_model="numpy")
def _norm(x: Floats, begin: int, end: int, weight: Floats, eps: float, y: Floats) -> None:
    """RMSNorm of some rows of x into those of y."""
    for row in range(begin, end):
        squares = np.float32(0)
        for place in range(x.shape[1]):
            squares += x[row, place] * x[row, place]
        share = np.float32(1 / math.sqrt(squares / x.shape[1] + eps))
        for place in range(x.shape[1]):
            y[row, place] = x[row, place] * share * weight[0, place]


@njit(error_model="numpy")
def _round(x: Floats, tokens: int) -> None:
    """Each token to STEPS whole numbers on either side of zero, times its step, as `int8.Dynamic` does."""
    for token in range(tokens):
        largest = np.float32(0)
        for place in range(x.shape[1]):
            largest = max(largest, abs(x[token, place]))
        step = np.float32(TINY + largest / np.float32(STEPS))
        for place in range(x.shape[1]):
            x[token, place] = np.rint(x[token, place] / step) * step


@njit(fastmath=SUMS, error_model="numpy")
def _silu(gate: Floats, up: Floats, gated: Floats, tokens: int, core: int, cores: int) -> None:
    """silu(gate) · up, this core's share of (M, I). (Not in place: a tile that reaches back may write to another core's share of gate.)"""
    begin, end = _share(gate.shape[1], core, cores)
    for token in range(tokens):
        some, other, found = gate[token, begin:end], up[token, begin:end], gated[token, begin:end]
        for place in range(len(some)):
            found[place] = some[place] / (np.float32(1) + exp(-some[place])) * other[place]


@njit(error_model="numpy")
def _add(x: Floats, y: Floats, tokens: int, core: int, cores: int) -> None:
    """y (M, C) to this core's share of x."""
    begin, end = _share(x.shape[1], core, cores)
    for token in range(tokens):
        some, other = x[token, begin:end], y[token, begin:end]
        for place in range(len(some)):
            some[place] += other[place]


@njit(error_model="numpy")
def _share(outputs: int, core: int, cores: int) -> tuple[int, int]:
    """Where the columns of one core begin and end: whole tiles, so that no sum depends on how many cores there are."""
    begin, end = _part((outputs + TILE - 1) // TILE, core, cores)
    return begin * TILE, min(outputs, end * TILE)


@njit(error_model="numpy")
def _part(work: int, core: int, cores: int) -> tuple[int, int]:
    return work * core // cores, work * (core + 1) // cores


@njit(error_model="numpy")
def _meet(meeting: Whole, met: int, cores: int) -> int:
    """Waits until all cores have come here; how many have come so far, all meetings together."""
    if cores == 1:
        return met
    met += cores
    looks = arrive(meeting)
    while read(meeting, 0) < met and not read(meeting, 1):
        looks += 1
        if looks % PATIENCE == 0:
            let_others()
    return met
