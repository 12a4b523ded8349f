"""What only some families need of the CPU kernels, against fp64: GELU, soft caps on scores and logits, sums in place.
Tolerances: a few units of 2^-24 for each function, and what its argument's rounding is magnified to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manylora.kernels.cpu import available
from manylora.kernels.ops import AttentionShape, Ops, PagedSequences
from manylora.kernels.torch_ops import TorchOps

pytestmark = pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")

EPS = 2.0**-24


@pytest.fixture(scope="module")
def ops() -> Ops:
    from manylora.kernels.cpu.ops import NumbaOps

    return NumbaOps()


def test_gelu_far_into_both_tails(ops: Ops) -> None:
    gate = torch.cat([torch.linspace(-14, 14, 8 * 200), torch.linspace(-0.01, 0.01, 8 * 8)])
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None]
    x = gate.double()
    exact = x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    torch.testing.assert_close(exact, F.gelu(x, approximate="tanh"), rtol=1e-12, atol=1e-14)  # which cancels
    # The exponent of e^-2u is up to 88, after which it is clamped, and rounded at four places.
    assert ((ops.gelu_mul(gate_up)[0] - exact).abs() <= 700 * EPS * exact.abs() + 1e-36).all()
    assert torch.equal(ops.gelu(gate[None]), ops.gelu_mul(gate_up))


@pytest.mark.parametrize("width", [8, 64, 768])
def test_layer_norm(ops: Ops, width: int) -> None:
    """Also of a row whose mean is far above its deviation, where a difference of squares would cancel."""
    random = torch.Generator().manual_seed(width)
    x, weight, bias = (torch.randn(rows, width, generator=random) for rows in (33, 1, 1))
    x[5] += 1000
    got = ops.layer_norm(x, weight[0], bias[0], 1e-5)
    exact = F.layer_norm(x.double(), (width,), weight[0].double(), bias[0].double(), 1e-5)
    error = (got - exact).abs()
    assert (error[:5] <= 2e-6 * (1 + exact[:5].abs())).all()
    # The mean of row 5 is rounded to 2^-15 of a deviation of 1.
    assert (error[5] <= 2e-4 * (1 + weight[0].abs())).all()
    assert torch.equal(ops.layer_norm(x[7:8], weight[0], bias[0], 1e-5), got[7:8])


@pytest.mark.parametrize("width", [8, 16, 24, 320, 1001, 7, 1])
@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_softcap_at_every_width(ops: Ops, width: int, cap: float) -> None:
    """Tails of rows that are no whole vectors, values that the cap hardly changes, and some far above it."""
    random = torch.Generator().manual_seed(width)
    scales = 10.0 ** torch.randint(-4, 4, (5, width), generator=random)
    whole = torch.full((5, width + 3), 7.0)
    x = whole[:, :width]
    x.copy_(torch.randn(5, width, generator=random) * scales)
    exact = cap * torch.tanh(x.double() / cap)
    assert ops.softcap_(x, cap) is x
    assert ((x - exact).abs() <= 8 * EPS * exact.abs()).all()
    assert (whole[:, width:] == 7.0).all()  # nothing behind a row is touched


def test_softcap_keeps_what_is_not_finite_apart(ops: Ops) -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, 1e30, -1e30, -0.0, 1e-30]])
    assert ops.softcap_(x, 5.0)[0].tolist()[1:] == pytest.approx([5.0, -5.0, 0.0, 5.0, -5.0, 0.0, 1e-30], rel=1e-6)
    assert torch.isnan(x[0, 0])


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_others(ops: Ops, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = 9 * torch.randn(64, 1003, generator=torch.Generator().manual_seed(2))
        gate_up = x[:, :992]
        whole, capped = ops.gelu_mul(gate_up), ops.softcap_(x.clone(), 4.0)
        for rows in (1, 3, 17):
            assert torch.equal(ops.gelu_mul(gate_up[:rows]), whole[:rows])
            assert torch.equal(ops.softcap_(x[:rows].clone(), 4.0), capped[:rows])
        assert torch.equal(ops.add_(x.clone(), capped), x + capped)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(4, 2, 32, scale=0.3),
        AttentionShape(4, 2, 32, softcap=2.0),
        AttentionShape(4, 2, 32, window=9, scale=0.3, softcap=2.0),
        AttentionShape(2, 2, 256, window=4, scale=0.05, softcap=50.0),
    ],
    ids=str,
)
def test_scaled_and_capped_attention(ops: Ops, shape: AttentionShape) -> None:
    """Against the formula in fp64, over pages whose unused places hold NaN; of integers against what those hold."""
    from manylora.kernels.cpu.kv_levels import rounded
    from manylora.kernels.cpu.ops import NumbaOps

    tokens, width = 37, (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
    qkv = torch.randn(tokens, width, generator=torch.Generator().manual_seed(3))
    still = torch.ones(64, shape.head_dim // 2), torch.zeros(64, shape.head_dim // 2)  # no rotation
    q, k, v = torch.split(qkv.double(), [shape.q_size, shape.kv_size, shape.kv_size], dim=1)
    group = shape.n_heads // shape.n_kv_heads
    q, k, v = (
        part.view(tokens, -1, shape.head_dim).transpose(0, 1).repeat_interleave(times, 0)
        for part, times in ((q, 1), (k, group), (v, group))
    )
    at = torch.arange(tokens)
    seen = at[None] <= at[:, None]
    if shape.window:
        seen &= at[None] > at[:, None] - shape.window

    def attended(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT * shape.score_scale
        if shape.softcap:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1).reshape(tokens, -1)

    sequences = PagedSequences(
        starts=torch.tensor([0, tokens], dtype=torch.int32),
        contexts=torch.tensor([tokens], dtype=torch.int32),
        tables=torch.tensor([[2, 0, 1]], dtype=torch.int32),
        positions=at.int(),
    )
    cases: tuple[tuple[Ops, torch.Tensor], ...] = (
        (ops, attended(rounded(k.float()), rounded(v.float()))),
        (NumbaOps("fp32"), attended(k, v)),
        (TorchOps("cpu", torch.float32, resident=True), attended(k, v)),
    )
    for one, exact in cases:
        cache = one.new_kv_cache(1, 3, shape)[0]
        for pages in cache:
            if one.name == "numba":
                pages.view(torch.uint8).fill_(255)
        got = one.attention(qkv.clone(), still, cache, sequences, shape)
        assert ((got - exact).abs() <= 2e-6 * shape.head_dim**0.5).all(), one.name


def test_a_usual_scale_has_the_bits_of_none(ops: Ops) -> None:
    """A family that spells out ``head_dim ** -0.5`` computes what one that does not say computes."""
    qkv = torch.randn(20, 8 * 32, generator=torch.Generator().manual_seed(4))
    still = torch.ones(32, 16), torch.zeros(32, 16)
    sequences = PagedSequences(
        starts=torch.tensor([0, 20], dtype=torch.int32),
        contexts=torch.tensor([20], dtype=torch.int32),
        tables=torch.tensor([[0, 1]], dtype=torch.int32),
        positions=torch.arange(20).int(),
    )
    results = []
    for scale in (None, 32**-0.5):
        shape = AttentionShape(4, 2, 32, scale=scale)
        results.append(ops.attention(qkv.clone(), still, ops.new_kv_cache(1, 2, shape)[0], sequences, shape))
    assert torch.equal(*results)
