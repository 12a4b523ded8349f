"""Prepared linear layers taken apart, put together and read back, for every implementation of the operations.

Bits, not tolerances, wherever values are only moved: what ``dense`` gives is what the kernels multiply with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from manylora.kernels.cpu import available
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import Ops
from manylora.kernels.torch_ops import TorchOps
from manylora.server.model.synthetic import synthetic_nf4

EPS = 2.0**-24


def _numba() -> Ops:
    if not available():
        pytest.skip("no AVX2 and FMA here")
    from manylora.kernels.cpu.ops import NumbaOps

    return NumbaOps("fp32")


def _cuda() -> Ops:
    pytest.importorskip("triton")
    from manylora.kernels.cuda.ops import CudaOps

    return CudaOps("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


OPS: dict[str, Callable[[], Ops]] = {
    "numba": _numba,
    "torch": lambda: TorchOps("cpu", torch.float32, resident=False),
    "torch resident": lambda: TorchOps("cpu", torch.float32, resident=True),
    "cuda": _cuda,
}


@pytest.fixture(params=OPS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return OPS[request.param]()


def nf4(n: int, k: int, seed: int, *, nested: bool = True) -> Nf4Tensor:
    return synthetic_nf4(n, k, torch.Generator().manual_seed(seed), nested=nested)


def normal(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multiplied(ops: Ops, weight: Nf4Tensor) -> torch.Tensor:
    """The values that the operations multiply with: CUDA's kernels round the 16 codes to bfloat16."""
    if ops.name != "cuda":
        return weight.dequantize()
    from manylora.kernels.cuda.nf4_words import pack

    return pack([weight], torch.float32).dequantize()


@pytest.mark.parametrize("nested", [True, False])
def test_dense_gives_back_the_bits_of_the_weights(ops: Ops, nested: bool) -> None:
    weights = [nf4(n, 192, n, nested=nested) for n in (32, 16, 64)]
    prepared = ops.prepare_linear(weights, normal(112))
    expected = torch.cat([multiplied(ops, weight) for weight in weights])
    got = ops.dense(prepared)
    assert got.dtype == torch.float32
    assert torch.equal(got.cpu(), expected)
    again = ops.dense(prepared)
    got.zero_()
    assert torch.equal(again.cpu(), expected)
    assert torch.equal(ops.dense(prepared).cpu(), expected), "dense handed out the operations' own memory"


def test_rows_are_views_without_bytes_of_their_own(ops: Ops) -> None:
    weights = [nf4(n, 128, n) for n in (32, 16, 64)]
    prepared = ops.prepare_linear(weights, normal(112))
    x = normal(3, 128).to(ops.device)
    for i, (first, last) in enumerate([(0, 32), (32, 48), (48, 112)]):
        view = ops.rows(prepared, first, last)
        assert view.nbytes == 0
        assert torch.equal(ops.dense(view).cpu(), multiplied(ops, weights[i]))
        alone = ops.linear(x, ops.prepare_linear([weights[i]], None))
        torch.testing.assert_close(ops.linear(x, view), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 4, 9, 97])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_dense_layers_match_fp64(ops: Ops, rows: int, with_bias: bool, residual: bool) -> None:
    k = 300  # more than a decoded panel is deep, and no multiple of one
    bias = normal(48, seed=2) if with_bias else None
    prepared = ops.prepare_dense(normal(48, k), bias)
    assert prepared.nbytes == 48 * k * ops.dense_itemsize
    kept = ops.dense(prepared)
    if ops.name == "numba":
        assert torch.equal(kept, normal(48, k).bfloat16().float())
    x, stream = normal(rows, k, seed=3).to(ops.device), normal(rows, 48, seed=4).to(ops.device)
    exact = x.double() @ kept.double().T
    magnitude = x.double().abs() @ kept.double().abs().T
    for term in (bias if with_bias else None, stream if residual else None):
        if term is not None:
            exact, magnitude = exact + term.to(ops.device), magnitude + term.to(ops.device).abs()
    target = stream.clone()
    y = ops.linear(x, prepared, add_to=target if residual else None)
    assert (y is target) is residual
    assert ((y - exact).abs() <= (k + 2) * EPS * magnitude).all()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("kinds", ["nnn", "ddd", "ndn", "dnd", "nnd"])
