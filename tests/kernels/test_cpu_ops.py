"""The numba operations against fp64 and against the torch operations; their promise that rows are independent, to the
bit. Tolerances: fp32 sums of depth d round at most d times (Higham, section 3.1), relative to the sum of magnitudes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

from manylora.kernels.cpu import Arithmetic, available
from manylora.kernels.nf4_code import NF4_CODE
from manylora.kernels.nf4_tensor import Nf4Tensor
from manylora.kernels.ops import AttentionShape, Ops, PagedSequences
from manylora.kernels.torch_ops import TorchOps
from manylora.kernels.torch_ops import rotate as rotate_fp32

if TYPE_CHECKING:
    from manylora.kernels.cpu.ops import NumbaOps

pytestmark = pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")

EPS = 2.0**-24


@pytest.fixture(scope="module")
def ops() -> Ops:
    from manylora.kernels.cpu.ops import NumbaOps

    return NumbaOps()


def nf4(n: int, k: int, seed: int = 0, blocksize: int = 64) -> Nf4Tensor:
    random = torch.Generator().manual_seed(seed)
    return Nf4Tensor(
        packed=torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=random),
        absmax=torch.rand(n * k // blocksize, generator=random) + 0.1,
        quant_map=torch.tensor(NF4_CODE),
        shape=(n, k),
        blocksize=blocksize,
    )


def activations(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def rounding(x: torch.Tensor, weight: Nf4Tensor, arithmetic: str = "int16") -> torch.Tensor:
    """How far rounding x and W to integers moves the product at most."""
    from manylora.kernels.cpu.nf4_reference import BYTES, WORDS

    integers, blocks = {"int16": WORDS, "int8": BYTES}[arithmetic], weight.absmax_fp32().reshape(weight.shape[0], -1)
    return integers.bound(x, weight.dequantize(), blocks)


@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 192), (960, 576), (112, 1536)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 16, 97])
def test_linear_matches_fp64(ops: Ops, n: int, k: int, rows: int) -> None:
    """Within what rounding to integers and, a span of 32 being one term, fp32 sums may do."""
    from manylora.kernels.cpu.nf4_reference import WORDS

    weight, x = nf4(n, k), activations(rows, k)
    y = ops.linear(x, ops.prepare_linear([weight], None))
    exact = weight.dequantize().double()
    sums = (k // 32 + 3) * EPS * (x.abs().double() @ exact.abs().T)
    assert ((y - x.double() @ exact.T).abs() <= rounding(x, weight) + sums).all()
    # And the product of what they are rounded to, to within the sums alone (1.01: the magnitudes are rounded, too).
    assert ((y - WORDS.rounded_x(x) @ WORDS.rounded_weight(weight).T).abs() <= 1.01 * sums).all()


@pytest.mark.parametrize("outliers", [1, 100, 1000])
@pytest.mark.parametrize("rows", [1, 9])
def test_rounding_is_far_below_that_of_bf16(ops: Ops, rows: int, outliers: int) -> None:
    """The usual arithmetic of a QLoRA base: W and x in bf16, sums in fp32. With outliers in x, as models have them:
    1.0e-4 and 2.0e-4 of the product were seen, 1/26 and 1/12 of what bf16 does."""
    weight, x = nf4(960, 576), activations(rows, 576)
    x[:, ::100] *= outliers
    exact = x.double() @ weight.dequantize().double().T
    ours = (ops.linear(x, ops.prepare_linear([weight], None)) - exact).norm()
    bf16 = (x.bfloat16().double() @ weight.dequantize().bfloat16().double().T - exact).norm()
    assert ours < bf16 / 10
    assert ours < 3e-4 * exact.norm()


def test_one_hot_inputs_give_the_integer_codes(ops: Ops) -> None:
    """Every code in every place: 1 is the largest level, so out comes the code as it was rounded."""
    from manylora.kernels.cpu.nf4_reference import WORDS

    weight = nf4(64, 128, seed=3)
    y = ops.linear(torch.eye(128), ops.prepare_linear([weight], None)).T.double()
    torch.testing.assert_close(y, WORDS.rounded_weight(weight), rtol=4 * EPS, atol=0)
    blocks = weight.absmax_fp32().double().reshape(64, -1).repeat_interleave(64, 1)
    assert ((y - weight.dequantize().double()).abs() <= (WORDS.code_error + 4 * EPS) * blocks).all()


@pytest.fixture(scope="module")
def exact() -> Ops:
    from manylora.kernels.cpu.ops import NumbaOps

    return NumbaOps("fp32")


class TestExact:
    """``fp32``: nothing is rounded but sums."""

    @pytest.mark.parametrize(("n", "k", "blocksize"), [(16, 64, 64), (48, 192, 32), (112, 1536, 128)])
    @pytest.mark.parametrize("rows", [1, 3, 7, 97])
    def test_it_matches_fp64(self, exact: Ops, n: int, k: int, blocksize: int, rows: int) -> None:
        weight, x = nf4(n, k, blocksize=blocksize), activations(rows, k)
        y = exact.linear(x, exact.prepare_linear([weight], None))
        matrix = weight.dequantize().double()
        bound = (k + 1) * EPS * (x.abs().double() @ matrix.abs().T)
        assert ((y - x.double() @ matrix.T).abs() <= bound).all()

    def test_one_hot_inputs_give_the_weights_themselves(self, exact: Ops) -> None:
        """Every code in every place: the product with 1 is exact, so out comes the dequantised weight, to the bit."""
        weight = nf4(64, 128, seed=3)
        y = exact.linear(torch.eye(128), exact.prepare_linear([weight], None))
        assert torch.equal(y, weight.dequantize().T)

    def test_a_row_does_not_depend_on_the_others(self, exact: Ops) -> None:
        weight, x = exact.prepare_linear([nf4(176, 576)], None), activations(100, 576)
        together = exact.linear(x, weight)
        for rows in (1, 2, 5, 8, 97):
            assert torch.equal(exact.linear(x[:rows], weight), together[:rows])

    def test_the_self_test_knows_which_it_tests(self, exact: Ops, ops: Ops) -> None:
        from manylora.kernels.cpu.self_test import self_test
        from tests.kernels.test_cpu_self_test import shapes

        assert self_test(exact, shapes(), "fp32") == []
        for wrong, arithmetic in ((exact, "int16"), (ops, "fp32")):
            named = {one.kernel.split(" of ")[0] for one in self_test(wrong, shapes(), arithmetic)}
            assert named == {"NF4 linear", "embedding and logits"}


def test_the_integer_code_is_the_best_there_is_room_for() -> None:
    from manylora.kernels.cpu.nf4_inner import CODE_UNIT, LEVELS, SPAN

    def error(unit: int) -> float:
        return max(abs(value - round(value * unit) / unit) for value in NF4_CODE)

    assert min(range(7000, 8192), key=error) == CODE_UNIT
    assert SPAN * CODE_UNIT * LEVELS <= 2**31 - 1 < SPAN * CODE_UNIT * (LEVELS + 1), "sums fill an int32"


def test_the_largest_sums_there_are_do_not_overflow(ops: Ops) -> None:
    """All codes 1 (15) or -1 (0), all x of the same magnitude: every product is the largest."""
    for code in (0, 15):
        packed = torch.full((16 * 64 // 2,), 17 * code, dtype=torch.uint8)
        weight = Nf4Tensor(packed, torch.ones(16), torch.tensor(NF4_CODE), shape=(16, 64), blocksize=64)
        for rows in (1, 6):
            y = ops.linear(torch.full((rows, 64), 3.0), ops.prepare_linear([weight], None))
            torch.testing.assert_close(y, torch.full((rows, 16), 3.0 * 64 * NF4_CODE[code]), rtol=4 * EPS, atol=0)


@pytest.fixture(scope="module", params=["int16", "int8"])
def rounding_ops(request: pytest.FixtureRequest) -> NumbaOps:
    """Those of each size of integers."""
    from manylora.kernels.cpu.ops import NumbaOps

    return NumbaOps(request.param)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [3, 9])
def test_what_is_not_finite_stays_so_in_its_row(rounding_ops: NumbaOps, bad: float, rows: int) -> None:
    ops = rounding_ops
    weight, x = ops.prepare_linear([nf4(48, 128)], None), activations(rows, 128)
    clean = ops.linear(x, weight)
    for place in (0, 37, 127):
        spoilt = x.clone()
        spoilt[1, place] = bad
        y = ops.linear(spoilt, weight)
        assert not y[1].isfinite().any()
        assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-31, 1e-29, 1e30])
def test_inputs_of_any_magnitude(rounding_ops: NumbaOps, magnitude: float) -> None:
    ops = rounding_ops
    weight, x = nf4(48, 128), magnitude * activations(5, 128)
    y = ops.linear(x, ops.prepare_linear([weight], None))
    exact = x.double() @ weight.dequantize().double().T
    # Below 2^-100 = 8e-31 they count as zeros.
    bound = rounding(x, weight, ops.arithmetic) * 1.01
    assert ((y - exact).abs() <= bound + 128 * 2.0**-100 * 1.2 * (magnitude < 1e-30)).all()


@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_linear_fuses_weights_bias_and_residual(rounding_ops: NumbaOps, blocksize: int) -> None:
    ops = rounding_ops
    weights = [nf4(n, 256, seed=n, blocksize=blocksize) for n in (32, 16, 64)]
    bias, x, residual = activations(1, 112)[0], activations(9, 256), activations(9, 112, seed=5)
    expected = x @ torch.cat([w.dequantize() for w in weights]).T + bias
    prepared = ops.prepare_linear(weights, bias)
    bound = torch.cat([rounding(x, weight, ops.arithmetic) for weight in weights], 1) + 1e-5
    assert ((ops.linear(x, prepared) - expected).abs() <= bound).all()
    stream = residual.clone()
    assert ops.linear(x, prepared, add_to=stream) is stream
    assert ((stream - residual - expected).abs() <= bound).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_others(ops: Ops, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight, x = ops.prepare_linear([nf4(976, 576)], None), activations(200, 576)
        table = ops.prepare_embedding(activations(1000, 576, seed=2).bfloat16(), head=True)
        linear, logits = ops.linear(x, weight), ops.logits(x, table)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 32, 97):
            assert torch.equal(ops.linear(x[:rows], weight), linear[:rows])
            assert torch.equal(ops.logits(x[:rows], table), logits[:rows])
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_packed_is_refused(ops: Ops) -> None:
    with pytest.raises(ValueError, match="24 outputs are no multiple of 16"):
        ops.prepare_linear([nf4(24, 64)], None)
    with pytest.raises(ValueError, match="block of 16 is no multiple of 32"):
        ops.prepare_linear([nf4(16, 64, blocksize=16)], None)


@pytest.mark.parametrize("vocab", [64, 1000])
def test_embedding_and_logits(ops: Ops, exact: Ops, vocab: int) -> None:
    table = activations(vocab, 96, seed=4).bfloat16()
    x, ids = activations(7, 96), torch.tensor([0, 1, 7, 8, 15, 16, vocab - 1])
    for head in (True, False):
        assert torch.equal(ops.embed(ids, ops.prepare_embedding(table, head=head)), table[ids].float())
    sizes = x.abs().double() @ table.abs().double().T
    y = exact.logits(x, exact.prepare_embedding(table, head=True))
    assert ((y - x.double() @ table.double().T).abs() <= 97 * EPS * sizes).all()


@pytest.mark.parametrize("width", [576, 96])
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 24, 25, 40])
@pytest.mark.parametrize("arithmetic", ["int16", "int8"])
def test_logits_in_integers(arithmetic: Arithmetic, rows: int, width: int) -> None:
    """Against the product of what both sides are rounded to, which is off by no more than is said: with an entry of
    zeros, very small and very large ones, all but nothing (weights that decayed), an outlier in the hidden state."""
    from manylora.kernels.cpu.nf4_reference import BYTES, WORDS, rotated
    from manylora.kernels.cpu.ops import NumbaOps

    ops, integers = NumbaOps(arithmetic), {"int16": WORDS, "int8": BYTES}[arithmetic]
    table, x = activations(1100, width, seed=4), activations(rows, width)
    table[7], table[9], table[11] = 0, 1e-3 * table[9], 1e4 * table[11]
    table[13, :32], table[15] = 1e-37, 1e-37
    table, x[:, 40] = table.bfloat16(), 50.0
    prepared = ops.prepare_embedding(table, head=True)
    y, rounded = ops.logits(x, prepared), integers.logits(x, table)
    left, right = x.double(), table.double()
    if arithmetic == "int8":
        left, right = rotated(left), rotated(right) / 32
    largest = integers.rounded_head(table)[1].double()
    # A span is a term, and a block; 1.03: magnitudes are rounded, too; 5: the sums of a rotation.
    sums = (
        1.03 * (width // 32 + (largest.shape[1] + 5) * (arithmetic == "int8") + 3) * EPS * (left.abs() @ right.abs().T)
    )
    assert ((y - rounded).abs() <= sums + 1e-30).all()
    of_blocks = largest.repeat_interleave(width // largest.shape[1], 1)
    of_x = left.abs().reshape(rows, -1, 32).amax(2).repeat_interleave(32, 1) * integers.level_error
    of_bias = of_x[:, ::32] / integers.code_unit @ of_blocks[:, ::32].T  # half a code times half a level, in each span
    of_codes = (left.abs() + of_x) @ (of_blocks * 0.5 / integers.code_unit).T
    bound = of_x @ right.abs().T + of_codes + (0 if arithmetic == "int16" else of_bias)
    exact = x.double() @ table.double().T
    assert ((rounded - exact).abs() <= 1.001 * bound + 1e-12).all()
    assert (y[:, 7] == 0).all()
    assert torch.equal(ops.embed(torch.arange(1100), prepared), table.float()), "embeddings are looked up exactly"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("arithmetic", ["int16", "int8"])
def test_logits_of_what_is_not_finite_are_not(arithmetic: Arithmetic, bad: float) -> None:
    from manylora.kernels.cpu.ops import NumbaOps

    ops = NumbaOps(arithmetic)
    table, x = activations(100, 64, seed=4).bfloat16(), activations(3, 64)
    clean = ops.logits(x, ops.prepare_embedding(table, head=True)).clone()
    x[1, 5] = bad
    y = ops.logits(x, ops.prepare_embedding(table, head=True)).clone()
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    x, table[33, 7] = activations(3, 64), bad
    y = ops.logits(x, ops.prepare_embedding(table, head=True))
    assert not y[:, 33].isfinite().any()
    assert torch.equal(y[:, :33], clean[:, :33])


@pytest.mark.parametrize("arithmetic", ["int16", "int8"])
def test_a_part_without_tiles_does_nothing(arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in a kernel is only printed."""
    from manylora.kernels.cpu.ops import NumbaOps

    raised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ops, table = NumbaOps(arithmetic), activations(16, 64).bfloat16()
        assert ops.logits(activations(1, 64), ops.prepare_embedding(table, head=True)).isfinite().all()
    finally:
        torch.set_num_threads(before)
    assert not raised


