"""The 16-entry look-up of NF4 codes by byte permutes: its tables, and the PTX that does it.

PTX's ``prmt`` picks each byte of its result from 8 bytes by a 4-bit selector, whose top bit asks for the byte's sign
instead, replicated. So for a plane (the low or the high bytes of the 16-bit values T) and a nibble n::

    prmt(P, n) ^ prmt(Q, n ^ 8) == T[n]    with    P[i] = T[i],  Q[i] = T[i + 8] ^ sign(P[i]),  i = 0 .. 7

whenever T[i] and T[i + 8] have the same top bit in both planes: the term that answers with a sign then cancels. Four
codes a permute, no masking. Codes are relabelled at load so that the pairs fit; zero is stored as -0.0, which makes
their number even (a product with -0.0 adds nothing to an accumulator that starts at +0.0).

For float16 the nearest values do not pair up. 1.0 is taken as 1 - 2^-11, its lower neighbour, which is no further off
than the other entries of a bfloat16 table are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from manylora.kernels.nf4_code import NF4_CODE

DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Nf4Lookup:
    """NF4's codes in a 16-bit type.

    ``order[label]`` is the bitsandbytes code that ``label`` stands for; ``values[label]`` its value as the kernels
    multiply with it; ``tables`` the eight 32-bit words of P and Q: low plane first, then high.
    """

    order: tuple[int, ...]
    values: tuple[float, ...]
    tables: tuple[int, ...]

    @property
    def labels(self) -> tuple[int, ...]:
        """The label of each bitsandbytes code: the inverse of ``order``."""
        return tuple(self.order.index(code) for code in range(16))


def nf4_lookup(dtype: torch.dtype) -> Nf4Lookup:
    """The look-up for activations of ``dtype``. float32 (the interpreter, CPUs) computes with bfloat16's values.

    Raises ValueError for another type.
    """
    if dtype not in (*DTYPES, torch.float32):
        raise ValueError(f"the NF4 kernels compute in bfloat16, float16 or float32, got {dtype}")
    kind = torch.float16 if dtype == torch.float16 else torch.bfloat16
    rounded = torch.tensor(NF4_CODE).to(kind)
    rounded[NF4_CODE.index(0.0)] = -0.0
    if kind == torch.float16:
        rounded[NF4_CODE.index(1.0)] = 1 - 2.0**-11
    bits = [value & 0xFFFF for value in rounded.view(torch.int16).tolist()]
    classes: dict[tuple[int, int], list[int]] = {}
    for code, value in enumerate(bits):
        classes.setdefault((value >> 15, value >> 7 & 1), []).append(code)
    pairs = [pair for members in classes.values() for pair in zip(members[::2], members[1::2], strict=True)]
    order = tuple(first for first, _ in pairs) + tuple(second for _, second in pairs)
    values = tuple(rounded[code].item() for code in order)
    return Nf4Lookup(order, values, _plane(bits, order, 0) + _plane(bits, order, 8))


def _plane(bits: list[int], order: tuple[int, ...], shift: int) -> tuple[int, ...]:
    """P and Q of one byte plane, two little-endian words each."""
    plane = [bits[code] >> shift & 0xFF for code in order]
    p = plane[:8]
    q = [value ^ (0xFF if first & 0x80 else 0) for first, value in zip(p, plane[8:], strict=True)]
    return struct.unpack("<4I", bytes(p + q))


def decode_asm(lookup: Nf4Lookup) -> str:
    """PTX from one word of 8 labels (``$4``) to four words of two 16-bit values (``$0 .. $3``), in label order.

    Each permute takes two words of its table, of which the instruction can hold one as a constant. The assembler would
    move the other into a register anew for every permute, nearly as many instructions as the permutes themselves, since
    it takes constants for cheap. Hence ``zero``: lane^2 + lane is even whatever the lane, but the assembler does not
    know that, so it keeps the four words that are xored with it in registers, computed once before the loop.
    """
    names = []
    lines = ["{", ".reg .b32 high, flipped, high_flipped, low_plane, high_plane, other, zero;", ".reg .b32 p<4>;"]
    lines += ["mov.u32 zero, %laneid;", "mad.lo.u32 zero, zero, zero, zero;", "and.b32 zero, zero, 1;"]
    for i in range(4):
        lines.append(f"xor.b32 p{i}, zero, {lookup.tables[2 * i]:#x};")
        names.append((f"p{i}", f"{lookup.tables[2 * i + 1]:#x}"))
    lines += ["shr.u32 high, $4, 16;", "xor.b32 flipped, $4, 0x88888888;", "shr.u32 high_flipped, flipped, 16;"]
    for half, (selector, flipped) in enumerate((("$4", "flipped"), ("high", "high_flipped"))):
        for plane, (p, q) in (("low_plane", names[:2]), ("high_plane", names[2:])):
            lines.append(f"prmt.b32 {plane}, {p[0]}, {p[1]}, {selector};")
            lines.append(f"prmt.b32 other, {q[0]}, {q[1]}, {flipped};")
            lines.append(f"xor.b32 {plane}, {plane}, other;")
        lines.append(f"prmt.b32 ${2 * half}, low_plane, high_plane, 0x5140;")
        lines.append(f"prmt.b32 ${2 * half + 1}, low_plane, high_plane, 0x7362;")
    return "\n".join([*lines, "}"])
