"""Keys and values in pages of 16-bit integers: what a page holds, and attention over it.

Two bounds. Against the rounded keys and values, attention is as exact as over fp32. Against those that were given,
a value of a vector is off by half a level of it (``kv_levels``), from which follows how far an output can be.
"""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.cpu import available
from manylora.kernels.ops import PAGE_SIZE, AttentionShape, Ops, PagedSequences, page_bytes
from manylora.kernels.torch_ops import rotate

if not available():
    pytest.skip("no AVX2 and FMA here", allow_module_level=True)

from manylora.kernels.cpu.kv_levels import page_width, rounded
from manylora.kernels.cpu.ops import NumbaOps

EPS = 2.0**-24
SHAPES = [
    AttentionShape(9, 3, 64),
    AttentionShape(3, 3, 16),
    AttentionShape(8, 1, 32),
    AttentionShape(10, 2, 48),
    AttentionShape(4, 4, 128, window=20),
    AttentionShape(6, 2, 16, window=5),
    AttentionShape(4, 2, 256, window=33, scale=0.05, softcap=3.0),
    AttentionShape(14, 2, 64, softcap=20.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def ops() -> Ops:
    return NumbaOps()


class Prompt:
    """One sequence, computed in whatever chunks a test likes, over pages that held NaN."""

    def __init__(self, ops: Ops, shape: AttentionShape, tokens: int, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.ops, self.shape = ops, shape
        heads = shape.n_heads + 2 * shape.n_kv_heads
        self.qkv = torch.randn(tokens, heads * shape.head_dim, generator=random)
        pages = -(-tokens // PAGE_SIZE)
        self.table = torch.randperm(pages + 3, generator=random)[None, :pages].int()
        angles = torch.outer(torch.arange(float(tokens)), torch.rand(shape.head_dim // 2, generator=random))
        self.rope = angles.cos().contiguous(), angles.sin().contiguous()
        self.cache = ops.new_kv_cache(1, pages + 3, shape)[0]
        for tensor in self.cache:
            tensor.view(torch.uint8).fill_(255)

    def vectors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values ``[T, heads, head_dim]`` as they were given; a view of ``qkv``."""
        parts = torch.split(self.qkv, [self.shape.q_size, self.shape.kv_size, self.shape.kv_size], dim=1)
        q, k, v = (part.view(len(self.qkv), -1, self.shape.head_dim) for part in parts)
        return q, k, v

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.vectors()
        positions = torch.arange(len(self.qkv))
        return rotate(q, self.rope, positions), rotate(k, self.rope, positions), v

    def run(self, *ends: int) -> torch.Tensor:
        """Outputs ``[T, heads, head_dim]`` of the prompt in chunks that end at these tokens."""
        outputs = []
        for first, last in zip((0, *ends), (*ends, len(self.qkv)), strict=False):
            sequences = PagedSequences(
                starts=torch.tensor([0, last - first]).int(),
                contexts=torch.tensor([last]).int(),
                tables=self.table,
                positions=torch.arange(first, last).int(),
            )
            chunk = self.qkv[first:last].clone()
            outputs.append(self.ops.attention(chunk, self.rope, self.cache, sequences, self.shape))
        return torch.cat(outputs).view(len(self.qkv), -1, self.shape.head_dim)

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[T, kv_heads, head_dim]``, fp64, read out of the pages."""
        d, found = self.shape.head_dim, []
        for pages, transposed in zip(self.cache, (True, False), strict=True):
            own = pages[self.table[0].long()]  # [pages, heads, width]
            levels = own[..., : PAGE_SIZE * d].double()
            scales = own[..., PAGE_SIZE * d :].contiguous().view(torch.float32).double()
            shape = (d, PAGE_SIZE) if transposed else (PAGE_SIZE, d)
            levels = levels.unflatten(-1, shape)
            levels = levels.mT if transposed else levels
            vectors = (levels * scales[..., None]).permute(0, 2, 1, 3).flatten(0, 1)
            found.append(vectors[: len(self.qkv)])
        return found[0], found[1]


def attention(
    shape: AttentionShape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By the definition, in fp64: outputs ``[T, heads, head_dim]``, weights ``[heads, T, T]`` and what is seen."""
    group = shape.n_heads // shape.n_kv_heads
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * shape.score_scale
    if shape.softcap:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    at = torch.arange(len(q))
    seen = at[None] <= at[:, None]
    if shape.window:
        seen = seen & (at[None] > at[:, None] - shape.window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v), weights, seen


def half_levels(vectors: torch.Tensor) -> torch.Tensor:
    """How far a value of each vector is off at most, ``[..., 1]``: half a level, and what fp32 does to a product of
    up to 32767 before it is rounded, to the factor and to the scale."""
    return vectors.double().abs().amax(-1, keepdim=True) * (0.5 / 32767 + 3 * EPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_page_holds_levels_and_a_scale_for_each_vector(ops: Ops, shape: AttentionShape) -> None:
    prompt = Prompt(ops, shape, 37)
    _, keys, values = prompt.vectors()
    keys[3, 0, 5] = 1000.0  # an outlier takes its own vector's levels, and nobody else's
    values[4, -1, 0] = -3e4
    keys[5], values[6] = 0.0, 0.0
    keys[7] *= 1e-36  # below 1e-34 there is nothing
    values[8] *= 1e-33
    values[9] *= 1e30
    prompt.run(20)
    _, k, v = prompt.rotated()
    for got, given in zip(prompt.held(), (k, v), strict=True):
        assert torch.allclose(got, rounded(given), rtol=3 * EPS, atol=0), "to the level"
        assert ((got - given).abs() <= half_levels(given) + 1e-34).all()
    assert not prompt.held()[0][5].any()
    assert not prompt.held()[1][6].any()
    assert not prompt.held()[0][7].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outlier", [1.0, 100.0])
def test_attention_is_that_over_the_rounded_vectors(ops: Ops, shape: AttentionShape, outlier: float) -> None:
    """As near as over fp32 (``test_cpu_ops``), and as near to the attention that was asked for as half levels allow."""
    prompt = Prompt(ops, shape, 150)
    _, keys, values = prompt.vectors()
    keys[::9, :, 3] *= outlier
    values[::7, :, 2] *= outlier
    out = prompt.run(16, 17, 90)
    q, k, v = prompt.rotated()
    exact, weights, seen = attention(shape, q, rounded(k), rounded(v))
    # A score of magnitude s rounds at about 2^-24 s, a weight by as much of itself; values are of order one or outlier.
    assert ((out - exact).abs() <= 2e-5 * outlier**2).all(), (out - exact).abs().max()

    asked, weights, _ = attention(shape, q, k, v)
    group = shape.n_heads // shape.n_kv_heads
    # A score is off by at most the query's magnitudes times half a level of the key; the softcap only makes it less.
    of_keys = half_levels(k).repeat_interleave(group, 1)[..., 0].T[:, None, :]  # [heads, 1, T]
    moved = q.double().abs().sum(-1).T[:, :, None] * of_keys * shape.score_scale
    most = moved.masked_fill(~seen, 0.0).amax(-1)  # [heads, T]
    spread = v.double().repeat_interleave(group, 1)
    of_values = half_levels(v).repeat_interleave(group, 1)
    # Weights change by a factor of e^2most at most, each; values by half a level.
    size = torch.einsum("hqk,khd->qhd", weights, spread.abs())
    held = torch.einsum("hqk,khd->qhd", weights, of_values.expand_as(spread))
    factor = torch.exp(2 * most).T[..., None]
    assert ((out - asked).abs() <= (factor - 1) * size + factor * held + 2e-5 * outlier**2).all()


@pytest.mark.parametrize("arithmetic", ["int16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_the_chunks(shape: AttentionShape, arithmetic: str) -> None:
    """A token's keys and values are read as they were stored in its own step, too."""
    ops = NumbaOps(arithmetic)  # type: ignore[arg-type]
    whole = Prompt(ops, shape, 75).run()
    for ends in ((1,), (16,), (7, 31, 32, 33), tuple(range(1, 75))):
        prompt = Prompt(ops, shape, 75)
        assert torch.equal(prompt.run(*ends), whole), ends


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("chunks", [(), (18, 19, 20, 40)], ids=["whole", "chunks"])
def test_what_is_not_finite_shows_in_every_row_that_sees_it(
    ops: Ops, bad: float, which: str, chunks: tuple[int, ...]
) -> None:
    """And in no other: not in earlier ones, in those of other heads, nor in those whose window has passed it."""
    shape, at = AttentionShape(6, 2, 32, window=21), 19
    clean = Prompt(ops, shape, 60).run()
    for place in (0, 15, 31):
        prompt = Prompt(ops, shape, 60)
        prompt.vectors()[1 if which == "key" else 2][at, 1, place] = bad
        out = prompt.run(*chunks)
        assert not out[at : at + 21, 3:].isfinite().any()
        assert torch.equal(out[:, :3], clean[:, :3])
        assert torch.equal(out[:at], clean[:at])
        assert torch.equal(out[at + 21 :], clean[at + 21 :])


@pytest.mark.parametrize("arithmetic", ["int16", "fp32"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 256])
def test_pages_take_what_is_accounted(arithmetic: str, head_dim: int) -> None:
    ops, shape = NumbaOps(arithmetic), AttentionShape(6, 3, head_dim)  # type: ignore[arg-type]
    layers = ops.new_kv_cache(4, 5, shape)
    taken = sum(tensor.untyped_storage().nbytes() for pair in layers for tensor in pair)
    assert taken == 5 * page_bytes(shape, 4, ops.kv_dtype)
    half = 4 * 2 * 5 * PAGE_SIZE * 3 * head_dim * 2
    assert taken == (2 * half if arithmetic == "fp32" else half + 4 * 2 * 5 * PAGE_SIZE * 3 * 4)
    for pair in layers:
        for tensor in pair:
            assert tensor.dtype == ops.kv_dtype == (torch.float32 if arithmetic == "fp32" else torch.int16)
            assert not tensor.any()
            # What a kernel loads as one vector lies in one cache line.
            assert tensor.data_ptr() % 64 == tensor[0, 1].data_ptr() % 64 == 0
    if arithmetic != "fp32":
        assert layers[0][0].shape == (5, 3, page_width(head_dim))
