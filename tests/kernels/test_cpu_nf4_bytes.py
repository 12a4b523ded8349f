"""NF4 products in integers of 8 bits against fp64, and against the product of what W and x are rounded to; rows are
independent, to the bit. ``test_cpu_ops`` has what both sizes of integers share. Tolerances as there: fp32 sums of d
terms round at most d times."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from manylora.kernels.cpu import available
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import Ops
from tests.kernels.test_cpu_ops import EPS, activations, nf4, rounding

if not available():
    pytest.skip("no AVX2 and FMA here", allow_module_level=True)

from manylora.kernels.cpu.bytes_inner import CODE_UNIT, CODE_ZERO, EXACT, LEVELS, MANY_ROWS, MOST_ROWS
from manylora.kernels.cpu.nf4_bytes import exact_table
from manylora.kernels.cpu.nf4_reference import BYTES, rotated
from manylora.kernels.cpu.ops import DenseLinear, NumbaOps, PackedLinear, StackedLinear


@pytest.fixture(scope="module")
def ops() -> Ops:
    return NumbaOps("int8")


@pytest.mark.parametrize(("n", "k", "blocksize"), [(16, 64, 64), (48, 192, 32), (960, 576, 64), (112, 1536, 128)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, MOST_ROWS, MOST_ROWS + 1, MANY_ROWS, 97])
def test_linear_matches_fp64(ops: Ops, n: int, k: int, blocksize: int, rows: int) -> None:
    weight, x = nf4(n, k, blocksize=blocksize), activations(rows, k)
    y = ops.linear(x, ops.prepare_linear([weight], None))
    exact = weight.dequantize().double()
    # A span and a block are a term each; 1.02: the magnitudes are rounded, too.
    sums = 1.02 * (k // 32 + k // blocksize + 4) * EPS * (x.abs().double() @ exact.abs().T)
    assert ((y - x.double() @ exact.T).abs() <= rounding(x, weight, "int8") + sums).all()
    largest = weight.absmax_fp32().reshape(n, -1)
    assert ((y - BYTES.product(x, BYTES.rounded_weight(weight), largest)).abs() <= sums).all()


@pytest.mark.parametrize("outliers", [1, 100])
def test_rounding_is_as_large_as_is_said(ops: Ops, outliers: int) -> None:
    """0.6 % of the product were seen, 2.6 times what bf16 does; with outliers 1.5 %, 7.6 times."""
    weight, x = nf4(960, 576), activations(9, 576)
    x[:, ::100] *= outliers
    exact = x.double() @ weight.dequantize().double().T
    ours = (ops.linear(x, ops.prepare_linear([weight], None)) - exact).norm()
    bf16 = (x.bfloat16().double() @ weight.dequantize().bfloat16().double().T - exact).norm()
    assert ours < (4 if outliers == 1 else 10) * bf16
    assert ours < (0.01 if outliers == 1 else 0.025) * exact.norm()


def test_one_hot_inputs_give_the_integer_codes(ops: Ops) -> None:
    """To within the bias, that is rounded to a whole number: half a product of 1 and 1."""
    weight = nf4(64, 128, seed=3)
    y = ops.linear(torch.eye(128), ops.prepare_linear([weight], None)).T.double()
    largest = weight.absmax_fp32().double().reshape(64, 2).repeat_interleave(64, 1)
    assert ((y - BYTES.rounded_weight(weight)).abs() <= 0.51 / LEVELS / CODE_UNIT * largest).all()


def test_the_weights_come_back_as_they_were(ops: Ops) -> None:
    """Merging reads them."""
    for n, k, blocksize in ((48, 192, 64), (16, 256, 128)):
        weight = nf4(n, k, seed=n, blocksize=blocksize)
        assert torch.equal(ops.dense(ops.prepare_linear([weight], None)), weight.dequantize())


def test_the_integer_code_is_the_best_there_is_room_for() -> None:
    """Of what blocks of 64 normal values are quantised to, the rms of what codes are off by is the least that any unit
    and any zero in 32nds gives; what ``nf4_inner`` does, with the zero a code, would be 1.4 times as far off."""
    values, code = normal_blocks(4000, 64), torch.tensor(NF4_CODE).double()
    often = torch.bincount((values[:, None] - code).abs().argmin(1), minlength=16).double()

    def error(unit: float, zero: float) -> float:
        off = (torch.round(unit * code + zero) - zero) / unit - code
        return float((often @ off.square() / often.sum()).sqrt())

    best = min(error(unit / 50, zero / 32) for unit in range(5000, 6351) for zero in range(128 * 32, 129 * 32))
    assert error(CODE_UNIT, CODE_ZERO) <= 1.01 * best
    assert error(CODE_UNIT, CODE_ZERO) < 0.72 * min(error(unit, 128.0) for unit in range(64, 128))
    mean = float(often @ ((torch.round(CODE_UNIT * code + CODE_ZERO) - CODE_ZERO) / CODE_UNIT - code) / often.sum())
    assert abs(mean) < 5e-5, "or x of one sign would add it up"
    assert LEVELS == 2**7 - 1, "as large as a signed byte"
    assert CODE_ZERO - CODE_UNIT >= 0
    assert CODE_ZERO + CODE_UNIT < 255.5, "codes are unsigned bytes"


def normal_blocks(count: int, size: int) -> torch.Tensor:
    """Values of a block relative to its largest."""
    blocks = torch.randn(count, size, generator=torch.Generator().manual_seed(0)).double()
    return (blocks / blocks.abs().amax(1, keepdim=True)).reshape(-1)


@pytest.mark.parametrize("code", [0, 15])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_largest_products_there_are(ops: Ops, code: int, sign: float) -> None:
    """All codes 1 (15) or -1 (0), all x of the same magnitude: four products of one sign in each lane, which 16 bits
    would not hold."""
    packed = torch.full((16 * 64 // 2,), 17 * code, dtype=torch.uint8)
    weight = Nf4Tensor(packed, torch.ones(16), torch.tensor(NF4_CODE), shape=(16, 64), blocksize=64)
    for rows in (1, MOST_ROWS, MANY_ROWS):
        x = torch.full((rows, 64), sign * 3.0)
        y = ops.linear(x, ops.prepare_linear([weight], None)).double()
        expected = BYTES.product(x, BYTES.rounded_weight(weight), torch.ones(16, 1))
        torch.testing.assert_close(y, expected, rtol=4 * EPS, atol=0)
        torch.testing.assert_close(y, torch.full_like(y, sign * 3.0 * 64 * NF4_CODE[code]), rtol=2.5e-3, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_others(ops: Ops, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight, x = ops.prepare_linear([nf4(976, 576)], None), activations(200, 576)
        table = ops.prepare_embedding(activations(1000, 576, seed=2).bfloat16(), head=True)
        together, logits = ops.linear(x, weight), ops.logits(x, table)
        for rows in (*range(1, 2 * MANY_ROWS), 97):
            assert torch.equal(ops.linear(x[:rows], weight), together[:rows])
            assert torch.equal(ops.logits(x[:rows], table), logits[:rows])
    finally:
        torch.set_num_threads(before)


# --- positions that are multiplied as they are ------------------------------------------------------------------------


def some_positions(k: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(k, generator=torch.Generator().manual_seed(seed))[:EXACT]


@pytest.mark.parametrize(("n", "k", "blocksize"), [(16, 64, 64), (48, 192, 32), (960, 576, 64), (112, 1536, 128)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, MOST_ROWS, MOST_ROWS + 1, MANY_ROWS, 97])
def test_some_positions_are_exact(ops: Ops, n: int, k: int, blocksize: int, rows: int) -> None:
    """Against what the rest is rounded to, and onto a residual. They are 100 times as large as the rest."""
    weight, positions = nf4(n, k, blocksize=blocksize), some_positions(k, seed=rows)
    x, stream = activations(rows, k), activations(rows, n, seed=2)
    x[:, positions] *= 100
    ours = ops.exactly(ops.prepare_linear([weight], None), positions)
    exact, largest = weight.dequantize(), weight.absmax_fp32().reshape(n, -1)
    expected = BYTES.product_but(x, BYTES.rounded_weight(weight), largest, positions, exact)
    size = x.abs().double() @ exact.abs().double().T
    terms = 1.02 * (k // 32 + k // blocksize + 2 * EXACT + 4) * EPS
    assert ((ops.linear(x, ours) - expected).abs() <= terms * size).all()
    onto = ops.linear(x, ours, add_to=stream.clone())
    assert ((onto - stream - expected).abs() <= terms * (size + stream.abs())).all()


@pytest.mark.parametrize("position", range(0, 64, 7))
def test_an_exact_position_alone_is_the_weight_itself(ops: Ops, position: int) -> None:
    """In any place of a span and of a group of codes; the others of the eight are 0 here."""
    weight = nf4(32, 128, seed=4)
    ours = ops.exactly(ops.prepare_linear([weight], None), (position + torch.arange(0, 8 * 9, 9)) % 128)
    x = torch.eye(128)[position : position + 1]
    assert torch.equal(ops.linear(x, ours), weight.dequantize()[:, position][None])


def test_all_of_them_may_be_in_one_span(ops: Ops) -> None:
    weight, x = nf4(48, 192), activations(3, 192)
    x[:, 64:72] *= 1000
    ours = ops.exactly(ops.prepare_linear([weight], None), torch.arange(64, 72))
    exact = x.double() @ weight.dequantize().double().T
    assert (ops.linear(x, ours) - exact).norm() < 1e-4 * exact.norm()
    assert (ops.linear(x, ops.prepare_linear([weight], None)) - exact).norm() > 1e-3 * exact.norm()


def test_outliers_that_are_exact_cost_their_neighbours_nothing(ops: Ops) -> None:
    """What x's other positions are off by is what it would be if the outliers were 0."""
    weight, x, positions = nf4(960, 576), activations(9, 576), torch.arange(0, 576, 72)
    ours = ops.exactly(ops.prepare_linear([weight], None), positions)
    plain = x.index_fill(1, positions, 0)
    x[:, positions] *= 1000
    rest = (ops.linear(plain, ours).double() - plain.double() @ weight.dequantize().double().T).norm()
    off = (ops.linear(x, ours).double() - x.double() @ weight.dequantize().double().T).norm()
    assert off < 1.1 * rest


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_shows(ops: Ops, value: float) -> None:
    weight, positions = nf4(48, 192), some_positions(192)
    ours = ops.exactly(ops.prepare_linear([weight], None), positions)
    for place in (int(positions[3]), next(k for k in range(192) if k not in positions)):
        x = activations(3, 192)
        x[1, place] = value
        y = ops.linear(x, ours)
        assert not torch.isfinite(y[1]).any()
        assert torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_with_exact_positions_does_not_depend_on_the_others(ops: Ops, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = ops.exactly(ops.prepare_linear([nf4(976, 576)], None), some_positions(576))
        x = activations(200, 576)
        together = ops.linear(x, weight)
        for rows in (*range(1, 2 * MANY_ROWS), 97):
            assert torch.equal(ops.linear(x[:rows], weight), together[:rows])
    finally:
        torch.set_num_threads(before)


def test_rows_and_stacks_of_a_layer_with_exact_positions(ops: Ops) -> None:
    """A part of it has the same positions, a stack those that it is given; parts in bf16 round nothing anyway."""
    parts, x, positions = [nf4(48, 192, seed=i) for i in range(3)], activations(5, 192), some_positions(192)
    x[:, positions] *= 50
    whole = ops.exactly(ops.prepare_linear(parts, None), positions)
    y = ops.linear(x, whole)
    part = ops.rows(whole, 48, 96)
    assert part.nbytes == 0
    assert torch.equal(ops.linear(x, part), y[:, 48:96])
    assert whole.nbytes == ops.prepare_linear(parts, None).nbytes + whole.exact.nbytes
    assert torch.equal(ops.dense(whole), torch.cat([one.dequantize() for one in parts]))
    again = ops.stack([ops.rows(whole, 0, 48), ops.rows(whole, 48, 144)], None)
    assert isinstance(again, PackedLinear)
    assert not torch.equal(ops.linear(x, again), y)
    assert torch.equal(ops.linear(x, ops.exactly(again, positions)), y)
    merged = ops.prepare_dense(parts[1].dequantize(), None)
    mixed = ops.stack([ops.rows(again, 0, 48), merged, ops.rows(again, 96, 144)], torch.ones(144))
    mixed = ops.exactly(mixed, positions)
    assert isinstance(mixed, StackedLinear)
    assert [type(one) for one in mixed.parts] == [PackedLinear, DenseLinear, PackedLinear]
    assert mixed.nbytes == merged.nbytes
    expected = torch.cat([y[:, :48], ops.linear(x, merged), y[:, 96:]], dim=1)
    torch.testing.assert_close(ops.linear(x, mixed), expected + 1, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("vocab", "width"), [(1003, 576), (100, 96), (16, 64)])
@pytest.mark.parametrize("rows", [1, 4, MOST_ROWS + 1, MANY_ROWS, 40])
def test_logits_with_exact_positions(ops: Ops, vocab: int, width: int, rows: int) -> None:
    """Against the product of what the rest is rounded to. All that bf16 can hold is multiplied as it is."""
    table, x, positions = activations(vocab, width, seed=4), activations(rows, width), some_positions(width, seed=rows)
    x[:, positions] *= 100
    table[7, positions] = 1e30
    table = table.bfloat16()
    plain = ops.prepare_embedding(table, head=True)
    prepared = ops.exactly(plain, positions)
    y = ops.logits(x, prepared)
    expected = BYTES.logits(x, table, positions.tolist())
    exact = x.double() @ table.double().T
    ordinary = torch.arange(vocab) != 7
    size = x.abs().double() @ table.abs().double().T + 6 * rotated(x.index_fill(1, positions, 0)).norm(dim=1)[:, None]
    assert ((y - expected).abs() <= 1.1 * (width // 32 + EXACT + 10) * EPS * size)[:, ordinary].all()
    assert (y[:, 7] - exact[:, 7]).norm() <= 0.01 * exact[:, 7].norm()
    assert (y - exact)[:, ordinary].norm() < 0.3 * (ops.logits(x, plain) - exact)[:, ordinary].norm()
    assert torch.equal(y[:1], ops.logits(x[:1], prepared))
    assert torch.equal(ops.embed(torch.arange(vocab), prepared), table.float())
    assert torch.equal(ops.logits(x, ops.exactly(prepared, positions)), y), "told once more"
    bad = x.index_put((torch.tensor(0), positions[2]), torch.tensor(torch.nan))
    assert not ops.logits(bad, prepared)[0].isfinite().any()


def test_other_arithmetics_have_no_exact_positions() -> None:
    for arithmetic in ("int16", "fp32"):
        ops = NumbaOps(arithmetic)  # type: ignore[arg-type]
        weight = ops.prepare_linear([nf4(48, 192)], None)
        assert ops.exact_inputs == 0
        assert ops.exactly(weight, some_positions(192)) is weight
        table = ops.prepare_embedding(activations(100, 64).bfloat16(), head=True)
        assert ops.exactly(table, some_positions(64)) is table
    narrow = NumbaOps("int8").prepare_embedding(activations(100, 40).bfloat16(), head=True)
    assert NumbaOps("int8").exactly(narrow, some_positions(40)) is narrow, "no whole spans, and nothing is rounded"


@pytest.mark.parametrize("positions", [range(7), [*range(7), 192], [*range(7), -1], [*range(7), 6]])
def test_wrong_positions_are_refused(positions: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="expected 8 different positions below 192"):
        exact_table(torch.tensor(list(positions)), 192, 64)
