"""Device functions that turn words of NF4 labels and their scales into what the matrix units take."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora.kernels.cuda.nf4_lookup import decode_asm, nf4_lookup

_ASM_BF16 = tl.constexpr(decode_asm(nf4_lookup(torch.bfloat16)))
_ASM_FP16 = tl.constexpr(decode_asm(nf4_lookup(torch.float16)))
_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r")


@triton.jit
def _halves(b_pairs, DTYPE: tl.constexpr):
    """int32 of two 16-bit values -> both, along a new last axis."""
    b_low = (b_pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    b_high = (b_pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(b_low, b_high)


@triton.jit
def _looked_up(b_words, p_values, FIRST: tl.constexpr, DTYPE: tl.constexpr):
    """The values of nibbles FIRST and FIRST + 1, along a new last axis."""
    b_low = tl.load(p_values + ((b_words >> (4 * FIRST)) & 15)).to(DTYPE)
    b_high = tl.load(p_values + ((b_words >> (4 * FIRST + 4)) & 15)).to(DTYPE)
    return tl.join(b_low, b_high)


@triton.jit
def decode(b_words, p_values, BN: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """int32 words ``[BN, 8]`` of a 64-block -> values ``[BN, 64]``, unscaled.

    ``FAST``: byte permutes (NVIDIA, 16 bits). Else look-ups in memory: any device, and the interpreter.
    """
    if FAST:
        b_0, b_1, b_2, b_3 = tl.inline_asm_elementwise(
            _ASM_FP16 if tl.float16 == DTYPE else _ASM_BF16,
            _CONSTRAINTS,
            [b_words],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        b_even = tl.join(_halves(b_0, DTYPE), _halves(b_2, DTYPE))
        b_odd = tl.join(_halves(b_1, DTYPE), _halves(b_3, DTYPE))
    else:
        b_even = tl.join(_looked_up(b_words, p_values, 0, DTYPE), _looked_up(b_words, p_values, 4, DTYPE))
        b_odd = tl.join(_looked_up(b_words, p_values, 2, DTYPE), _looked_up(b_words, p_values, 6, DTYPE))
    # [BN, word, b, j / 2, j % 2] -> [BN, k] with k = 16 j + 2 word + b: nothing moves between threads.
    return tl.join(b_even, b_odd).permute(0, 3, 4, 1, 2).reshape(BN, 64)


@triton.jit
def nested_scale(b_codes, b_outer, b_offset, p_code, FAST: tl.constexpr):
    """``code[codes] * outer + offset``, product and sum rounded separately, as bitsandbytes does: the bits must agree,
    and a compiler would make one fused operation of them."""
    b_code = tl.load(p_code + b_codes.to(tl.int32))
    if FAST:
        b_product = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [b_code, b_outer], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        b_product = b_code * b_outer
    return b_product + b_offset
