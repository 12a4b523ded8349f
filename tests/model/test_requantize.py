"""Rounding to NF4 that keeps what nearest rounding loses: where codes may go, what is right on average."""

from __future__ import annotations

import math

import pytest
import torch

from manylora.kernels.nf4_code import NF4_CODE
from manylora.server.model.bnb_format import quantize
from manylora.server.model.requantize import requantize

CODES = torch.tensor(NF4_CODE, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_weight_goes_to_one_of_the_two_codes_about_it() -> None:
    weight = normal(48, 256)
    got = requantize(weight, 1)
    assert (got.shape, got.blocksize, got.nested) == ((48, 256), 64, True)
    scale = got.absmax_fp32().double().repeat_interleave(64).view(48, 256)
    value = (weight.double() / scale).clamp(-1, 1)
    taken = got.dequantize().double() / scale
    below = (torch.bucketize(value, CODES, right=True) - 1).clamp(0, 14)
    at_low, at_high = ((taken - CODES[below + i]).abs() < 1e-6 for i in (0, 1))
    assert (at_low | at_high).all()
    assert at_low.any()
    assert at_high.any()


def test_the_scales_are_bitsandbytes_own() -> None:
    weight = normal(32, 512)
    assert torch.equal(requantize(weight, 1).absmax_fp32(), quantize(weight).absmax_fp32())


def test_it_is_right_on_average() -> None:
    """Over 400 seeds the mean error of each weight is that of 400 coins: at most five standard deviations anywhere."""
    weight, seeds = normal(16, 128), 400
    total = torch.zeros(16, 128, dtype=torch.float64)
    for seed in range(seeds):
        got = requantize(weight, seed)
        total += got.dequantize().double()
    scale = got.absmax_fp32().double().repeat_interleave(64).view(16, 128)
    inside = (weight.double().abs() <= scale).double()  # the 8-bit scale may cut a block's largest value off
    value = (weight.double() / scale).clamp(-1, 1)
    below = (torch.bucketize(value, CODES, right=True) - 1).clamp(0, 14)
    deviation = (value - CODES[below]) * (CODES[below + 1] - value)
    error = (total / seeds - weight.double()) * inside
    assert (error.abs() <= 5 * (deviation / seeds).sqrt() * scale + 1e-6).all()


def test_a_small_delta_on_quantised_weights_survives_where_nearest_rounding_loses_it() -> None:
    """What merging into NF4 is about: of a rank-one delta of 2 % of the weights, seen along its own direction."""
    base = quantize(normal(256, 512)).dequantize()
    a, b = normal(512, seed=1), normal(256, seed=2)
    delta = torch.outer(b, a)
    delta *= 0.02 * base.norm() / delta.norm()

    def kept(weight: torch.Tensor) -> float:
        return float(((weight - base) * delta).sum() / delta.square().sum())

    assert abs(kept(quantize(base + delta).dequantize())) < 0.1
    # The noise of 131,072 independent errors of some 6 % along one direction.
    noise = 0.06 / 0.02 / math.sqrt(base.numel())
    assert kept(requantize(base + delta, 3).dequantize()) == pytest.approx(1.0, abs=0.02 + 6 * noise)


def test_weights_on_codes_stay_where_they_are() -> None:
    base = quantize(normal(64, 128))
    once = requantize(base.dequantize(), 5)
    close = (once.dequantize() - base.dequantize()).abs() <= 0.01 * base.absmax_fp32().repeat_interleave(64).view(
        64, 128
    )
    assert close.double().mean() > 0.98, "only rounding of the scales moves them"


def test_equal_seeds_give_equal_codes() -> None:
    weight = normal(32, 128)
    first, second, other = requantize(weight, 7), requantize(weight, 7), requantize(weight, 8)
    assert torch.equal(first.packed, second.packed)
    assert not torch.equal(first.packed, other.packed)


def test_blocks_of_zeros_and_constants() -> None:
    weight = normal(16, 128)
    weight[3, :64] = 0.0
    weight[4, 64:] = 0.25
    got = requantize(weight, 1).dequantize()
    assert got.isfinite().all()
    assert not got[3, :64].any(), "nested scales of zero are not zero to the last bit, but the code of 0 is 0"
    # The scale is off by 8 bits of the largest one; where it is more than the constant, two codes are taken.
    assert (got[4, 64:] - 0.25).abs().max() <= 0.304 * 0.27
    assert float(got[4, 64:].mean()) == pytest.approx(0.25, abs=0.03)


def test_what_is_not_finite_is_refused() -> None:
    weight = normal(16, 64)
    for value in (float("nan"), float("inf")):
        weight[2, 3] = value
        with pytest.raises(ValueError, match="not finite"):
            requantize(weight, 1)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's codes are found, whatever is rounded together; the draws are others."""
    weight = quantize(normal(48, 128)).dequantize()
    monkeypatch.setattr("manylora.server.model.requantize._CHUNK", 640)
    got = requantize(weight, 1)
    assert ((got.dequantize() - weight).norm() / weight.norm()) < 0.05
