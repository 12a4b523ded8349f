"""Gains and biases of adapters on the CPU: ``y[row] += scale * ((gain - 1) * base[row] + bias)``.

The base's product is added to what y held (residual, bias) in one chain, so it is not there any more when the adapters
come. For the few rows that need it, what y holds is set aside before the product and added again after it
(``set_aside``, ``take_products``): one pass over the weights all the same, and no other row's bits change. The order of
every sum is fixed: what was held, the product, then the row's adapters in the order of the segments. Columns are shared
out among threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import float32_at, int32_at
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import float32_view, share
from manylora.kernels.lora_pool import SiteStore
from manylora.kernels.lora_step import VectorRows

_SERIAL = 16384
"""Elements below which waking the other threads costs more than it saves."""


@kernel
def _set_aside_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    y, y_stride, rows, count, held, width = a[0], a[1], a[2], a[3], a[4], a[5]
    first, last = share(width, part, parts, 16)
    for v in range(count):
        source = float32_view(y + int32_at(rows, v) * y_stride, width)
        target = float32_view(held + 4 * v * width, width)
        for i in range(first, last):
            target[i] = source[i]
            source[i] = 0.0


@kernel
def _take_products_kernel(arguments, part, parts):
    a = carray(arguments, 7)
    y, y_stride, rows, count, held, width, base = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    first, last = share(width, part, parts, 16)
    for v in range(count):
        source = float32_view(y + int32_at(rows, v) * y_stride, width)
        target = float32_view(base + 4 * v * width, width)
        for i in range(first, last):
            target[i] = source[i]
        if held != 0:
            before = float32_view(held + 4 * v * width, width)
            for i in range(first, last):
                source[i] = before[i] + source[i]


@kernel
def _add_vectors_kernel(arguments, part, parts):
    a = carray(arguments, 12)
    y, y_stride, rows, count, base, width = a[0], a[1], a[2], a[3], a[4], a[5]
    bounds, slots, scales, gains, biases, slot_stride = a[6], a[7], a[8], a[9], a[10], a[11]
    first, last = share(width, part, parts, 16)
    for v in range(count):
        target = float32_view(y + int32_at(rows, v) * y_stride, width)
        product = float32_view(base + 4 * v * width, width)
        for pair in range(int32_at(bounds, v), int32_at(bounds, v + 1)):
            slot, scale = int32_at(slots, pair), float32_at(scales, pair)
            gain, bias = (
                float32_view(gains + slot * slot_stride, width),
                float32_view(biases + slot * slot_stride, width),
            )
            for i in range(first, last):
                target[i] = target[i] + scale * ((gain[i] - np.float32(1.0)) * product[i] + bias[i])


def set_aside(y: torch.Tensor, vectors: VectorRows, held: torch.Tensor) -> None:
    """Move the rows with vectors of ``y`` ``[T, N]`` to ``held`` ``[R, N]``, and set them to zero."""
    rows = torch.from_numpy(vectors.host_rows)
    launch(
        _set_aside_kernel, y.data_ptr(), y.stride(0) * 4, rows.data_ptr(), vectors.count, held.data_ptr(), y.shape[1],
        keep=(y, rows, held), parallel=held.numel() > _SERIAL,
    )  # fmt: skip


def take_products(y: torch.Tensor, vectors: VectorRows, held: torch.Tensor | None, base: torch.Tensor) -> None:
    """Copy the rows with vectors of ``y`` ``[T, N]`` to ``base`` ``[R, N]``, and add ``held`` to them."""
    rows = torch.from_numpy(vectors.host_rows)
    launch(
        _take_products_kernel, y.data_ptr(), y.stride(0) * 4, rows.data_ptr(), vectors.count,
        0 if held is None else held.data_ptr(), y.shape[1], base.data_ptr(),
        keep=(y, rows, base) if held is None else (y, rows, base, held), parallel=base.numel() > _SERIAL,
    )  # fmt: skip


def add_vectors(y: torch.Tensor, base: torch.Tensor, vectors: VectorRows, store: SiteStore, layer: int) -> None:
    """Add gains and biases to ``y`` ``[T, N]``; ``base`` ``[R, N]`` contiguous: the products of the rows with
    vectors."""
    gain, bias = store.gain, store.bias
    rows, bounds, slots, scales = map(
        torch.from_numpy, (vectors.host_rows, vectors.bounds, vectors.slots, vectors.scales)
    )
    launch(
        _add_vectors_kernel, y.data_ptr(), y.stride(0) * 4, rows.data_ptr(), vectors.count, base.data_ptr(), y.shape[1],
        bounds.data_ptr(), slots.data_ptr(), scales.data_ptr(), gain.data_ptr() + layer * gain.stride(1) * 4,
        bias.data_ptr() + layer * bias.stride(1) * 4, gain.stride(0) * 4,
        keep=(y, base, rows, bounds, slots, scales), parallel=base.numel() > _SERIAL,
    )  # fmt: skip
