"""Norms, activations, caps and biases on the CPU, a row at a time in one fixed order of summation."""

from __future__ import annotations

import math

import torch
from numba import carray, njit

from manylora.kernels.cpu.compiling import kernel
from manylora.kernels.cpu.threads import launch
from manylora.kernels.cpu.tiles import float32_from_bits, float32_view, share
from manylora.kernels.cpu.vectors import gelu_8, gelu_mul_8, layer_norm_8, rms_norm_8, silu_mul_8, softcap_8

_SERIAL = 1 << 16
"""Elements below which waking the other threads costs more than it saves (about 4 microseconds of work)."""


@kernel
def _rms_norm_kernel(arguments, part, parts):
    a = carray(arguments, 9)
    x, x_stride, weight, out, out_stride, rows, heads, width = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    epsilon = float32_from_bits(a[8])
    first, last = share(rows, part, parts, 1)
    for row in range(first, last):
        for head in range(heads):
            column = 4 * head * width
            rms_norm_8(x + row * x_stride + column, weight, out + row * out_stride + column, width // 8, epsilon)


@kernel
def _bias_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    bias, out, stride, rows, width, accumulate = a[0], a[1], a[2], a[3], a[4], a[5]
    first, last = share(width, part, parts, 16)
    values = float32_view(bias, width)
    for row in range(rows):
        target = float32_view(out + row * stride, width)
        for i in range(first, last):
            target[i] = target[i] + values[i] if accumulate != 0 else values[i]


@kernel
def _silu_mul_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    x, x_stride, out, out_stride, rows, width = a[0], a[1], a[2], a[3], a[4], a[5]
    first, last = share(width // 8, part, parts, 1)
    for row in range(rows):
        gate = x + row * x_stride + 32 * first
        silu_mul_8(gate, gate + 4 * width, out + row * out_stride + 32 * first, last - first)


@kernel
def _gelu_mul_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    x, x_stride, out, out_stride, rows, width = a[0], a[1], a[2], a[3], a[4], a[5]
    first, last = share(width // 8, part, parts, 1)
    for row in range(rows):
        gate = x + row * x_stride + 32 * first
        gelu_mul_8(gate, gate + 4 * width, out + row * out_stride + 32 * first, last - first)


@kernel
def _gelu_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    x, x_stride, out, out_stride, rows, width = a[0], a[1], a[2], a[3], a[4], a[5]
    first, last = share(width // 8, part, parts, 1)
    for row in range(rows):
        gelu_8(x + row * x_stride + 32 * first, out + row * out_stride + 32 * first, last - first)


@kernel
def _layer_norm_kernel(arguments, part, parts):
    a = carray(arguments, 9)
    x, x_stride, weight, bias, out, out_stride, rows, width = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    epsilon = float32_from_bits(a[8])
    first, last = share(rows, part, parts, 1)
    for row in range(first, last):
        layer_norm_8(x + row * x_stride, weight, bias, out + row * out_stride, width // 8, epsilon)


@kernel
def _add_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    x, x_stride, y, y_stride, rows, width = a[0], a[1], a[2], a[3], a[4], a[5]
    first, last = share(width, part, parts, 16)
    for row in range(rows):
        target, values = float32_view(x + row * x_stride, width), float32_view(y + row * y_stride, width)
        for i in range(first, last):
            target[i] += values[i]


@njit(nogil=True)
def _softcap_tail(x, width, factor, cap):
    """The last values of a row, if they are no whole vector of eight: by their column alone, as the others."""
    values = float32_view(x, width)
    for i in range(width // 8 * 8, width):
        values[i] = cap * math.tanh(factor * values[i])


@kernel
def _softcap_kernel(arguments, part, parts):
    a = carray(arguments, 6)
    x, x_stride, rows, width = a[0], a[1], a[2], a[3]
    factor, cap = float32_from_bits(a[4]), float32_from_bits(a[5])
    first, last = share(width // 8, part, parts, 2)
    for row in range(rows):
        softcap_8(x + row * x_stride + 32 * first, last - first, factor, cap)
        if part == parts - 1:
            _softcap_tail(x + row * x_stride, width, factor, cap)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon_bits: int, out: torch.Tensor) -> None:
    """``out = x / sqrt(mean(x^2) + eps) * weight`` of each head in ``[rows, heads * width]``, ``width`` being the
    weight's; fp32 with contiguous rows, width % 8 == 0; ``out`` may be ``x``.

    ``epsilon_bits`` is the fp32 epsilon's bit pattern (kernel arguments are integers).
    """
    rows, width = x.shape[0], weight.numel()
    launch(
        _rms_norm_kernel, x.data_ptr(), x.stride(0) * 4, weight.data_ptr(), out.data_ptr(), out.stride(0) * 4, rows,
        x.shape[1] // width, width, epsilon_bits, keep=(x, out), parallel=x.numel() > _SERIAL,
    )  # fmt: skip


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """``out = silu(gate) * up`` for ``gate_up`` ``[rows, 2 * width]`` (gate first), out ``[rows, width]``, fp32."""
    rows, width = out.shape
    launch(
        _silu_mul_kernel, gate_up.data_ptr(), gate_up.stride(0) * 4, out.data_ptr(), out.stride(0) * 4, rows, width,
        keep=(gate_up, out), parallel=rows * width > _SERIAL // 4,
    )  # fmt: skip


def gelu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """``out = gelu(gate) * up``, GELU in its tanh form; shapes as ``silu_mul``."""
    rows, width = out.shape
    launch(
        _gelu_mul_kernel, gate_up.data_ptr(), gate_up.stride(0) * 4, out.data_ptr(), out.stride(0) * 4, rows, width,
        keep=(gate_up, out), parallel=rows * width > _SERIAL // 4,
    )  # fmt: skip


def gelu(x: torch.Tensor, out: torch.Tensor) -> None:
    """``out = gelu(x)`` of ``[rows, width]``, fp32, in its tanh form; width % 8 == 0."""
    rows, width = out.shape
    launch(
        _gelu_kernel, x.data_ptr(), x.stride(0) * 4, out.data_ptr(), out.stride(0) * 4, rows, width, keep=(x, out),
        parallel=rows * width > _SERIAL // 4,
    )  # fmt: skip


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon_bits: int, out: torch.Tensor) -> None:
    """``out = (x - mean) / sqrt(variance + eps) * weight + bias`` of each row of ``[rows, width]``; otherwise as
    ``rms_norm``."""
    rows, width = x.shape
    launch(
        _layer_norm_kernel, x.data_ptr(), x.stride(0) * 4, weight.data_ptr(), bias.data_ptr(), out.data_ptr(),
        out.stride(0) * 4, rows, width, epsilon_bits, keep=(x, out), parallel=x.numel() > _SERIAL,
    )  # fmt: skip


def add(x: torch.Tensor, y: torch.Tensor) -> None:
    """``x += y`` of ``[rows, width]``, fp32."""
    rows, width = x.shape
    launch(
        _add_kernel, x.data_ptr(), x.stride(0) * 4, y.data_ptr(), y.stride(0) * 4, rows, width, keep=(x, y),
        parallel=x.numel() > _SERIAL,
    )  # fmt: skip


def softcap(x: torch.Tensor, factor_bits: int, cap_bits: int) -> None:
    """``x = cap * tanh(factor * x)`` of ``[rows, width]`` in place, fp32; both numbers as their bit patterns."""
    rows, width = x.shape
    launch(
        _softcap_kernel, x.data_ptr(), x.stride(0) * 4, rows, width, factor_bits, cap_bits, keep=(x,),
        parallel=x.numel() > _SERIAL // 4,
    )  # fmt: skip


def put_bias(bias: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
    """Set every row of ``out`` ``[rows, width]`` to ``bias``, or ``add`` it to them; fp32."""
    rows, width = out.shape
    launch(
        _bias_kernel, bias.data_ptr(), out.data_ptr(), out.stride(0) * 4, rows, width, int(add), keep=(out,),
        parallel=out.numel() > _SERIAL,
    )  # fmt: skip
