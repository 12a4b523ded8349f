"""``y = W x`` on the CPU with W in NF4 and both sides rounded to integers of 8 bits, see ``bytes_inner``.

A code is looked up as a byte, so that 64 of them take one shuffle.

**What rounding costs.** A code is off by at most 2.5e-3 of its block's absmax, a value of x by at most 3.9e-3 of its
span's largest: what llama.cpp does to x (its Q8_0 has the same spans), and three times what bf16 does to both.
Where a few positions of x are large in nearly every row, what is left of that are the small ones' own errors: eight
such positions are multiplied as they are, by ``code * absmax`` in fp32 (``server/model/exact_inputs.py`` finds them).
The next token's distribution is then 1.2 times as far from fp32's as bf16's is, logits included, instead of three times
(``bench/accuracy.py``).
"""

from __future__ import annotations

import torch
from llvmlite import ir
from numba import carray, njit

from manylora.kernels.cpu.bytes_inner import (
    CODE_UNIT,
    CODE_ZERO,
    MANY_ROWS,
    groups_of_rows,
    quantiser,
    some_tiles,
    table_of,
)
from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.emit import (
    I32,
    I64,
    V8F,
    V8I,
    VECTORS,
    VF,
    VI,
    Builder,
    Value,
    function,
    load,
    load_tile,
    offset,
    shuffle,
    splat,
)
from manylora.kernels.cpu.nf4_inner import BYTES, look_up, nibbles
from manylora.kernels.cpu.nf4_packing import GROUP
from manylora.kernels.cpu.regions import chunk_tiles, items_of, next_region
from manylora.kernels.cpu.target import HAS_512, TARGET
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import share
from manylora.kernels.nf4_code import NF4_CODE


def _group(b: Builder, address: Value) -> list[list[Value]]:
    """``nf4_packing.FOR_BYTES`` is the order."""
    codes = [round(value * CODE_UNIT + CODE_ZERO) for value in NF4_CODE]
    table = ir.Constant(BYTES, codes * (BYTES.count // 16))
    vectors = [look_up(b, table, indices) for indices in nibbles(b, address)]
    return [vectors] if VECTORS == 2 else [[vector] for vector in vectors]


def _column(b: Builder, codes: Value, absmax: Value, entry: Value) -> list[Value]:
    """``code * absmax``, rounded once: what the weight is dequantised to."""
    at, shift, block = (load(b, offset(b, entry, 4 * i), I32, 4) for i in (1, 2, 3))
    bytes_of_four = load(b, b.add(codes, b.sext(at, I64)), VI, 1)
    largest = load_tile(b, b.add(absmax, b.sext(block, I64)))
    column = []
    for v, maximum in enumerate(largest):
        # With two vectors a tile the second one's codes are the high nibbles.
        down = splat(b, b.add(shift, ir.Constant(I32, 4 * v)), VI)
        column.append(b.fmul(_value_of(b, b.lshr(bytes_of_four, down)), maximum))
    return column


def _value_of(b: Builder, codes: Value) -> Value:
    """The fp32 value of the code in the lowest four bits of each lane."""
    if HAS_512 and TARGET.lanes == 16:
        permute = function(b, "llvm.x86.avx512.permvar.sf.512", VF, VF, VI)
        return b.call(permute, [ir.Constant(VF, list(NF4_CODE)), codes])
    permute = function(b, "llvm.x86.avx2.permps", V8F, V8F, V8I)
    low, high = (ir.Constant(V8F, list(NF4_CODE[8 * half : 8 * half + 8])) for half in (0, 1))
    halves = []
    for first in range(0, TARGET.lanes, 8):
        own = shuffle(b, codes, codes, list(range(first, first + 8)))
        fourth = b.and_(own, ir.Constant(V8I, [8] * 8))
        is_low = b.icmp_signed("==", fourth, ir.Constant(V8I, [0] * 8))
        halves.append(b.select(is_low, b.call(permute, [low, own]), b.call(permute, [high, own])))
    return halves[0] if len(halves) == 1 else shuffle(b, halves[0], halves[1], list(range(16)))


_some_tiles = some_tiles(_group, 8 * GROUP, _column)
_quantised = quantiser(lambda b, values: values)


@njit(nogil=True)
def _product(part, parts, rows, levels, stride, depth, packed, absmax, n_tiles, y, y_stride, block, accumulate, exact):
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
                    y + row * y_stride + 64 * first, y_stride, accumulate, rows >= MANY_ROWS, exact,
                )  # fmt: skip


@kernel
def _quantise_bytes_kernel(arguments, part, parts):
    a = carray(arguments, 14)
    _quantised(part, parts, a[0], a[1], a[2], a[3], a[4], a[5], a[13])


@kernel
def _nf4_bytes_kernel(arguments, part, parts):
    a = carray(arguments, 14)
    rows, depth, levels, stride, packed, absmax, n_tiles = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    y, y_stride, block, accumulate, exact = a[9], a[10], a[11], a[12], a[13]
    _product(part, parts, rows, levels, stride, depth, packed, absmax, n_tiles, y, y_stride, block, accumulate, exact)


def exact_table(positions: torch.Tensor, depth: int, block: int) -> torch.Tensor:
    """What the kernels need to know of ``EXACT`` different positions of x: int32 ``[EXACT * ENTRY + depth / SPAN]``.

    Of each, in ascending order, itself, where in a tile its codes are (bytes, and by how many bits they are shifted),
    and where its block's largest values are (bytes); then of each span a word with the bits of its exact positions.
    """
    found = sorted(positions.tolist())
    # ``nf4_packing.FOR_BYTES``: four in a word's bytes, of eight the last four above them.
    places = [(k // GROUP * 8 * GROUP, 8 * (k % 4) + 4 * (k % GROUP // 4), k // block * 64) for k in found]
    return table_of(found, depth, places)


def nf4_bytes_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    work: torch.Tensor,
    *,
    exact: torch.Tensor | None = None,
    accumulate: bool = False,
    follows: bool = False,
) -> None:
    """``out (+)= x @ W.T``, as ``nf4_linear.nf4_linear``, of a weight packed ``FOR_BYTES``. ``work``: ``[M,
    work_width(K)]`` contiguous fp32 for x as integers; what it holds is overwritten. ``exact``: a
    ``exact_table`` of positions of x that are multiplied as they are."""
    m, k = x.shape
    launch(
        _quantise_bytes_kernel, x.data_ptr(), x.stride(0) * 4, m, k, work.data_ptr(), work.stride(0) * 4,
        packed.data_ptr(), absmax.data_ptr(), packed.shape[0], out.data_ptr(), out.stride(0) * 4, blocksize,
        int(accumulate), 0 if exact is None else exact.data_ptr(),
        then=_nf4_bytes_kernel, keep=(x, out, work), follows=follows,
    )  # fmt: skip
