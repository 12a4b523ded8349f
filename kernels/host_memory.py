"""Zeros in host memory that are not there until they are written, and begin with a cache line."""

from __future__ import annotations

import math

import numpy as np
import torch

_LINE = 64


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``torch.zeros``, but the system commits a page of memory when it is first written (numpy has it calloc'ed), and
    no vector of a row of whole cache lines lies across two of them: a kernel that reads such waits twice."""
    memory = np.zeros(math.prod(shape) * dtype.itemsize + _LINE, np.uint8)
    first = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory[first : first + memory.size - _LINE]).view(dtype).view(shape)