def test_a_stack_is_its_parts_side_by_side(ops: Ops, kinds: str, residual: bool) -> None:
    base = ops.prepare_linear([nf4(n, 128, n) for n in (32, 16, 64)], normal(112, seed=9))
    bounds = [(0, 32), (32, 48), (48, 112)]
    parts: list[Any] = [
        ops.rows(base, first, last) if kind == "n" else ops.prepare_dense(normal(last - first, 128, seed=first), None)
        for kind, (first, last) in zip(kinds, bounds, strict=True)
    ]
    bias = normal(112, seed=5)
    stack = ops.stack(parts, bias)
    matrix = ops.dense(stack)
    assert torch.equal(matrix, torch.cat([ops.dense(part) for part in parts]))
    for rows in (1, 7):
        x, stream = normal(rows, 128, seed=3).to(ops.device), normal(rows, 112, seed=4).to(ops.device)
        added = bias.to(ops.device) + stream if residual else bias.to(ops.device)
        bound = 130 * EPS * (x.double().abs() @ matrix.double().abs().T + bias.to(ops.device).abs() + stream.abs())
        y = ops.linear(x, stack, add_to=stream.clone() if residual else None)
        assert ((y - (x.double() @ matrix.double().T + added)).abs() <= bound).all()
    cut = ops.rows(stack, 32, 112)
    assert torch.equal(ops.dense(cut), torch.cat([ops.dense(part) for part in parts[1:]]))


def test_a_stack_of_one_kind_has_bytes_of_its_own(ops: Ops) -> None:
    base = ops.prepare_linear([nf4(n, 128, n) for n in (32, 32)], None)
    other = ops.prepare_linear([nf4(32, 128, 5)], None)
    stack = ops.stack([ops.rows(base, 32, 64), other], None)
    if ops.name == "torch":
        assert stack.nbytes > 0
    else:
        assert abs(stack.nbytes - base.nbytes) <= 64, "scales of scales aside, as many as two weights of the size"


def test_rows_of_stacks_with_nested_and_plain_scales(ops: Ops) -> None:
    """Scales that are held in different ways cannot be one copy."""
    nested, plain = (ops.prepare_linear([nf4(32, 128, 3, nested=kind)], None) for kind in (True, False))
    stack = ops.stack([nested, plain], None)
    assert torch.equal(ops.dense(stack), torch.cat([ops.dense(nested), ops.dense(plain)]))


def test_a_dense_row_does_not_depend_on_the_others() -> None:
    ops = _numba()
    base = ops.prepare_linear([nf4(64, 576, 1)], None)
    parts = [base, ops.prepare_dense(normal(112, 576), None)]
    for weight in (parts[1], ops.stack(parts, normal(176))):
        x = normal(200, 576, seed=2)
        together = ops.linear(x, weight)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 32, 97):
            assert torch.equal(ops.linear(x[:rows], weight), together[:rows])


def test_dense_may_run_beside_queued_operations() -> None:
    """On another thread, and on this one while operations are queued: what is queued gives what it would have given."""
    ops = _numba()
    weight = nf4(256, 512, 1)
    prepared, x = ops.prepare_linear([weight], None), normal(5, 512)
    expected = ops.linear(x, prepared)
    found: list[torch.Tensor] = []
    total = torch.zeros(5, 256)
    with ops.together():
        ops.linear(x, prepared, add_to=total)
        thread = threading.Thread(target=lambda: found.append(ops.dense(prepared)))
        thread.start()
        thread.join()
        found.append(ops.dense(prepared))
        assert not total.any(), "the queue ran"
    assert torch.equal(total, expected)
    assert all(torch.equal(one, weight.dequantize()) for one in found)


def test_what_cannot_be_cut_or_packed_is_refused() -> None:
    ops = _numba()
    with pytest.raises(ValueError, match=r"rows 8 to 32 are not whole tiles of 16"):
        ops.rows(ops.prepare_linear([nf4(32, 128, 1)], None), 8, 32)
    with pytest.raises(ValueError, match=r"outputs are no multiple of 16"):
        ops.prepare_dense(normal(24, 64), None)
    plain = TorchOps("cpu", torch.float32, resident=False)
    with pytest.raises(ValueError, match=r"rows 0 to 40 cut through a weight of rows 32 to 64"):
        plain.rows(plain.prepare_linear([nf4(32, 128, 1), nf4(32, 128, 2)], None), 0, 40)
