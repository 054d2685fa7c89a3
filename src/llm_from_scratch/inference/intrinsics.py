"""What numba has no words for, to be called in what it compiles: single instructions, and an `exp` that takes several numbers at once.

numba tells by the text of `kernels.py` whether what it kept of it is still good: who changes something here, or `int8.STEPS`, deletes
`__pycache__/kernels.*.nb?`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

SUMS = {"reassoc", "contract", "nsz", "arcp"}
"""What a compiler may do to sums, so that it can take several terms at once. Infinities and NaN stay what they are."""
let_others: Any = types.ExternalFunction("sched_yield", types.int32())
"""Lets another thread have this core."""


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """An address as `carray` wants it."""
    return types.voidptr(address), lambda target, builder, signature, arguments: builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())


@intrinsic
def float_of(context: Any, bits: Any) -> Any:
    """The float32 that has these bits, an int32's."""
    return types.float32(bits), lambda target, builder, signature, arguments: builder.bitcast(arguments[0], ir.FloatType())


@intrinsic
def arrive(context: Any, meeting: Any) -> Any:
    """Counts one more, and all that was written before can be seen by who sees it; returns 0."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        count = target.make_array(meeting)(target, builder, arguments[0]).data
        builder.atomic_rmw("add", count, ir.IntType(64)(1), "seq_cst")
        return ir.IntType(64)(0)

    return types.int64(meeting), generate


@intrinsic
def read(context: Any, meeting: Any, place: Any) -> Any:
    """What another core may have written meanwhile."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = target.make_array(meeting)(target, builder, arguments[0])
        return builder.load_atomic(builder.gep(array.data, [arguments[1]]), "seq_cst", 8)

    return types.int64(meeting, place), generate


@intrinsic
def prefetch(context: Any, array: Any, place: Any) -> Any:
    """Asks for the cache line of `array[place]`; beyond the end of the array nothing happens."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.gep(target.make_array(array)(target, builder, arguments[0]).data, [arguments[1]])
        byte = builder.bitcast(address, ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte.type, number, number, number])
        reading, near, data = number(0), number(3), number(1)
        builder.call(builder.module.declare_intrinsic("llvm.prefetch", [byte.type], kind), [byte, reading, near, data])
        return target.get_dummy_value()

    return types.void(array, place), generate


@njit(fastmath=SUMS, error_model="numpy")
def exp(x: Any) -> Any:
    """e to the x in float32 but for its last bit, and unlike libm's for several x at once: 2**n by its bits, and Cephes' polynomial."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    found = np.float32(1.9875691500e-4)
    found = found * r + np.float32(1.3981999507e-3)
    found = found * r + np.float32(8.3334519073e-3)
    found = found * r + np.float32(4.1665795894e-2)
    found = found * r + np.float32(1.6666665459e-1)
    found = found * r + np.float32(5.0000001201e-1)
    return (found * r * r + r + np.float32(1)) * float_of(np.int32((n + np.float32(127)) * np.float32(1 << 23)))
