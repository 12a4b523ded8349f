"""Inner loops as LLVM IR: the few places where a numba kernel needs vector registers and byte shuffles by name.

Everything the CPU computes in bulk is one micro-kernel, ``gemm_tile``: R rows of x times a panel of 16·T columns,
held in vector registers. NF4 and bf16 weights are first decoded into such a panel, small enough for the L1 cache; LoRA
pages and KV pages already have its shape. Addresses are passed as plain int64, offsets are in bytes.

**Order of summation.** Each output element is ``fma(x[k], w[k, n], acc)`` for k = 0, 1, 2, … in one chain, whichever R
and T are used and however k is cut into panels. A row's result therefore never depends on how many rows share the
batch: bit for bit, not within a tolerance.

The IR uses AVX2 and FMA (x86-64-v3). ``kernels.cpu.VARIANTS`` names what a processor must have.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from manylora.kernels.nf4_code import NF4_CODE

Builder = Any
Value = Any

I8, I32, I64, F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
V8F, V8I, V16S, V32B = (
    ir.VectorType(F32, 8),
    ir.VectorType(I32, 8),
    ir.VectorType(ir.IntType(16), 16),
    ir.VectorType(I8, 32),
)
TILE: Final = 16
"""Columns of a panel tile: two 8-lane vectors."""


def i64(value: int) -> Value:
    return ir.Constant(I64, value)


def load(b: Builder, address: Value, kind: Any, align: int) -> Value:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=align)


def store(b: Builder, value: Value, address: Value, align: int) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def splat(b: Builder, scalar: Value) -> Value:
    one = b.insert_element(ir.Constant(V8F, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(V8F, ir.Undefined), ir.Constant(V8I, [0] * 8))


def offset(b: Builder, address: Value, n_bytes: int) -> Value:
    return b.add(address, i64(n_bytes)) if n_bytes else address


def function(b: Builder, name: str, result: Any, *arguments: Any) -> Value:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, list(arguments)), name)


def constant(value: float) -> Value:
    return ir.Constant(V8F, [value] * 8)


class _Rows:
    """The accumulators of a fused kernel: ``rows`` x ``tiles`` x two vectors, and the rows' addresses."""

    def __init__(
        self, b: Builder, rows: int, tiles: int, x: Value, x_offsets: Value, c: Value, c_offsets: Value
    ) -> None:
        self._b = b
        self._fma = function(b, "llvm.fma.v8f32", V8F, V8F, V8F, V8F)
        self._x = [b.add(x, load(b, offset(b, x_offsets, 8 * r), I64, 8)) for r in range(rows)]
        self._c = [b.add(c, load(b, offset(b, c_offsets, 8 * r), I64, 8)) for r in range(rows)]
        self._acc = [[cgutils.alloca_once(b, V8F) for _ in range(2 * tiles)] for _ in range(rows)]

    def _each(self) -> Iterator[tuple[Value, Value]]:
        for row, accumulators in zip(self._c, self._acc, strict=True):
            for v, accumulator in enumerate(accumulators):
                yield offset(self._b, row, 32 * v), accumulator

    def start(self, accumulate: Value) -> None:
        """From the values in memory if ``accumulate`` is not 0, else from zero."""
        b = self._b
        with b.if_else(b.icmp_signed("!=", accumulate, i64(0))) as (then, otherwise):
            with then:
                for place, accumulator in self._each():
                    b.store(load(b, place, V8F, 4), accumulator)
            with otherwise:
                for _, accumulator in self._each():
                    b.store(constant(0.0), accumulator)

    def multiply(self, position: Value, vectors: Sequence[Value]) -> None:
        """Add x[position] times the weights of that position (two vectors a tile)."""
        b = self._b
        for row, accumulators in zip(self._x, self._acc, strict=True):
            factor = splat(b, load(b, b.add(row, b.mul(position, i64(4))), F32, 4))
            for accumulator, weights in zip(accumulators, vectors, strict=True):
                b.store(b.call(self._fma, [factor, weights, b.load(accumulator)]), accumulator)

    def finish(self) -> None:
        for place, accumulator in self._each():
            store(self._b, self._b.load(accumulator), place, 4)


def _gemm_tile(rows: int, tiles: int) -> Callable[..., Any]:
    """A micro-kernel for ``rows`` rows and ``16 * tiles`` columns; see ``gemm_tile`` for what it computes."""

    @intrinsic
    def tile(typingctx, x, x_offsets, panel, panel_stride, depth, c, c_offsets, accumulate):
        signature = types.void(*[types.int64] * 8)

        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            x, x_offsets, panel, panel_stride, depth, c, c_offsets, accumulate = args
            state = _Rows(b, rows, tiles, x, x_offsets, c, c_offsets)
            state.start(accumulate)
            with cgutils.for_range(b, depth, intp=I64) as loop:
                row = b.add(panel, b.mul(loop.index, panel_stride))
                state.multiply(loop.index, [load(b, offset(b, row, 32 * v), V8F, 4) for v in range(2 * tiles)])
            state.finish()
            return context.get_dummy_value()

        return signature, codegen

    return tile  # type: ignore[no-any-return]


