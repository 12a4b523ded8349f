"""Inner loops as LLVM IR: the few places where a numba kernel needs vector registers and byte shuffles by name.

What the CPU computes in fp32 in bulk is one micro-kernel, ``gemm_tile``: R rows of x times a panel of 16·T columns,
held in vector registers. bf16 weights are first widened into such a panel, small enough for the L1 cache; LoRA pages
and KV pages already have its shape. NF4 weights have a micro-kernel of their own, ``nf4_inner``. Addresses are passed
as plain int64, offsets are in bytes.

**Order of summation.** Each output element is ``fma(x[k], w[k, n], acc)`` for k = 0, 1, 2, … in one chain, whichever R
and T are used and however k is cut into panels. A row's result therefore never depends on how many rows share the
batch: bit for bit, not within a tolerance.

Nor does it depend on how wide vectors are, so every variant gives the same bits. ``target.TARGET`` says how wide, and
which R and T there are; ``kernels.cpu.VARIANTS`` names what a processor must have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from manylora.kernels.cpu.target import TARGET

Builder = Any
Value = Any

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
V8F, V8I = ir.VectorType(F32, 8), ir.VectorType(I32, 8)
VF, VI = ir.VectorType(F32, TARGET.lanes), ir.VectorType(I32, TARGET.lanes)
"""What fits a register."""
TILE: Final = 16
"""Columns of a panel tile: one vector or two."""
VECTORS: Final = TILE // TARGET.lanes


def i64(value: int) -> Value:
    return ir.Constant(I64, value)


def load(b: Builder, address: Value, kind: Any, align: int) -> Value:
    return b.load(b.inttoptr(address, kind.as_pointer()), align=align)


def store(b: Builder, value: Value, address: Value, align: int) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=align)


def splat(b: Builder, scalar: Value, kind: Any = V8F) -> Value:
    undefined = ir.Constant(kind, ir.Undefined)
    one = b.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count))


def offset(b: Builder, address: Value, n_bytes: int) -> Value:
    return b.add(address, i64(n_bytes)) if n_bytes else address


def function(b: Builder, name: str, result: Any, *arguments: Any) -> Value:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(result, list(arguments)), name)


def fused_multiply_add(b: Builder, kind: Any = V8F) -> Value:
    """The function ``fma(x, y, z) = x * y + z``, rounded once, of every lane."""
    return function(b, f"llvm.fma.v{kind.count}f32", kind, kind, kind, kind)


def constant(value: float, kind: Any = V8F) -> Value:
    return ir.Constant(kind, [value] * kind.count)


def load_tile(b: Builder, address: Value) -> list[Value]:
    """The 16 fp32 values at ``address``."""
    return [load(b, offset(b, address, 4 * TARGET.lanes * v), VF, 4) for v in range(VECTORS)]


def half_tile(b: Builder, address: Value) -> list[Value]:
    """The 16 bf16 values at ``address``, in their own order, as fp32; exact."""
    halves = ir.VectorType(I16, TARGET.lanes)
    words = [b.zext(load(b, offset(b, address, 2 * TARGET.lanes * v), halves, 2), VI) for v in range(VECTORS)]
    return [b.bitcast(b.shl(word, ir.Constant(VI, [16] * TARGET.lanes)), VF) for word in words]


def _whole_numbers(kind: Any) -> Callable[[Builder, Value], list[Value]]:
    n_bytes, vector = kind.width // 8, ir.VectorType(kind, TARGET.lanes)

    def tile(b: Builder, address: Value) -> list[Value]:
        places = [offset(b, address, n_bytes * TARGET.lanes * v) for v in range(VECTORS)]
        return [b.sitofp(b.sext(load(b, place, vector, n_bytes), VI), VF) for place in places]

    return tile


word_tile, byte_tile = _whole_numbers(I16), _whole_numbers(I8)
"""The 16 int16, or int8, values at an address, in their own order, as fp32; exact."""


def store_tile(b: Builder, vectors: Sequence[Value], address: Value) -> None:
    for v, vector in enumerate(vectors):
        store(b, vector, offset(b, address, 4 * TARGET.lanes * v), 4)


def addresses(b: Builder, array: Value, count: int) -> list[Value]:
    """The first ``count`` int64 values at ``array``."""
    return [load(b, offset(b, array, 8 * i), I64, 8) for i in range(count)]


class Rows:
    """The accumulators of a micro-kernel, rows x ``tiles`` x ``VECTORS``, and the addresses of the rows of ``x`` and
    ``c``."""

    def __init__(self, b: Builder, tiles: int, x: Sequence[Value], c: Sequence[Value]) -> None:
        self._b = b
        self._fma = fused_multiply_add(b, VF)
        self._x, self._c = x, c
        self._acc = [[cgutils.alloca_once(b, VF) for _ in range(VECTORS * tiles)] for _ in c]

    @classmethod
    def at(cls, b: Builder, rows: int, tiles: int, x: Value, x_offsets: Value, c: Value, c_offsets: Value) -> Rows:
        """Of ``rows`` rows at the addresses ``x`` and ``c`` plus their offsets."""
        own_x, own_c = addresses(b, x_offsets, rows), addresses(b, c_offsets, rows)
        return cls(b, tiles, [b.add(x, one) for one in own_x], [b.add(c, one) for one in own_c])

    def _each(self) -> Iterator[tuple[Value, Value]]:
        for row, accumulators in zip(self._c, self._acc, strict=True):
            for v, accumulator in enumerate(accumulators):
                yield offset(self._b, row, 4 * TARGET.lanes * v), accumulator

    def start(self, accumulate: Value) -> None:
        """From the values in memory if ``accumulate`` is not 0, else from zero."""
        b = self._b
        with b.if_else(b.icmp_signed("!=", accumulate, i64(0))) as (then, otherwise):
            with then:
                for place, accumulator in self._each():
                    b.store(load(b, place, VF, 4), accumulator)
            with otherwise:
                for _, accumulator in self._each():
                    b.store(constant(0.0, VF), accumulator)

    def multiply(self, position: Value, vectors: Sequence[Value]) -> None:
        """Add x[position] times the weights of that position (``VECTORS`` a tile)."""
        b = self._b
        for row, accumulators in zip(self._x, self._acc, strict=True):
            factor = splat(b, load(b, b.add(row, b.mul(position, i64(4))), F32, 4), VF)
            for accumulator, weights in zip(accumulators, vectors, strict=True):
                b.store(b.call(self._fma, [factor, weights, b.load(accumulator)]), accumulator)

    def scale(self, vectors: Sequence[Value]) -> None:
        """Multiply every row's sums by these factors (``VECTORS`` a tile)."""
        b = self._b
        for accumulators in self._acc:
            for accumulator, factors in zip(accumulators, vectors, strict=True):
                b.store(b.fmul(b.load(accumulator), factors), accumulator)

    def finish(self) -> None:
        for place, accumulator in self._each():
            store(self._b, self._b.load(accumulator), place, 4)


