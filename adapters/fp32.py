"""What loading computes on adapters' tensors, in numpy and fp32.

Not in torch: its operations would wake a second team of OpenMP threads for the loader's thread, beside the one that
computes a step at the same time. numpy lets other Python threads run meanwhile, too.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


def array(tensor: torch.Tensor) -> Array:
    """The values of a CPU tensor of fp32, fp16 or bf16, exactly; of fp32 a view of the same memory."""
    if tensor.dtype == torch.bfloat16:  # the upper half of fp32
        bits = tensor.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        return (bits << np.uint32(16)).view(np.float32)
    return tensor.detach().contiguous().numpy().astype(np.float32, copy=False)


def tensor(values: Array) -> torch.Tensor:
    """A contiguous fp32 tensor of the values; the same memory where they are contiguous."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def non_finite(value: torch.Tensor) -> int:
    """How many values are infinite or not a number."""
    return value.numel() - int(np.count_nonzero(np.isfinite(array(value))))


def peaks(value: torch.Tensor, axis: int) -> Array:
    """The largest magnitude along ``axis`` of a matrix; 0 where that axis is empty."""
    values = array(value)
    highest: Array = np.maximum(values.max(axis=axis, initial=0.0), -values.min(axis=axis, initial=0.0))
    return highest


def highest(value: torch.Tensor) -> float:
    """The largest magnitude; NaN if there is one, 0 if there is nothing."""
    values = array(value)
    return float(max(values.max(), -values.min())) if values.size else 0.0


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two matrices have the same shape and values."""
    return one.shape == other.shape and np.array_equal(array(one), array(other))


def equal_but_for_rounding(value: torch.Tensor, rounded: torch.Tensor) -> float:
    """0 if fp32 ``rounded`` has the values of ``value``, or all of them rounded to bf16 or all to fp16; else the
    largest difference between the two. Both ``[rows, columns]``."""
    kinds = {value.dtype, torch.bfloat16, torch.float16}
    gap = 0.0
    # Few enough values for torch to convert on this thread alone.
    step = max(1, 32_768 // max(1, value.shape[1]))
    for first in range(0, len(value), step):
        part, own = value[first : first + step], rounded[first : first + step]
        kinds -= {kind for kind in kinds if not torch.equal(part.to(kind).float(), own)}
        gap = max(gap, float(np.abs(array(part) - array(own)).max(initial=0.0)))
    return 0.0 if kinds else gap
