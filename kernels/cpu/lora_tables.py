"""Logits of the rows that an adapter puts in the place of the base's, on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray

from manylora.kernels.cpu.bf16_linear import bf16_linear
from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.threads import flush, launch
from manylora.kernels.cpu.tiles import address_of, gemm_rows, keep_alive, share
from manylora.kernels.lora_tables import DeviceTable
from manylora.kernels.sites import RANK_PAGE


@kernel
def _fp32_kernel(arguments, part, parts):
    a = carray(arguments, 8)
    x, x_stride, rows, depth, tiles, n_tiles, y, y_stride = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    x_offsets, y_offsets = np.arange(rows) * x_stride, np.arange(rows) * y_stride
    xo, yo = address_of(x_offsets), address_of(y_offsets)
    first, last = share(n_tiles, part, parts, 1)
    for tile in range(first, last):
        gemm_rows(rows, x, xo, tiles + 64 * tile * depth, 64, depth, y + 64 * tile, yo, 0, 64 * depth)
    keep_alive(x_offsets)
    keep_alive(y_offsets)


def table_product(x: torch.Tensor, table: DeviceTable) -> torch.Tensor:
    """``x @ rows.T`` of a tiled table, x fp32 ``[M, K]`` with contiguous rows: fp32 ``[M, count rounded up to 16]``.

    One chain over k for each logit, as the base's own: a row's bits do not depend on the rows beside it.
    """
    m, k = x.shape
    out = torch.empty(m, table.rows.shape[0] * RANK_PAGE)
    if table.rows.dtype == torch.bfloat16:
        bf16_linear(x, table.rows, out)
    else:
        launch(
            _fp32_kernel, x.data_ptr(), x.stride(0) * 4, m, k, table.rows.data_ptr(), table.rows.shape[0],
            out.data_ptr(), out.stride(0) * 4, keep=(x, out, table.rows),
        )  # fmt: skip
    flush()  # it may have been queued
    return out