def test_logits_of_a_width_that_is_no_whole_span_are_in_fp32(ops: Ops) -> None:
    table, x = activations(100, 40, seed=4).bfloat16(), activations(3, 40)
    bound = 41 * EPS * (x.abs().double() @ table.abs().double().T)
    y = ops.logits(x, ops.prepare_embedding(table, head=True))
    assert ((y - x.double() @ table.double().T).abs() <= bound).all()


@pytest.mark.parametrize("id", [-1, 112, 1 << 40])
def test_a_token_that_is_not_in_the_table_is_refused(ops: Ops, id: int) -> None:
    table = ops.prepare_embedding(torch.zeros(100, 64, dtype=torch.bfloat16), head=True)
    with pytest.raises(IndexError, match=f"rows .*{id}.* of a table of 112"):
        ops.embed(torch.tensor([3, id]), table)


def test_rms_norm_and_silu(ops: Ops) -> None:
    x, weight = 3 * activations(37, 576), activations(1, 576)[0]
    exact = F.rms_norm(x.double(), (576,), weight.double(), 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5).double(), exact, rtol=1e-6, atol=1e-6)
    gate_up = torch.linspace(-120, 120, 16 * 128).view(16, 128)  # far into both tails of the exponential
    exact = F.silu(gate_up[:, :64].double()) * gate_up[:, 64:]
    # Below e^-87 the exponential is clamped: silu is then smaller than 1e-36 where the true value is smaller still.
    torch.testing.assert_close(ops.silu_mul(gate_up).double(), exact, rtol=1e-6, atol=1e-30)