gemm_1x1, gemm_2x1, gemm_3x1 = _gemm_tile(1, 1), _gemm_tile(2, 1), _gemm_tile(3, 1)
gemm_4x1, gemm_5x1, gemm_6x1 = _gemm_tile(4, 1), _gemm_tile(5, 1), _gemm_tile(6, 1)
gemm_1x4, gemm_2x2, gemm_3x2 = _gemm_tile(1, 4), _gemm_tile(2, 2), _gemm_tile(3, 2)


def _byte_tables() -> list[Value]:
    """The four byte planes of the 16 fp32 codes, each repeated in both 128-bit lanes for ``vpshufb``."""
    raw = [struct.pack("<f", value) for value in NF4_CODE]
    return [ir.Constant(V32B, [code[plane] for code in raw] * 2) for plane in range(4)]


def _unpack(width: int, high: bool) -> list[int]:
    """Shuffle mask of ``vpunpck{l,h}`` on two 256-bit vectors of ``width`` elements: interleaves within each lane."""
    lane = width // 2
    start = lane // 2 if high else 0
    return [i for base in (0, lane) for j in range(lane // 2) for i in (base + start + j, width + base + start + j)]


def _shuffle(b: Builder, left: Value, right: Value, mask: list[int]) -> Value:
    return b.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, len(mask)), mask))


def _nf4_quad(b: Builder, address: Value, tables: list[Value]) -> list[tuple[Value, Value]]:
    """The codes of the four positions and 16 outputs whose 32 bytes lie at ``address``: fp32, two vectors a position.

    Four byte look-ups and two levels of interleaving give 32 exact codes: about three shuffles for eight weights.
    """
    pshufb = function(b, "llvm.x86.avx2.pshuf.b", V32B, V32B, V32B)
    low_nibble = ir.Constant(V32B, [15] * 32)
    codes = load(b, address, V32B, 1)
    shifted = b.bitcast(b.lshr(b.bitcast(codes, V16S), ir.Constant(V16S, [4] * 16)), V32B)
    positions = []
    for nibbles in (b.and_(codes, low_nibble), b.and_(shifted, low_nibble)):
        planes = [b.call(pshufb, [table, nibbles]) for table in tables]
        for high_bytes in (False, True):
            mask = _unpack(32, high_bytes)
            low16 = b.bitcast(_shuffle(b, planes[0], planes[1], mask), V16S)
            high16 = b.bitcast(_shuffle(b, planes[2], planes[3], mask), V16S)
            left, right = (b.bitcast(_shuffle(b, low16, high16, _unpack(16, high)), V8F) for high in (False, True))
            positions.append((left, right))
    return positions


@intrinsic
def decode_nf4(typingctx, packed, absmax, out, out_stride, quads):
    """Decode ``4 * quads`` rows of a 16-column tile to fp32, times ``absmax[16]``: ``out[k, n] = code * absmax[n]``.

    ``packed`` holds 32 bytes a quad, in the order of ``kernels.cpu.linear.pack_nf4``.
    """
    signature = types.void(*[types.int64] * 5)

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        packed, absmax, out, out_stride, quads = args
        tables = _byte_tables()
        scales = [load(b, offset(b, absmax, 32 * v), V8F, 4) for v in range(2)]
        with cgutils.for_range(b, quads, intp=I64) as loop:
            row = b.add(out, b.mul(loop.index, b.mul(out_stride, i64(4))))
            for vectors in _nf4_quad(b, b.add(packed, b.mul(loop.index, i64(32))), tables):
                for half, codes in enumerate(vectors):
                    store(b, b.fmul(codes, scales[half]), offset(b, row, 32 * half), 4)
                row = b.add(row, out_stride)
        return context.get_dummy_value()

    return signature, codegen


