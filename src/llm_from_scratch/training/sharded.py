"""A tensor of which every process holds a part (a DTensor, as FSDP2 makes them) seen whole, and the way back.

Whatever works element by element (AdamW, clipping, momentum) needs neither. What looks at a matrix as one thing, or writes it down,
does. A tensor that is not shared passes through both at no cost.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, on every process; one that is shared is gathered, so all processes must ask at once."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def shared_like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, which every process has whole, shared out as `other` is. Nothing is sent: each keeps its part."""
    if not is_shared(other):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(other, DTensor)
    mesh = other.device_mesh
    everywhere = DTensor.from_local(tensor.to(other.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=other.placements)


def is_shared(tensor: Tensor) -> TypeGuard[Any]:
    """By what it can do rather than by its type, whose import takes a second that one process alone need not spend."""
    return hasattr(tensor, "full_tensor")