class Pages:
    """Sequences over scattered pages, computed in whatever pieces a test likes."""

    def __init__(self, ops: Ops, shape: AttentionShape, lengths: list[int], poison: bool = True) -> None:
        random = torch.Generator().manual_seed(11)
        self.ops, self.shape = ops, shape
        width = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
        self.qkv = [torch.randn(n, width, generator=random) for n in lengths]
        order = torch.randperm(64, generator=random).tolist()
        self.tables = torch.zeros(len(lengths), 40, dtype=torch.int32)
        for table, n in zip(self.tables, lengths, strict=True):
            for i in range(-(-n // 16)):
                table[i] = order.pop()
        angles = torch.outer(torch.arange(640.0), torch.rand(shape.head_dim // 2, generator=random))
        self.rope = angles.cos().contiguous(), angles.sin().contiguous()
        self.cache = ops.new_kv_cache(1, 64, shape)[0]
        if poison:
            for tensor in self.cache:
                tensor.view(torch.uint8).fill_(255)  # a page may hold anything of its last owner: NaN, or NaN scales

    def run(self, pieces: list[tuple[int, int, int]]) -> torch.Tensor:
        """Attend to tokens ``first .. last - 1`` of sequence i for each (i, first, last)."""
        qkv = torch.cat([self.qkv[i][first:last] for i, first, last in pieces])
        counts = torch.tensor([0] + [last - first for _, first, last in pieces])
        sequences = PagedSequences(
            starts=counts.cumsum(0).int(),
            contexts=torch.tensor([last for *_, last in pieces]).int(),
            tables=self.tables[[i for i, *_ in pieces]].contiguous(),
            positions=torch.cat([torch.arange(first, last) for _, first, last in pieces]).int(),
        )
        return self.ops.attention(qkv, self.rope, self.cache, sequences, self.shape)

    def exact(self, i: int) -> torch.Tensor:
        """All outputs of sequence i in fp64, from the definition; over pages of integers, from what those hold."""
        s, n, d = self.shape, self.qkv[i].shape[0], self.shape.head_dim
        q, k, v = (t.view(n, -1, d) for t in self.qkv[i].double().split([s.q_size, s.kv_size, s.kv_size], dim=1))
        cos, sin = (table[:n, None].double() for table in self.rope)

        def rotate(x: torch.Tensor) -> torch.Tensor:
            left, right = x.chunk(2, dim=-1)
            return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)

        q, k = rotate(q), rotate(k)
        if self.ops.kv_dtype == torch.int16:
            from manylora.kernels.cpu.kv_levels import rounded

            given = self.qkv[i][:, s.q_size :].view(n, -1, d)[:, : s.n_kv_heads]
            k, v = rounded(rotate_fp32(given, self.rope, torch.arange(n))), rounded(v.float())
        group = s.n_heads // s.n_kv_heads
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) / d**0.5
        at = torch.arange(n)
        seen = at[None] <= at[:, None]
        if s.window:
            seen &= at[None] > at[:, None] - s.window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)).reshape(n, -1)


