"""Sines and cosines of positions, the same bits in every process.

The first torch.cos or torch.sin of a process goes to MKL's vector library from all threads at once, and about one time in ten some
thread is served by another of its kernels: the last bits differ, and with them every weight trained on top, whatever the seed. NumPy
has no such race.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `angles`, in radians and of any shape, each the float32 nearest to the true value."""
    exact = angles.double().numpy()
    return torch.from_numpy(np.cos(exact)).float(), torch.from_numpy(np.sin(exact)).float()
