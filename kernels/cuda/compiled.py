"""Every shipped Triton kernel compiled ahead of time, and what its machine code says. For tests and benchmarks: serving
does not import this. Needs no GPU; triton must not be in interpreter mode.

A change that makes a kernel spill, or its main loop longer, shows here before anyone has run it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from manylora.kernels.cuda import attention, dense_linear, elementwise, sampling, sass
from manylora.kernels.cuda.configs import TileConfig, shipped
from manylora.kernels.cuda.linear import DEQUANTIZE_BN, is_capped
from manylora.kernels.cuda.lora import expand_kernel, shrink_kernel
from manylora.kernels.cuda.lora_op import BK, EXPAND_BM, EXPAND_BN, ROWS, SHARE, WORKERS
from manylora.kernels.cuda.nf4_linear import dequantize_kernel, nf4_linear_kernel
from manylora.kernels.cuda.nf4_words import BLOCK

ARCHITECTURES = ("sm_80", "sm_90")
SLOT_PAGES = 16
"""Pages of an adapter: rank 256. Any other only changes a divisor."""
SPLITS = 8
"""Any number above 1 only changes the bound of a loop."""

# A processor's (CUDA C programming guide, "Compute capabilities"). Of its shared memory the system takes 1 KiB for each
# program, so one program can have 1 KiB less than there is.
_SHARED = {80: 164 * 1024, 90: 228 * 1024}
_REGISTERS, _THREADS, _PROGRAMS = 65536, 2048, 32

_FP32 = (
    "p_code", "p_outer", "p_offset", "p_values", "p_planes", "p_scaling", "p_gain", "p_adapter_bias", "p_scale_at",
    "p_partial",
)  # fmt: skip
_INT32 = (
    "p_words", "p_first", "p_tickets", "p_places", "p_slot_at", "p_lists", "p_counts", "p_entry_tickets", "p_done",
)  # fmt: skip
_POINTERS = {**dict.fromkeys(_FP32, "*fp32"), **dict.fromkeys(_INT32, "*i32")}


@dataclass(frozen=True)
class Variant:
    """One compilation: ``signature`` has the type of every argument that is not in ``constants``.

    ``weights_per_thread``: those that a thread decodes in one pass of the main loop, if no two threads decode the same
    one; None where nothing is decoded in a loop. ``fp_fusion``: whether a multiplication and an addition may become one
    operation.
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    weights_per_thread: float | None = None
    fp_fusion: bool = True
    max_registers: int | None = None


@dataclass(frozen=True)
class CompiledFigures:
    """Of one variant on one architecture; all but ``shared`` (what triton asks for at launch) are read from the machine
    code.

    - ``registers``: of a thread. 65536 of a processor are handed out 8 a thread at a time.
    - ``spills``: instructions that store or load local memory (STL, LDL): values that found no register.
    - ``stack``: bytes of local memory of a thread.
    - ``shared``: bytes of shared memory of a program.
    - ``programs``: how many a processor can hold at once, by registers, shared memory and threads; 0: it cannot run.
    - ``hgmma``: matrix products of four warps together (Hopper's wgmma); ``hmma``: those of one warp.
    - ``instructions``: of the whole kernel, as it lies in memory.
    - ``per_weight``: instructions of the main loop (the innermost one with most PRMT), by the weights that a thread
      decodes in it: all that happens to a weight on its way, loads, scales and matrix products too. Where two threads
      decode the same weight, that shows here. Streaming NF4 at 3.0 TB/s leaves an H100 about 5.6 (estimated).
    - ``decode_per_weight``: PRMT, LOP3 and SHF of that loop alone, by weight: an upper bound of the look-up, as
      addresses and predicates use these instructions too.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    programs: int
    hgmma: int
    hmma: int
    instructions: int
    per_weight: float | None
    decode_per_weight: float | None


def variants(arch: str) -> list[Variant]:
    """All that is shipped for an architecture (``sm_90``), each label once."""
    found = [
        *_linear(shipped()[arch].tiles.values()),
        *_dequantize(),
        *_lora(),
        *_exposed(dense_linear.shipped_configurations()),
        *_exposed(attention.shipped_configurations()),
        *_exposed(elementwise.shipped_configurations()),
        *_exposed(sampling.shipped_configurations()),
    ]
    if len({one.label for one in found}) != len(found):
        raise ValueError("two variants have one label")
    return found


def compile_ahead(variant: Variant, capability: int) -> CompiledFigures:
    """Compile for a compute capability (90 is sm_90) and read the result."""
    kernel, names = variant.kernel, variant.kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in variant.constants else variant.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if _is_aligned(variant, name)},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fp_fusion,
        "maxnreg": variant.max_registers,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    listing, resources = sass.read(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    per_weight = decode_per_weight = None
    if variant.weights_per_thread is not None:
        loop = listing.main_loop("PRMT")
        per_weight = round(len(loop) / variant.weights_per_thread, 3)
        decode_per_weight = round(listing.count(("PRMT", "LOP3", "SHF"), loop) / variant.weights_per_thread, 3)
    return CompiledFigures(
        registers=resources.registers,
        spills=listing.count(("LDL", "STL")),
        stack=resources.stack,
        shared=shared,
        programs=_programs(resources.registers, shared, variant.num_warps * 32, capability),
        hgmma=listing.count(("HGMMA",)),
        hmma=listing.count(("HMMA",)),
        instructions=len(listing.opcodes),
        per_weight=per_weight,
        decode_per_weight=decode_per_weight,
    )


def _programs(registers: int, shared: int, threads: int, capability: int) -> int:
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(by_registers, _SHARED[capability] // (shared + 1024), _THREADS // threads, _PROGRAMS)


def _is_aligned(variant: Variant, name: str) -> bool:
    """What a launch finds to be a multiple of 16 with any model's sizes, and compiles for."""
    kernel = variant.kernel
    if name in (*variant.constants, *kernel.do_not_specialize, *kernel.do_not_specialize_on_alignment):
        return False
    return name.startswith(("p_", "stride_")) or name in ("K", "N", "n", "width")