def _fused_nf4(rows: int, tiles: int) -> Callable[..., Any]:
    """Few rows: the weights go from the decode straight into the multiply, never through memory."""

    @intrinsic
    def fused(
        typingctx, x, x_offsets, packed, tile_bytes, absmax, absmax_bytes, blocks, quads, c, c_offsets, accumulate
    ):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            x, x_offsets, packed, tile_bytes, absmax, absmax_bytes, blocks, quads, c, c_offsets, accumulate = args
            tables = _byte_tables()
            state = _Rows(b, rows, tiles, x, x_offsets, c, c_offsets)
            state.start(accumulate)
            weights = [b.add(packed, b.mul(tile_bytes, i64(t))) for t in range(tiles)]
            scales = [b.add(absmax, b.mul(absmax_bytes, i64(t))) for t in range(tiles)]
            with cgutils.for_range(b, blocks, intp=I64) as block:
                at = b.mul(block.index, i64(64))
                factors = [load(b, offset(b, b.add(s, at), 32 * v), V8F, 4) for s in scales for v in range(2)]
                first = b.mul(block.index, quads)
                with cgutils.for_range(b, quads, intp=I64) as loop:
                    quad = b.add(first, loop.index)
                    decoded = [_nf4_quad(b, b.add(w, b.mul(quad, i64(32))), tables) for w in weights]
                    for i in range(4):
                        codes = [vector for tile in decoded for vector in tile[i]]
                        scaled = [b.fmul(code, factor) for code, factor in zip(codes, factors, strict=True)]
                        state.multiply(b.add(b.mul(quad, i64(4)), i64(i)), scaled)
            state.finish()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), codegen

    return fused  # type: ignore[no-any-return]


fused_nf4_1x2, fused_nf4_2x2, fused_nf4_3x2 = _fused_nf4(1, 2), _fused_nf4(2, 2), _fused_nf4(3, 2)
fused_nf4_1x1, fused_nf4_2x1, fused_nf4_3x1 = _fused_nf4(1, 1), _fused_nf4(2, 1), _fused_nf4(3, 1)
fused_nf4_4x1 = _fused_nf4(4, 1)


def _bf16_row(b: Builder, address: Value) -> tuple[Value, Value]:
    """The 16 bf16 values at ``address`` (order of ``pack_bf16``) as two fp32 vectors; exact."""
    words = load(b, address, V8I, 4)
    low = b.shl(words, ir.Constant(V8I, [16] * 8))
    high = b.and_(words, ir.Constant(V8I, [0xFFFF0000] * 8))
    return b.bitcast(low, V8F), b.bitcast(high, V8F)


def _fused_bf16(rows: int, tiles: int) -> Callable[..., Any]:
    @intrinsic
    def fused(typingctx, x, x_offsets, packed, tile_bytes, depth, c, c_offsets, accumulate):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            x, x_offsets, packed, tile_bytes, depth, c, c_offsets, accumulate = args
            state = _Rows(b, rows, tiles, x, x_offsets, c, c_offsets)
            state.start(accumulate)
            weights = [b.add(packed, b.mul(tile_bytes, i64(t))) for t in range(tiles)]
            with cgutils.for_range(b, depth, intp=I64) as loop:
                at = b.mul(loop.index, i64(32))
                state.multiply(loop.index, [v for w in weights for v in _bf16_row(b, b.add(w, at))])
            state.finish()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return fused  # type: ignore[no-any-return]


fused_bf16_1x1, fused_bf16_2x1, fused_bf16_3x1 = _fused_bf16(1, 1), _fused_bf16(2, 1), _fused_bf16(3, 1)
fused_bf16_1x4, fused_bf16_2x2, fused_bf16_3x2 = _fused_bf16(1, 4), _fused_bf16(2, 2), _fused_bf16(3, 2)
fused_bf16_4x1 = _fused_bf16(4, 1)


@intrinsic
def decode_bf16(typingctx, packed, out, out_stride, depth):
    """Widen ``depth`` rows of a 16-column bf16 tile (order of ``pack_bf16``) to fp32; exact."""
    signature = types.void(*[types.int64] * 4)

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        packed, out, out_stride, depth = args
        with cgutils.for_range(b, depth, intp=I64) as loop:
            row = b.add(out, b.mul(loop.index, out_stride))
            for half, values in enumerate(_bf16_row(b, b.add(packed, b.mul(loop.index, i64(32))))):
                store(b, values, offset(b, row, 32 * half), 4)
        return context.get_dummy_value()

    return signature, codegen


def _at(name: str, kind: Any, result: Any, doc: str) -> Any:
    @intrinsic
    def at(typingctx, address, index):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            value = load(b, b.add(args[0], b.mul(args[1], i64(4))), kind, 4)
            return b.sext(value, I64) if kind is I32 else value

        return result(types.int64, types.int64), codegen

    at.__name__, at.__doc__ = name, doc
    return at


int32_at = _at("int32_at", I32, types.int64, "Element ``index`` of the int32 array at ``address``.")
float32_at = _at("float32_at", F32, types.float32, "Element ``index`` of the fp32 array at ``address``.")
