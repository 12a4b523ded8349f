"""What the variant in use has and its processors can do: the width of a vector, and how many of them fit registers.

Read by the modules with kernels when they are imported, so a process has one target (``kernels.cpu.choose``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from manylora.kernels.cpu import host_has, in_use


@dataclass(frozen=True)
class Target:
    """``lanes``: fp32 values of a vector. The rest is about micro-kernels, which hold rows x tiles of outputs (a tile
    is 16 columns) in registers: enough chains of FMAs to hide their latency (8 to 10), without spilling any.

    ``*_tiles[rows]``: tiles that so many rows take at once, in the GEMM and in the micro-kernel that widens bf16
    weights as it multiplies; tiles that are left over are taken one by one, rows beyond the table in near-equal groups.
    ``panel_tiles``: tiles of a widened panel. ``nf4_fused_rows``: rows at most that codes of NF4 are multiplied with
    as they are looked up as words, ``nf4_panel_rows`` once they are; ``nf4_byte_rows`` as bytes of a tile,
    ``nf4_byte_pair_rows`` as bytes of two tiles. ``nf4_group``:
    positions whose codes come from one load. ``head_rows``: rows at most that bf16 weights are multiplied with
    as they become integers.
    """

    lanes: int
    gemm_tiles: tuple[int, ...]
    bf16_tiles: tuple[int, ...]
    panel_tiles: int
    nf4_fused_rows: int
    nf4_panel_rows: int
    nf4_byte_rows: int
    nf4_byte_pair_rows: int
    head_rows: int
    nf4_group: int


_TARGETS: Final = {
    # 16 registers, a tile is two.
    "avx2": Target(
        8,
        (0, 4, 2, 2, 1, 1, 1),
        (0, 4, 2, 2, 1),
        panel_tiles=1,
        nf4_fused_rows=4,
        nf4_panel_rows=6,
        nf4_byte_rows=4,
        nf4_byte_pair_rows=0,
        head_rows=4,
        nf4_group=4,
    ),
    # 32 registers, a tile is one.
    "avx512": Target(
        16,
        (0, 4, 4, 4, 2, 2, 2, 2, 2),
        (0, 4, 4, 4, 4, 2, 2, 2, 2),
        panel_tiles=2,
        nf4_fused_rows=8,
        nf4_panel_rows=0,
        nf4_byte_rows=12,
        nf4_byte_pair_rows=6,
        head_rows=8,
        nf4_group=8,
    ),
}

TARGET: Final = _TARGETS[in_use().name]

HAS_512: Final = host_has("avx512bw")
"""Whether the processor multiplies and looks up bytes of 512 bits. Without, wide kernels are run by the tests alone,
which want them on any machine: LLVM splits wide vectors into what there is, but leaves instructions that are asked for
by name."""

HAS_BYTE_PRODUCTS: Final = host_has("avxvnni" if TARGET.lanes == 8 else "avx512vnni")
"""Whether the processor adds up four products of bytes in a lane of the variant's vectors (``vpdpbusd``)."""