def _types(kernel: Any, constants: Mapping[str, Any], dtype: str, nested: bool = True) -> dict[str, str]:
    of_kind = {"p_scales": "*u8" if nested else "*fp32", **_POINTERS}
    return {
        name: of_kind.get(name, f"*{dtype}" if name.startswith("p_") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }


def _linear(tiles: Collection[TileConfig]) -> Iterator[Variant]:
    for tile, lora, nested, dtype in product(tiles, (False, True), (True, False), ("bf16", "fp16")):
        if dtype == "fp16" and not nested:
            continue  # as in bf16
        yield _one_linear(tile, "", dtype=dtype, lora=lora, nested=nested)
    for tile in tiles:
        if tile.bm == 32:
            continue  # the smallest and the largest show what these do
        yield _one_linear(tile, ", K uneven", EVEN=False)
        yield _one_linear(tile, ", vectors", VECTORS=True)
        yield _one_linear(tile, ", one split, bias, no addition", SPLITS=1, BIAS=True, ADD=False)


def _one_linear(
    tile: TileConfig, detail: str, *, dtype: str = "bf16", lora: bool = True, nested: bool = True, **changes: Any
) -> Variant:
    constants = {
        "BM": tile.bm, "BN": tile.bn, "NB": tile.nb, "SPLITS": SPLITS, "EVEN": True, "NESTED": nested, "BIAS": False,
        "ADD": True, "LORA": lora, "WORKERS": WORKERS if lora else 0, "ROWS": ROWS, "SHARE": SHARE, "BK": BK,
        "SLOT_PAGES": SLOT_PAGES if lora else 1, "VECTORS": False, "FAST": True, "WIDE": False,
        **changes,
    }  # fmt: skip
    capped = is_capped(even=constants["EVEN"], splits=constants["SPLITS"], vectors=constants["VECTORS"])
    scales, kind = "nested" if nested else "fp32 scales", "adapters" if lora else "base"
    return Variant(
        f"nf4_linear {tile.bm} rows {dtype} {scales} {kind}{detail}",
        nf4_linear_kernel,
        _types(nf4_linear_kernel, constants, dtype, nested),
        constants,
        tile.num_warps,
        tile.num_stages,
        tile.bn * BLOCK * tile.nb / (tile.num_warps * 32),
        max_registers=tile.max_registers if capped else None,
    )


def _dequantize() -> Iterator[Variant]:
    for nested, dtype in product((True, False), ("bf16", "fp16")):
        constants = {"BN": DEQUANTIZE_BN, "NESTED": nested, "FAST": True}
        types = _types(dequantize_kernel, constants, dtype, nested)
        label = f"dequantize {dtype} {'nested' if nested else 'fp32 scales'}"
        yield Variant(label, dequantize_kernel, types, constants, 4, 3)


def _lora() -> Iterator[Variant]:
    shrink = {
        "WORKERS": WORKERS, "ROWS": ROWS, "SLOT_PAGES": SLOT_PAGES, "SHARE": SHARE, "BK": BK, "WIDE": False,
    }  # fmt: skip
    expand = {"BM": EXPAND_BM, "BN": EXPAND_BN, "WIDE": False}
    for dtype in ("bf16", "fp16"):
        yield Variant(f"shrink {dtype}", shrink_kernel, _types(shrink_kernel, shrink, dtype), shrink, 4, 3)
        yield Variant(f"expand {dtype}", expand_kernel, _types(expand_kernel, expand, dtype), expand, 4, 3)


def _exposed(configurations: list[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]) -> Iterator[Variant]:
    for kernel, types, constants, num_warps, num_stages, label in configurations:
        # The one launch that turns fusion off.
        fused = kernel is not sampling.examine_kernel
        yield Variant(label, kernel, types, constants, num_warps, num_stages, fp_fusion=fused)