def prefetch(b: Builder, address: Value, *, write: bool = False) -> None:
    """Ask for the cache line at ``address``, which may lie anywhere: nothing is read, nothing faults. ``write``: as one
    that is soon to be written, and so into the first cache."""
    kinds = (ir.PointerType(I8), I32, I32, I32)
    ask = function(b, "llvm.prefetch.p0", ir.VoidType(), *kinds)
    how = (1, 3, 1) if write else (0, 2, 1)
    b.call(ask, [b.inttoptr(address, kinds[0]), *(ir.Constant(I32, value) for value in how)])


def shapes_of(tiles_at_once: Sequence[int], several: bool) -> dict[int, int]:
    """The micro-kernels, as rows: tiles, that take one tile, or ``several``."""
    return {rows: tiles if several else 1 for rows, tiles in enumerate(tiles_at_once) if tiles > several}


def branches(b: Builder, rows: Value, shapes: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Branch on the number of rows, which must be one of ``shapes``: what is emitted while (rows, tiles) are at hand is
    run for those rows."""
    after = b.append_basic_block("after")
    blocks = {count: b.append_basic_block(f"rows{count}") for count in shapes}
    choice = b.switch(rows, blocks[min(shapes)])
    for count, block in blocks.items():
        if count != min(shapes):
            choice.add_case(i64(count), block)
        b.position_at_end(block)
        yield count, shapes[count]
        b.branch(after)
    b.position_at_end(after)


def _gemm(several: bool, columns: Callable[[Builder, Value], list[Value]], tile_bytes: int) -> Callable[..., Any]:
    """``c[r] (+)= x[r, 0:depth] @ panel[0:depth]`` for each of ``rows`` rows and the columns of one tile, or of as many
    as ``TARGET.gemm_tiles`` says. ``x_offsets`` and ``c_offsets`` are addresses of int64 arrays ``[rows]``. The panel
    is what ``columns`` makes fp32 of, ``tile_bytes`` from a tile to the next. ``ahead``: how far behind it the panel
    lies which is wanted next (0: none)."""
    shapes = shapes_of(TARGET.gemm_tiles, several)

    @intrinsic
    def gemm(typingctx, rows, x, x_offsets, panel, panel_stride, depth, c, c_offsets, accumulate, ahead):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            rows, x, x_offsets, panel, panel_stride, depth, c, c_offsets, accumulate, ahead = args
            for count, tiles in branches(b, rows, shapes):
                state = Rows.at(b, count, tiles, x, x_offsets, c, c_offsets)
                state.start(accumulate)
                with cgutils.for_range(b, depth, intp=I64) as loop:
                    row = b.add(panel, b.mul(loop.index, panel_stride))
                    places = [offset(b, row, tile_bytes * t) for t in range(tiles)]
                    for place in places[:: max(1, 64 // tile_bytes)]:
                        prefetch(b, b.add(place, ahead))
                    state.multiply(loop.index, [vector for place in places for vector in columns(b, place)])
                state.finish()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return gemm  # type: ignore[no-any-return]


gemm_tile, gemm_tiles = _gemm(False, load_tile, 64), _gemm(True, load_tile, 64)
half_gemm_tile, half_gemm_tiles = _gemm(False, half_tile, 32), _gemm(True, half_tile, 32)
WORD_TILE: Final = 16 * 16 * 2
BYTE_TILE: Final = 16 * 16
"""Bytes of a tile of 16 positions of int16 and of int8, which lie together."""
word_gemm_tile, word_gemm_tiles = _gemm(False, word_tile, WORD_TILE), _gemm(True, word_tile, WORD_TILE)
byte_gemm_tile, byte_gemm_tiles = _gemm(False, byte_tile, BYTE_TILE), _gemm(True, byte_tile, BYTE_TILE)


def shuffle(b: Builder, left: Value, right: Value, mask: list[int]) -> Value:
    """The elements of ``left`` and, numbered on from those, of ``right`` that ``mask`` names."""
    return b.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, len(mask)), mask))


def bf16_row(b: Builder, address: Value) -> list[Value]:
    """The 16 bf16 values at ``address`` (order of ``pack_bf16``) as fp32; exact."""
    words = load(b, address, V8I, 4)
    low = b.bitcast(b.shl(words, ir.Constant(V8I, [16] * 8)), V8F)
    high = b.bitcast(b.and_(words, ir.Constant(V8I, [0xFFFF0000] * 8)), V8F)
    return [low, high] if VECTORS == 2 else [shuffle(b, low, high, list(range(16)))]


def _fused_bf16(several: bool) -> Callable[..., Any]:
    shapes = shapes_of(TARGET.bf16_tiles, several)

    @intrinsic
    def fused(typingctx, rows, x, x_offsets, packed, tile_bytes, depth, c, c_offsets, accumulate):
        def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
            rows, x, x_offsets, packed, tile_bytes, depth, c, c_offsets, accumulate = args
            for count, tiles in branches(b, rows, shapes):
                state = Rows.at(b, count, tiles, x, x_offsets, c, c_offsets)
                state.start(accumulate)
                weights = [b.add(packed, b.mul(tile_bytes, i64(t))) for t in range(tiles)]
                with cgutils.for_range(b, depth, intp=I64) as loop:
                    at = b.mul(loop.index, i64(32))
                    # What comes next: by itself the processor asks too late for more than it keeps in its caches.
                    for w in weights:
                        prefetch(b, b.add(w, b.add(at, b.mul(tile_bytes, i64(tiles)))))
                    state.multiply(loop.index, [v for w in weights for v in bf16_row(b, b.add(w, at))])
                state.finish()
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return fused  # type: ignore[no-any-return]


fused_bf16_tile, fused_bf16_tiles = _fused_bf16(False), _fused_bf16(True)


@intrinsic
def decode_bf16(typingctx, packed, out, out_stride, depth):
    """Widen ``depth`` rows of a 16-column bf16 tile (order of ``pack_bf16``) to fp32; exact."""
    signature = types.void(*[types.int64] * 4)

    def codegen(context: Any, b: Builder, sig: Any, args: Sequence[Value]) -> Value:
        packed, out, out_stride, depth = args
        with cgutils.for_range(b, depth, intp=I64) as loop:
            row = b.add(out, b.mul(loop.index, out_stride))
            store_tile(b, bf16_row(b, b.add(packed, b.mul(loop.index, i64(32)))), row)
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
