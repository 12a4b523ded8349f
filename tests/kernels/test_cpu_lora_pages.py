"""Pages of integers, filled in one pass: the levels and scales of ``as_integers``, to the bit."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels import lora_page
from manylora.kernels.cpu import available
from manylora.kernels.lora_page import INTEGERS, as_integers, relative_error, rows_of_b
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_weights import LoraPair, LoraWeights
from manylora.kernels.sites import RANK_PAGE
from tests.kernels.shapes import SHAPES

if not available():
    pytest.skip("no AVX2 and FMA here", allow_module_level=True)

from manylora.kernels.cpu.lora_pages import fill_integer_page

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pair_of(rank: int, dtype: torch.dtype, kind: str, held: torch.dtype = torch.int16) -> LoraPair:
    random = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, 96, generator=random), torch.randn(64, rank, generator=random) * 1e-3
    if dtype == torch.float16 and kind in ("halves", "extremes"):
        return LoraPair(a.to(dtype), b.to(dtype), 2.0)  # it has no such values
    if kind == "zeros":
        a[rank // 2], b[:, 0] = 0, 0
    elif kind == "halves":  # a rank's largest is a multiple of the largest level: values fall half-way between levels
        most = INTEGERS[held]
        a, b = (torch.randint(-2 * most, 2 * most + 1, part.shape, generator=random) / 2 for part in (a, b))
        a[:, 0], b[0] = most, -most
        a, b = a * torch.arange(1, rank + 1)[:, None], b * torch.arange(1, rank + 1)
    elif kind == "extremes":
        a, b = (a, b) if dtype == torch.float16 else (a * 1e-41, b * 1e38)
    return LoraPair(a.to(dtype), b.to(dtype).contiguous(), 2.0)


def page_of(pair: LoraPair, first: int, held: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A page as the formula says."""
    a, b = torch.zeros(96, RANK_PAGE, dtype=held), torch.zeros(RANK_PAGE, 64, dtype=held)
    scales = torch.zeros(RANK_PAGE)
    width = max(0, min(RANK_PAGE, pair.rank - first))
    (of_a, scale_a), (of_b, scale_b) = (
        as_integers(of, INTEGERS[held]) for of in (pair.a[first : first + width], pair.b.T[first:][:width])
    )
    a[:, :width], b[:width], scales[:width] = of_a.to(held).T, of_b.to(held), scale_a * scale_b
    return a, b, scales


@pytest.mark.parametrize("kind", ["normal", "zeros", "halves", "extremes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("held", INTEGERS, ids=str)
def test_the_formula_to_the_bit(kind: str, dtype: torch.dtype, held: torch.dtype) -> None:
    for rank in (1, 8, 16, 24, 33):
        pair = pair_of(rank, dtype, kind, held)
        weights = LoraWeights({("q", 1): pair})
        pool = LoraPool(SHAPES, max_slots=2, max_pages=4, max_rank=48, page_dtype=held)
        for values in (pool.a["q"], pool.b["q"], pool.page_scales["q"]):
            values.fill_(77)  # what another adapter left there
        pool.write(0, weights)
        for i, page in enumerate(pool.pages_of(0)["q"]):
            b = rows_of_b(pool.b["q"][page : page + 1, 1], 64)
            found = pool.a["q"][page, 1], b, pool.page_scales["q"][page, 1]
            for mine, expected in zip(found, page_of(pair, i * RANK_PAGE, held), strict=True):
                assert torch.equal(mine, expected), (rank, i)
            assert not pool.a["q"][page, 0].any(), "a layer without a pair"


@pytest.mark.parametrize("largest", INTEGERS.values())
def test_what_is_lost_is_the_formula_s(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair_of(rank, dtype, kind) for rank in (3, 33) for dtype in DTYPES for kind in ("normal", "zeros")]
    pairs.append(LoraPair(pairs[0].a.float(), pairs[0].b.bfloat16(), 1.0))
    pairs.append(LoraPair(pairs[0].a.float(), pairs[0].b.float().T.contiguous().T, 1.0))
    found = [relative_error(pair, largest) for pair in pairs]
    monkeypatch.setattr(lora_page, "cpu_kernels_available", lambda: False)
    assert found == pytest.approx([relative_error(pair, largest) for pair in pairs], rel=1e-6)
    assert relative_error(LoraPair(torch.zeros(2, 8), torch.ones(8, 2), 1.0), largest) == 0
    for pair, mine in zip(pairs, found, strict=True):  # of each rank's own delta, of which it is a bound
        ((a, scale_a), (b, scale_b)), off, total = (as_integers(of, largest) for of in (pair.a, pair.b.T)), 0.0, 0.0
        for r in range(pair.rank):
            exact = torch.outer(pair.b[:, r].double(), pair.a[r].double())
            off += float((torch.outer(b[r] * scale_b[r], a[r] * scale_a[r]) - exact).abs().sum())
            total += float(exact.abs().sum())
        assert 0.6 * mine < off / total <= mine * (1 + 1 / largest)


def test_what_is_read() -> None:
    a, b = torch.zeros(96, RANK_PAGE, dtype=torch.int16), torch.zeros(4, RANK_PAGE, RANK_PAGE, dtype=torch.int16)
    for dtype in DTYPES:
        pair = pair_of(8, dtype, "normal")
        read = fill_integer_page(pair, 0, 32767, a, b, torch.zeros(16))
        assert read == (dtype in (torch.float32, torch.bfloat16))
    fp32 = pair_of(8, torch.float32, "normal")
    mixed = LoraPair(fp32.a, fp32.b.bfloat16(), 1.0)
    strided = LoraPair(fp32.a, fp32.b.T.contiguous().T, 1.0)
    assert not any(fill_integer_page(pair, 0, 32767, a, b, torch.zeros(16)) for pair in (mixed, strided))
    assert not fill_integer_page(fp32, 0, 32767, a, b.view(RANK_PAGE, 64), torch.zeros(16)), "a page that is no tiles"
