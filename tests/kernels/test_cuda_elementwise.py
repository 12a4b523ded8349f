"""The element-wise Triton kernels against fp64: in Triton's interpreter, or on a GPU where there is one.

Outputs start as NaN. Tolerances: fp32 inside, so a few units of 2^-24 for the arithmetic (16 of them: intrinsics are
good to 2 units, Triton's division to 2), plus one rounding to the type of the output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels.cuda import attention
from manylora.kernels.cuda import elementwise as m
from manylora.kernels.ops import PAGE_SIZE, AttentionShape

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 2.0**-24
# What the type rounds by, relative. The interpreter truncates to bf16 (kernels-lab, section 2), so it is not asked to.
ROUNDING = {torch.float32: EPS, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ROUNDING) if ON_GPU else [torch.float32]
pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rows(n: int, width: int, dtype: torch.dtype, *, seed: int = 0, apart: int = 0) -> torch.Tensor:
    """Normal numbers; between the rows ``apart`` NaN that no one may touch."""
    random = torch.Generator().manual_seed(seed)
    found = torch.full((n, width + apart), float("nan"))
    found[:, :width] = torch.randn(n, width, generator=random)
    return found.to(DEVICE, dtype)[:, :width]


def poisoned(n: int, width: int, dtype: torch.dtype, apart: int = 0) -> torch.Tensor:
    return torch.full((n, width + apart), float("nan"), dtype=dtype, device=DEVICE)[:, :width]


def gap_untouched(out: torch.Tensor) -> bool:
    """What lies between the rows of ``poisoned`` is still NaN."""
    assert out._base is not None
    return bool(out._base[:, out.shape[1] :].isnan().all())


def close(got: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor | None = None, floor: float = 0.0) -> None:
    """``magnitude``: what was added up to give ``exact``."""
    rounding = ROUNDING[got.dtype]
    bound = 16 * EPS * (exact.abs() if magnitude is None else magnitude) + 1.01 * rounding * exact.abs() + floor
    assert not got.isnan().any()
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("width", [48, 576, 2048])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    x, weight = rows(5, width, dtype, apart=16) * 3, rows(1, width, torch.float32, seed=1)[0]
    wide = x.double()
    # The sum of squares adds up to ``width`` positive numbers; its error is that over two, under the root.
    slack = 1 + width / 32
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    close(m.rms_norm(x, weight, 1e-5), exact, exact.abs() * slack)
    out = poisoned(5, width, dtype, apart=16)
    assert m.rms_norm(x, weight, 1e-5, out=out) is out
    close(out, exact, exact.abs() * slack)
    assert gap_untouched(out)
    zeros = torch.zeros_like(x)
    assert not m.rms_norm(zeros, weight, 1e-5).any()


def test_rms_norm_adds_epsilon(dtype: torch.dtype) -> None:
    x, weight = rows(3, 64, dtype) / 32, torch.ones(64, device=DEVICE)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.5).sqrt()
    close(m.rms_norm(x, weight, 0.5), exact, exact.abs() * 3)


@pytest.mark.parametrize(("n_heads", "d"), [(1, 64), (3, 80), (16, 128), (40, 32)])
def test_head_norm_in_place_of_a_column_slice(n_heads: int, d: int, dtype: torch.dtype) -> None:
    whole, weight = rows(4, (n_heads + 2) * d, dtype), rows(1, d, torch.float32, seed=1)[0]
    before = whole.clone()
    wide = before[:, d : (n_heads + 1) * d].double().view(4, n_heads, d)
    exact = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()).view(4, -1)
    m.head_norm_(whole[:, d : (n_heads + 1) * d], weight, 1e-6)
    close(whole[:, d : (n_heads + 1) * d], exact, exact.abs() * 5)
    assert torch.equal(whole[:, :d], before[:, :d])
    assert torch.equal(whole[:, (n_heads + 1) * d :], before[:, (n_heads + 1) * d :])


SHAPES = [AttentionShape(2, 2, 32), AttentionShape(9, 3, 64), AttentionShape(8, 1, 80), AttentionShape(4, 2, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope_rotates_and_stores(shape: AttentionShape, dtype: torch.dtype) -> None:
    d, q_size, kv_size = shape.head_dim, shape.q_size, shape.kv_size
    owners = torch.tensor([1, 0, 0, -1, 2, -1], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([0, 15, 16, 10**6, 40, -7], dtype=torch.int32, device=DEVICE)
    tables = torch.tensor([[3, 1, 8], [6, 8, 8], [8, 8, 4]], dtype=torch.int32, device=DEVICE)
    angles = torch.rand(41, d // 2, generator=torch.Generator().manual_seed(2)) * 6.3
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    qkv = rows(6, q_size + 2 * kv_size, dtype, apart=32)
    before = qkv.clone()
    cache: Any = tuple(
        torch.full(attention.cache_shape(9, shape), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)
    )
    m.rope_store_(qkv, cos, sin, positions, owners, tables, cache, shape)

    touched = torch.zeros(9, PAGE_SIZE, dtype=torch.bool, device=DEVICE)
    for token, owner in enumerate(owners.tolist()):
        if owner < 0:
            assert torch.equal(qkv[token], before[token])
            continue
        position = int(positions[token])
        page, slot = int(tables[owner, position // PAGE_SIZE]), position % PAGE_SIZE
        touched[page, slot] = True
        heads = before[token].double().view(-1, d)
        left, right = heads[: q_size // d + shape.n_kv_heads].chunk(2, dim=-1)
        c, s = cos[position].double(), sin[position].double()
        exact = torch.cat((left * c - right * s, right * c + left * s), dim=-1)
        magnitude = torch.cat(((left * c).abs() + (right * s).abs(), (right * c).abs() + (left * s).abs()), dim=-1)
        close(qkv[token, :q_size].view(-1, d), exact[: shape.n_heads], magnitude[: shape.n_heads])
        close(cache[0][page, :, slot], exact[shape.n_heads :], magnitude[shape.n_heads :])
        assert torch.equal(cache[1][page, :, slot], before[token, q_size + kv_size :].view(-1, d))
    assert torch.equal(qkv[:, q_size:], before[:, q_size:])
    for side in cache:
        # No other slot, and neither page 8, which stands for no page, was written.
        assert torch.equal(~side.isnan(), touched[:, None, :, None].expand_as(side))


def test_rope_refuses_what_does_not_fit(dtype: torch.dtype) -> None:
    shape = AttentionShape(4, 2, 32)
    cache: Any = tuple(torch.zeros(attention.cache_shape(1, shape), dtype=dtype, device=DEVICE) for _ in range(2))
    cos = torch.zeros(8, 16, device=DEVICE)
    numbers = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    qkv = rows(1, 256, dtype)

    def rope(qkv: torch.Tensor, cos: torch.Tensor, cache: Any) -> None:
        m.rope_store_(qkv, cos, cos, numbers, numbers, numbers[None], cache, shape)

    rope(qkv, cos, cache)
    with pytest.raises(ValueError, match="expected 1 rows of 256"):
        rope(qkv[:, :128], cos, cache)
    with pytest.raises(ValueError, match="fp32 rows of 16"):
        rope(qkv, cos.double(), cache)
    with pytest.raises(ValueError, match="contiguous cache"):
        rope(qkv, cos, (cache[0].transpose(2, 3), cache[1]))


@pytest.mark.parametrize("width", [16, 1000, 2560])
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    gate_up = rows(3, 2 * width, dtype, apart=32)
    gate_up[:, :width] = torch.linspace(-120, 120, 3 * width).view(3, width)  # both tails of the exponential
    gate, up = gate_up.double().chunk(2, dim=-1)
    # exp(-g) of a rounded argument: |g| units off. What fp32 or fp16 hold as subnormals is off by their last place.
    floor = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}[dtype]
    exact = gate * torch.sigmoid(gate) * up
    magnitude = exact.abs() * (1 + gate.abs() / 4)
    close(m.silu_mul(gate_up), exact, magnitude, floor)
    out = poisoned(3, width, dtype, apart=16)
    # Adjacent rows here: beyond a row there are numbers, which would overwrite the NaN beyond the row of the output.
    assert m.silu_mul(gate_up.contiguous(), out=out) is out
    close(out, exact, magnitude, floor)
    assert gap_untouched(out)


@pytest.mark.parametrize("width", [48, 1040])
def test_embed(width: int, dtype: torch.dtype) -> None:
    table = rows(300, width, dtype, apart=16)
    ids = torch.tensor([0, 299, 7, 7, 150], device=DEVICE)
    assert torch.equal(m.embed(ids, table), table[ids])
    out = poisoned(5, width, dtype, apart=16)
    assert m.embed(ids, table, out) is out
    assert torch.equal(out, table[ids])
    assert gap_untouched(out)
    bf16 = table.bfloat16()  # to a wider type: exact in the interpreter too
    assert torch.equal(m.embed(ids, bf16, poisoned(5, width, torch.float32)), bf16[ids].float())


def test_rows_are_independent(dtype: torch.dtype) -> None:
    x, weight = rows(7, 576, dtype), rows(1, 576, torch.float32, seed=1)[0]
    norm, silu = m.rms_norm(x, weight, 1e-5), m.silu_mul(x)
    for i in range(7):
        assert torch.equal(m.rms_norm(x[i : i + 1], weight, 1e-5), norm[i : i + 1])
        assert torch.equal(m.silu_mul(x[i : i + 1]), silu[i : i + 1])
