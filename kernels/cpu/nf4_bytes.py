"""``y = W x`` on the CPU with W in NF4 and both sides rounded to integers of 8 bits, see ``bytes_inner``.

A code is looked up as a byte, so that 64 of them take one shuffle.

**What rounding costs.** A code is off by at most 2.5e-3 of its block's absmax, a value of x by at most 3.9e-3 of its
span's largest: what llama.cpp does to x (its Q8_0 has the same spans), and three times what bf16 does to both (in
logits too: ``bench/accuracy.py``).
"""

from __future__ import annotations

import torch
from llvmlite import ir
from numba import carray, njit

from manylora.kernels.cpu.bytes_inner import CODE_UNIT, CODE_ZERO, MANY_ROWS, groups_of_rows, quantiser, some_tiles
from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import VECTORS, Builder, Value
from manylora.kernels.cpu.nf4_inner import BYTES, look_up, nibbles
from manylora.kernels.cpu.nf4_packing import GROUP
from manylora.kernels.cpu.regions import chunk_tiles, items_of, next_region
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import share
from manylora.kernels.nf4_code import NF4_CODE


def _group(b: Builder, address: Value) -> list[list[Value]]:
    """``nf4_packing.FOR_BYTES`` is the order."""
    codes = [round(value * CODE_UNIT + CODE_ZERO) for value in NF4_CODE]
    table = ir.Constant(BYTES, codes * (BYTES.count // 16))
    vectors = [look_up(b, table, indices) for indices in nibbles(b, address)]
    return [vectors] if VECTORS == 2 else [[vector] for vector in vectors]


_some_tiles = some_tiles(_group, 8 * GROUP)
_quantised = quantiser(lambda b, values: values)


@njit(nogil=True)
def _product(part, parts, rows, levels, stride, depth, packed, absmax, n_tiles, y, y_stride, block, accumulate):
    """A part of ``y (+)= W x``, in the order of `regions`."""
    groups = groups_of_rows(rows)
    at_once = n_tiles if groups == 1 else chunk_tiles(groups, depth)
    item, last_item = share(items_of(groups, depth, n_tiles), part, parts, 1)
    while item < last_item:
        group, last_group, tile, last_tile, item = next_region(item, last_item, groups, depth, n_tiles)
        for first in range(tile, last_tile, at_once):
            for g in range(group, last_group):
                row, end = rows * g // groups, rows * (g + 1) // groups
                _some_tiles(
                    end - row, levels + row * stride, depth, packed + 8 * first * depth,
                    absmax + 64 * first * (depth // block), min(at_once, last_tile - first), block,
                    y + row * y_stride + 64 * first, y_stride, accumulate, rows >= MANY_ROWS,
                )  # fmt: skip


@kernel
def _quantise_bytes_kernel(arguments, part, parts):
    a = carray(arguments, 13)
    _quantised(part, parts, a[0], a[1], a[2], a[3], a[4], a[5])


@kernel
def _nf4_bytes_kernel(arguments, part, parts):
    a = carray(arguments, 13)
    rows, depth, levels, stride, packed, absmax, n_tiles = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    y, y_stride, block, accumulate = a[9], a[10], a[11], a[12]
    _product(part, parts, rows, levels, stride, depth, packed, absmax, n_tiles, y, y_stride, block, accumulate)


def nf4_bytes_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    work: torch.Tensor,
    *,
    accumulate: bool = False,
    follows: bool = False,
) -> None:
    """``out (+)= x @ W.T``, as ``nf4_linear.nf4_linear``, of a weight packed ``FOR_BYTES``. ``work``: ``[M,
    work_width(K)]`` contiguous fp32 for x as integers; what it holds is overwritten."""
    m, k = x.shape
    launch(
        _quantise_bytes_kernel, x.data_ptr(), x.stride(0) * 4, m, k, work.data_ptr(), work.stride(0) * 4,
        packed.data_ptr(), absmax.data_ptr(), packed.shape[0], out.data_ptr(), out.stride(0) * 4, blocksize,
        int(accumulate), then=_nf4_bytes_kernel, keep=(x, out, work), follows=follows,
    )  # fmt: skip
