"""`Nf4Tensor` against bitsandbytes, which defines the format."""

from __future__ import annotations

import dataclasses
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from manylora.kernels.nf4_tensor import NestedAbsmax, Nf4Tensor


def make(n: int, k: int, *, nested: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Nf4Tensor, torch.Tensor]:
    """A random weight as `Nf4Tensor`, and what bitsandbytes makes of the same bytes in fp32."""
    weight = (torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * 0.02).to(dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
    absmax = (
        NestedAbsmax(state.absmax, state.state2.code, state.state2.absmax, state.offset.item(), state.state2.blocksize)
        if nested
        else state.absmax
    )
    state.dtype = torch.float32
    expected = bnb.dequantize_4bit(packed, state)
    return Nf4Tensor(packed.view(-1), absmax, state.code, (n, k), 64, dtype), expected


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(64, 64), (192, 576), (320, 128), (3, 50)], ids=str)
def test_dequantize_is_bit_equal_to_bitsandbytes(shape: tuple[int, int], nested: bool) -> None:
    tensor, expected = make(*shape, nested=nested)
    assert torch.equal(tensor.dequantize(), expected)
    assert torch.equal(tensor.dequantize(torch.bfloat16), expected.to(torch.bfloat16))
    assert tensor.nested is nested
    assert tensor.absmax_fp32().shape == (tensor.n_blocks,)


def test_high_nibble_comes_first() -> None:
    code = torch.arange(16, dtype=torch.float32)
    packed = torch.tensor([0x1F] + [0] * 31, dtype=torch.uint8)
    tensor = Nf4Tensor(packed, torch.tensor([2.0]), code, (1, 64))
    assert tensor.dequantize()[0, :3].tolist() == [2.0, 30.0, 0.0]


def test_a_block_of_zeros_is_zero() -> None:
    packed, state = bnb.quantize_4bit(torch.zeros(2, 64), quant_type="nf4", blocksize=64)
    tensor = Nf4Tensor(packed.view(-1), state.absmax, state.code, (2, 64))
    assert torch.equal(tensor.dequantize(), torch.zeros(2, 64))


def test_dequantizing_writes_nothing_into_the_weight() -> None:
    tensor, _ = make(64, 64, nested=True)
    assert isinstance(tensor.absmax, NestedAbsmax)
    before = tensor.packed.clone(), tensor.absmax.codes.clone(), tensor.absmax.absmax.clone()
    tensor.dequantize().zero_()
    tensor.absmax_fp32().zero_()
    assert torch.equal(tensor.packed, before[0])
    assert torch.equal(tensor.absmax.codes, before[1])
    assert torch.equal(tensor.absmax.absmax, before[2])


def test_to_the_same_device_is_the_same_object() -> None:
    tensor, _ = make(64, 64, nested=False)
    assert tensor.to("cpu") is tensor
    assert tensor.nbytes == 64 * 64 // 2 + 64 * 4 + 16 * 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("packed", torch.zeros(10, dtype=torch.uint8), r"packed must be uint8 \[2048\]"),
        ("packed", torch.zeros(2048, dtype=torch.int8), "got int8"),
        ("absmax", torch.zeros(63), "64 scales"),
        ("absmax", torch.zeros(64, dtype=torch.bfloat16), "got bfloat16"),
        ("quant_map", torch.zeros(15), "quant_map"),
        ("shape", (63, 63), "even"),
    ],
)
def test_parts_that_do_not_fit_are_refused(field: str, value: Any, message: str) -> None:
    tensor, _ = make(64, 64, nested=False)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tensor, **{field: value})


def test_nested_parts_that_do_not_fit_are_refused() -> None:
    tensor, _ = make(64, 64, nested=True)
    assert isinstance(tensor.absmax, NestedAbsmax)
    faults: list[tuple[str, Any]] = [("codes", torch.zeros(64)), ("code", torch.zeros(16)), ("absmax", torch.zeros(2))]
    for field, value in faults:
        with pytest.raises(ValueError, match="nested"):
            dataclasses.replace(tensor.absmax, **{field: value})


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("n", "k"), [(192, 576), (512, 128)])
def test_rows_cut_out_have_the_values_of_the_whole(n: int, k: int, nested: bool) -> None:
    """Wherever they are cut: between two blocks of nested scales, where they stay nested, or within one."""
    tensor, _ = make(n, k, nested=nested)
    whole = tensor.dequantize()
    for first, last in ((0, n), (0, n // 2), (n // 2, n), (1, 2), (n - 3, n)):
        part = tensor.rows(first, last)
        assert torch.equal(part.dequantize(), whole[first:last]), (first, last)
        assert part.packed.untyped_storage().nbytes() == part.packed.nbytes  # the whole may be let go of
        assert part.nested == (nested and first * k // 64 % 256 == 0)


def test_rows_that_are_no_whole_blocks_cannot_be_cut() -> None:
    tensor, _ = make(4, 96, nested=False)
    with pytest.raises(ValueError, match="cannot be cut"):
        tensor.rows(1, 2)