ATTENTION = [
    AttentionShape(9, 3, 64),
    AttentionShape(4, 4, 128, window=20),
    AttentionShape(8, 1, 32),
    AttentionShape(6, 2, 16, window=5),
]


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.parametrize("which", ["int16", "fp32", "torch"])
def test_attention_of_prompts_chunks_and_single_tokens(ops: Ops, exact: Ops, shape: AttentionShape, which: str) -> None:
    chosen = {"int16": ops, "fp32": exact, "torch": TorchOps("cpu", torch.float32, resident=True)}[which]
    lengths = [1, 17, 100, 33, 300]
    pages = Pages(chosen, shape, lengths, poison=which != "torch")
    pages.run([(2, 0, 99), (4, 0, 171), (1, 0, 16)])
    out = pages.run([(0, 0, 1), (1, 16, 17), (2, 99, 100), (3, 0, 33), (4, 171, 300)])
    expected = torch.cat([pages.exact(i)[first:] for i, first in enumerate([0, 16, 99, 0, 171])])
    # Scores of magnitude ~10 rounded at 2^-24 move a softmax weight by about 1e-6 of itself; values are of order one.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_does_not_depend_on_chunks_or_neighbours(ops: Ops, shape: AttentionShape) -> None:
    whole = Pages(ops, shape, [300, 50])
    expected = whole.run([(0, 0, 300)])
    pieces = Pages(ops, shape, [300, 50])
    got = [pieces.run([(0, 0, 130)])]
    got.append(pieces.run([(1, 0, 50), (0, 130, 131)])[50:])
    got.append(pieces.run([(0, 131, 300)]))
    assert torch.equal(torch.cat(got), expected)
