"""RMSNorm, SiLU and biases on the CPU, a row at a time in one fixed order of summation."""

from __future__ import annotations

import torch
from numba import carray, cfunc

from manylora.kernels.cpu.threads import KERNEL, launch
from manylora.kernels.cpu.tiles import float32_from_bits, share
from manylora.kernels.cpu.vectors import add_8, copy_8, rms_norm_8, silu_mul_8

_SERIAL = 16384
"""Elements below which waking the other threads costs more than it saves (about 4 microseconds of work)."""


@cfunc(KERNEL, cache=True)
def _rms_norm_kernel(arguments, part, parts):
    a = carray(arguments, 8)
    x, x_stride, weight, out, out_stride, rows, width = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    epsilon = float32_from_bits(a[7])
    first, last = share(rows, part, parts, 1)
    for row in range(first, last):
        rms_norm_8(x + row * x_stride, weight, out + row * out_stride, width // 8, epsilon)


@cfunc(KERNEL, cache=True)
def _head_norm_kernel(arguments, part, parts):
    a = carray(arguments, 7)
    heads, stride, rows, n_heads, head_dim, weight = a[0], a[1], a[2], a[3], a[4], a[5]
    epsilon = float32_from_bits(a[6])
    first, last = share(rows, part, parts, 1)
    for row in range(first, last):
        for head in range(n_heads):
            place = heads + row * stride + 4 * head * head_dim
            rms_norm_8(place, weight, place, head_dim // 8, epsilon)


@cfunc(KERNEL, cache=True)
def _bias_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    bias, out, stride, rows, width, accumulate = a[0], a[1], a[2], a[3], a[4], a[5]
    first, last = share(width // 8, part, parts, 1)
    for row in range(rows):
        place = out + row * stride + 32 * first
        if accumulate != 0:
            add_8(bias + 32 * first, place, last - first)
        else:
            copy_8(bias + 32 * first, place, last - first)


@cfunc(KERNEL, cache=True)
def _silu_mul_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    x, x_stride, out, out_stride, rows, width = a[0], a[1], a[2], a[3], a[4], a[5]
    first, last = share(width // 8, part, parts, 1)
    for row in range(rows):
        gate = x + row * x_stride + 32 * first
        silu_mul_8(gate, gate + 4 * width, out + row * out_stride + 32 * first, last - first)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon_bits: int, out: torch.Tensor) -> None:
    """``out = x / sqrt(mean(x^2) + eps) * weight``; x, out ``[rows, width]`` fp32 with contiguous rows, width % 8 == 0.

    ``epsilon_bits`` is the fp32 epsilon's bit pattern (kernel arguments are integers).
    """
    rows, width = x.shape
    launch(
        _rms_norm_kernel, x.data_ptr(), x.stride(0) * 4, weight.data_ptr(), out.data_ptr(), out.stride(0) * 4, rows,
        width, epsilon_bits, keep=(x, out), parallel=rows * width > _SERIAL,
    )  # fmt: skip


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """``out = silu(gate) * up`` for ``gate_up`` ``[rows, 2 * width]`` (gate first), out ``[rows, width]``, fp32."""
    rows, width = out.shape
    launch(
        _silu_mul_kernel, gate_up.data_ptr(), gate_up.stride(0) * 4, out.data_ptr(), out.stride(0) * 4, rows, width,
        keep=(gate_up, out), parallel=rows * width > _SERIAL // 4,
    )  # fmt: skip


def head_norm_(heads: torch.Tensor, n_heads: int, weight: torch.Tensor, epsilon_bits: int) -> None:
    """RMSNorm in place of each head in ``[rows, n_heads * head_dim]`` fp32, contiguous rows; head_dim % 8 == 0."""
    rows = heads.shape[0]
    launch(
        _head_norm_kernel, heads.data_ptr(), heads.stride(0) * 4, rows, n_heads, weight.numel(), weight.data_ptr(),
        epsilon_bits, keep=(heads,), parallel=heads.numel() > _SERIAL,
    )  # fmt: skip


def put_bias(bias: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
    """Set every row of ``out`` ``[rows, width]`` to ``bias``, or ``add`` it to them; fp32, width % 8 == 0."""
    rows, width = out.shape
    launch(
        _bias_kernel, bias.data_ptr(), out.data_ptr(), out.stride(0) * 4, rows, width, int(add), keep=(out,),
        parallel=out.numel() > _SERIAL,
    )  # fmt: skip
