"""The largest value of each row on the CPU, and where it is: all that a greedy token needs of its logits."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, njit

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import float32_view, int64_view, share
from manylora.kernels.cpu.vectors import highest_512
from manylora.kernels.ops import Maxima

_BLOCK = 512


@njit(nogil=True)
def _first_maximum(values, address):
    """The place of the first of the largest values, or of the first NaN; ``address`` is theirs."""
    highest, start, whole = np.float32(-np.inf), 0, values.size // _BLOCK * _BLOCK
    for block in range(0, whole, _BLOCK):
        found = highest_512(address + 4 * block)
        if not found <= highest:  # larger, or NaN
            highest, start = found, block
            if found != found:
                break
    place = 0
    for i in range(start, whole):
        if values[i] == highest or values[i] != values[i]:
            place = i
            break
    if highest == highest:
        for i in range(whole, values.size):
            if not values[i] <= highest:
                highest, place = values[i], i
                if highest != highest:
                    break
    return place


@kernel
def _maxima_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    x, stride, rows, width = a[0], a[1], a[2], a[3]
    first, last = share(rows, part, parts, 1)
    highest, places = float32_view(a[4], rows), int64_view(a[5], rows)
    for row in range(first, last):
        values = float32_view(x + row * stride, width)
        places[row] = _first_maximum(values, x + row * stride)
        highest[row] = values[places[row]]


def first_maxima(x: torch.Tensor) -> Maxima:
    """Of each row of ``x``, fp32 ``[rows, width]`` with contiguous rows; see ``ops.Maxima``. Within ``queued`` they are
    there when that has ended."""
    rows, width = x.shape
    highest, places = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    launch(
        _maxima_kernel, x.data_ptr(), x.stride(0) * 4, rows, width, highest.data_ptr(), places.data_ptr(),
        keep=(x, highest, places),
    )  # fmt: skip
    return Maxima(highest.numpy(), places.numpy())
