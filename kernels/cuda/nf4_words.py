"""NF4 weights as the Triton kernels read them: words of 8 codes, laid so that decoding needs no exchange of registers.

A site's projections lie one behind the other, rows of N. Of each 64 codes along k, word ``w`` (0..7) holds, in its
nibble ``2 j + b`` (j 0..3, b 0..1), the code of ``k = 16 j + 2 w + b``: two neighbours of a 16-bit register, at the
places in which the matrix units take them. The bytes are as many as before and replace the original ones: the base is
in memory once. Codes are relabelled (``nf4_lookup``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from manylora.kernels.cuda.nf4_lookup import nf4_lookup
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import NestedAbsmax, Nf4Tensor

BLOCK = 64
"""Weights that share a scale, and the depth of one matrix product in the kernels."""

_NESTED_BLOCK = 256


@dataclass(frozen=True)
class Nf4Words:
    """Projections ``[N_i, K]`` side by side, ``N`` their sum.

    ``words`` int32 ``[N, K / 8]``. ``scales``: fp32 ``[N, K / 64]``, or uint8 codes of nested scales, which are
    ``code[scales] * outer[(first + block) // 256] + offset``: ``code`` fp32 ``[256]``, ``outer`` fp32, ``first``
    int32 ``[N]`` (256 times the row's matrix' place in ``outer``, plus the number of its first block), ``offset``
    fp32 ``[N]``. Without nesting these four are empty. ``values`` fp32 ``[16]``: what each label stands for, as it is
    multiplied.
    """

    words: torch.Tensor
    scales: torch.Tensor
    code: torch.Tensor
    outer: torch.Tensor
    first: torch.Tensor
    offset: torch.Tensor
    values: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        return self.words.shape[0], self.words.shape[1] * 8

    @property
    def nested(self) -> bool:
        return self.scales.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        parts = (self.words, self.scales, self.code, self.outer, self.first, self.offset, self.values)
        return sum(part.nbytes for part in parts)

    def scales_fp32(self) -> torch.Tensor:
        """The scales, fp32 ``[N, K / 64]``: bit-equal to bitsandbytes' (product and sum rounded separately)."""
        if not self.nested:
            return self.scales
        block = self.first[:, None] + torch.arange(self.scales.shape[1], device=self.scales.device)
        outer = self.outer[(block // _NESTED_BLOCK).long()]
        return (self.code[self.scales.int()] * outer).add_(self.offset[:, None])

    def labels(self) -> torch.Tensor:
        """The labels of all weights, uint8 ``[N, K]``."""
        n, k = self.shape
        words = self.words.view(n, k // BLOCK, 8)
        out = torch.empty(n, k // BLOCK, 4, 8, 2, dtype=torch.uint8, device=self.words.device)
        for j in range(4):
            for b in range(2):
                out[:, :, j, :, b] = (words >> 4 * (2 * j + b) & 15).to(torch.uint8)
        return out.view(n, k)

    def rows(self, first: int, last: int) -> Nf4Words:
        """Rows ``first .. last - 1``: views of the same bytes."""
        taken = slice(first, last)
        here, offset = (self.first[taken], self.offset[taken]) if self.nested else (self.first, self.offset)
        return replace(self, words=self.words[taken], scales=self.scales[taken], first=here, offset=offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[N, K]`` that the kernels multiply with, ``values[label] * scale`` in fp32, rounded once."""
        n, k = self.shape
        flat = self.values[self.labels().int()].view(n, k // BLOCK, BLOCK)
        return (flat * self.scales_fp32()[:, :, None]).view(n, k).to(dtype)


def unsupported(weight: Nf4Tensor) -> str | None:
    """Why the kernels cannot hold a weight; None if they can."""
    if weight.blocksize != BLOCK:
        return f"its blocks are of {weight.blocksize} weights, the kernels' of {BLOCK}"
    if weight.shape[1] % BLOCK:
        return f"its input size {weight.shape[1]} is no multiple of {BLOCK}"
    if not torch.equal(weight.quant_map.cpu(), torch.tensor(NF4_CODE)):
        return "its 16 values are not those of NF4"
    if isinstance(weight.absmax, NestedAbsmax) and weight.absmax.blocksize != _NESTED_BLOCK:
        return f"its nested blocks are of {weight.absmax.blocksize} scales, the kernels' of {_NESTED_BLOCK}"
    return None


def pack(weights: Sequence[Nf4Tensor], dtype: torch.dtype) -> Nf4Words:
    """Re-lay weights of equal K for activations of ``dtype``; on their device.

    Scales stay nested if all weights' are, by the same 256-entry code. Raises ValueError, with the reason, for weights
    that ``unsupported`` names or that differ in K.
    """
    for weight in weights:
        if (reason := unsupported(weight)) is not None:
            raise ValueError(f"NF4 weight {weight.shape}: {reason}")
    widths = {weight.shape[1] for weight in weights}
    if len(widths) != 1:
        raise ValueError(f"the weights of a fused site need one input size, got {sorted(widths)}")
    lookup, device, blocks = nf4_lookup(dtype), weights[0].device, widths.pop() // BLOCK
    label_of = torch.tensor(lookup.labels, dtype=torch.uint8, device=device)
    words = torch.cat([_words(weight, label_of) for weight in weights])

    nested = [weight.absmax for weight in weights if isinstance(weight.absmax, NestedAbsmax)]
    none = torch.empty(0, device=device)
    if len(nested) == len(weights) and all(torch.equal(one.code, nested[0].code) for one in nested):
        places = [0]
        for one in nested:
            places.append(places[-1] + one.absmax.numel() * _NESTED_BLOCK)
        first = [
            place + torch.arange(weight.shape[0], dtype=torch.int32, device=device) * blocks
            for place, weight in zip(places, weights, strict=False)
        ]
        scales = torch.cat([one.codes.view(-1, blocks) for one in nested])
        code, outer = nested[0].code, torch.cat([one.absmax for one in nested])
        offsets = [torch.full((w.shape[0],), one.offset, device=device) for w, one in zip(weights, nested, strict=True)]
        first_block, offset = torch.cat(first), torch.cat(offsets)
    else:
        scales = torch.cat([weight.absmax_fp32().view(-1, blocks) for weight in weights])
        code, outer, first_block, offset = none, none, none.int(), none
    values = torch.tensor(lookup.values, device=device)
    return Nf4Words(words, scales, code, outer, first_block, offset, values, dtype)


def join(parts: Sequence[Nf4Words]) -> Nf4Words | None:
    """Weights of equal K, one behind the other, in one copy; None if their scales are not held in the same way."""
    head = parts[0]
    if len({(part.nested, part.dtype) for part in parts}) > 1:
        return None
    words, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("words", "scales"))
    if not head.nested:
        return replace(head, words=words, scales=scales)
    if any(not torch.equal(part.code, head.code) for part in parts):
        return None
    first, place = [], 0
    for part in parts:
        first.append(part.first + place)
        place += part.outer.numel() * _NESTED_BLOCK
    outer, offset = (torch.cat([getattr(part, name) for part in parts]) for name in ("outer", "offset"))
    return replace(head, words=words, scales=scales, outer=outer, first=torch.cat(first), offset=offset)


def _words(weight: Nf4Tensor, label_of: torch.Tensor) -> torch.Tensor:
    n, k = weight.shape
    # Element 2j is the high nibble of byte j: pairs (even k, odd k), as the words want them.
    pairs = weight.packed.view(n, k // BLOCK, 4, 8)
    words = torch.zeros(n, k // BLOCK, 8, dtype=torch.int32, device=weight.device)
    for j in range(4):
        for b in range(2):
            codes = (pairs[:, :, j] >> 4 * (1 - b)) & 15
            words |= label_of[codes.int()].int() << 4 * (2 * j + b)
    return words.view(n, k // 8)
