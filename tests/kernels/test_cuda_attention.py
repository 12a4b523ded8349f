"""Paged attention in Triton against fp64: in Triton's interpreter, or on a GPU where there is one.

Every output starts as NaN, and so does all of the cache that no query may see: pages of nobody, positions beyond a
context, positions before a window. The tolerance is ``AttentionReference.bound``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels.cuda import attention as m
from manylora.kernels.cuda.attention_reference import attention_reference
from manylora.kernels.ops import PAGE_SIZE, AttentionShape, PagedSequences

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# What the type rounds by, relative. In the interpreter 16-bit types mean nothing (kernels-lab, section 2).
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ROUNDING) if ON_GPU else [torch.float32]
CONTEXTS = [1, 15, 16, 17, 63, 64, 65, 200]
SHAPES = [
    AttentionShape(2, 2, 32),  # G 1
    AttentionShape(4, 2, 64, window=20),  # G 2
    AttentionShape(8, 2, 80),  # G 4, and a head that is no power of two
    AttentionShape(8, 1, 64),  # G 8
    AttentionShape(3, 1, 48, window=100),  # G 3: heads of a block that are no power of two either
]


class Step:
    """Sequences of ``(context, new tokens)`` over shuffled pages; a context of 0 is a padding row."""

    def __init__(self, shape: AttentionShape, sequences: list[tuple[int, int]], dtype: torch.dtype, seed: int = 0):
        random = torch.Generator().manual_seed(seed)
        self.shape, self.counts = shape, [new for _, new in sequences]
        need = [-(-context // PAGE_SIZE) for context, _ in sequences]
        order = (torch.randperm(sum(need) + 3, generator=random)).tolist()
        # Where there is no page, the number of one that stays NaN.
        tables = torch.full((len(sequences), max(need) + 2), order[-1], dtype=torch.int32)
        sides = [torch.full(m.cache_shape(len(order), shape), float("nan")) for _ in range(2)]
        for s, (context, new) in enumerate(sequences):
            for i in range(need[s]):
                tables[s, i] = order.pop(0)
            first = max(0, context - new + 1 - shape.window) if shape.window else 0
            for side in sides:
                fill = torch.randn(shape.n_kv_heads, context, shape.head_dim, generator=random)
                for j in range(first, context):
                    side[tables[s, j // PAGE_SIZE], :, j % PAGE_SIZE] = fill[:, j]
            if shape.window:  # whole pages before the window may have been given back
                tables[s, : first // PAGE_SIZE] = tables[s, -1]
        self.cache: Any = tuple(side.to(DEVICE, dtype) for side in sides)
        starts = torch.tensor([0, *self.counts]).cumsum(0).int()
        self.sequences = PagedSequences(
            starts=starts.to(DEVICE),
            contexts=torch.tensor([context for context, _ in sequences], dtype=torch.int32, device=DEVICE),
            tables=tables.to(DEVICE),
            positions=torch.empty(0),  # of no use: the kernels count back from the context
        )
        # A column slice, as of a fused qkv; two units of standard deviation give a softmax with peaks.
        wide = 2 * torch.randn(sum(self.counts), shape.q_size + 2 * shape.kv_size, generator=random)
        self.q = wide.to(DEVICE, dtype)[:, : shape.q_size]
        self.dtype = dtype

    def poisoned(self) -> torch.Tensor:
        """An output whose rows are further apart than they are wide."""
        tokens, width = self.q.shape
        return torch.full((tokens, width + 16), float("nan"), dtype=self.dtype, device=DEVICE)[:, :width]

    def scratch(self) -> dict[str, torch.Tensor]:
        rows = len(self.counts)
        return {
            "planes": torch.full(m.planes_shape(rows, self.shape), float("nan"), device=DEVICE),
            "semaphores": torch.zeros(m.semaphores_shape(rows, self.shape), dtype=torch.int32, device=DEVICE),
        }

    def decode(self, rows: slice = slice(None), scratch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        contexts, tables = self.sequences.contexts[rows], self.sequences.tables[rows]
        scratch = scratch or self.scratch()
        q, out = self.q[rows], self.poisoned()[rows]
        return m.decode_attention(q, self.cache, contexts, tables, self.shape, out=out, **scratch)

    def prefill(self, order: int = 1) -> torch.Tensor:
        lists = m.query_blocks(self.sequences.starts.tolist(), m.query_tokens(self.shape))
        blocks: Any = tuple(torch.tensor(column[::order], dtype=torch.int32, device=DEVICE) for column in lists)
        return m.prefill_attention(self.q, self.cache, self.sequences, blocks, self.shape, self.poisoned())

    def check(self, out: torch.Tensor) -> None:
        reference = attention_reference(self.q, self.cache, self.sequences, self.shape)
        longest = int(self.sequences.contexts.max())
        bound = reference.bound(self.shape.head_dim, longest, ROUNDING[self.dtype])
        error = (out.double() - reference.out).abs()
        assert not out.isnan().any()
        assert out._base is not None
        assert out._base[:, out.shape[1] :].isnan().all()  # what lies between the rows
        assert (error <= bound).all(), f"{(error / bound).nan_to_num().max():.3g} times what rounding explains"


def test_the_bound_is_a_narrow_one() -> None:
    """A tolerance that any output meets would test nothing: here it is far below what one position more would do."""
    step = Step(AttentionShape(4, 2, 64), [(200, 3)], torch.float32)
    reference = attention_reference(step.q, step.cache, step.sequences, step.shape)
    assert reference.bound(64, 200, 0.0).max() < 1e-3
    assert reference.out.abs().mean() > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_of_every_length_and_padding_rows(shape: AttentionShape, dtype: torch.dtype) -> None:
    lengths = [*CONTEXTS[:4], 0, *CONTEXTS[4:], 0]
    step = Step(shape, [(context, 1) for context in lengths], dtype)
    scratch = step.scratch()
    out = step.decode(scratch=scratch)
    step.check(out)
    assert not out[lengths.index(0)].any()
    assert not scratch["semaphores"].any()
    # The planes now hold the first launch's partial results.
    assert torch.equal(step.decode(scratch=scratch), out)


def test_decode_of_more_tiles_than_shares() -> None:
    """1100 positions are 18 tiles: six shares of three, and two that stay empty."""
    step = Step(AttentionShape(2, 1, 16), [(1100, 1), (65 * 8, 1)], torch.float32)
    scratch = step.scratch()
    step.check(step.decode(scratch=scratch))
    assert not scratch["semaphores"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 20, 150])
def test_a_decoding_row_alone_has_the_bits_it_has_in_a_batch(window: int, dtype: torch.dtype) -> None:
    step = Step(AttentionShape(8, 2, 32, window), [(context, 1) for context in (200, 17, 700, 64, 0)], dtype)
    together = step.decode()
    for i in range(5):
        assert torch.equal(step.decode(slice(i, i + 1)), together[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_of_prompts_and_chunks(shape: AttentionShape, dtype: torch.dtype) -> None:
    """Whole prompts, chunks behind an earlier context, and single tokens, in one step."""
    step = Step(shape, [(17, 17), (65, 30), (1, 1), (200, 70), (16, 1), (64, 64), (63, 15)], dtype)
    out = step.prefill()
    step.check(out)
    # The other way round, lest a block overwrites what another has written or has yet to write.
    assert torch.equal(step.prefill(order=-1), out)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("length", CONTEXTS)
def test_prefill_of_one_prompt(length: int, window: int) -> None:
    step = Step(AttentionShape(4, 2, 32, window), [(length, length)], torch.float32, seed=length)
    step.check(step.prefill())


def test_both_kernels_agree_on_single_tokens() -> None:
    step = Step(AttentionShape(8, 2, 64), [(context, 1) for context in CONTEXTS], torch.float32)
    # Twice the bound of either, which the tests above put near 1e-5.
    torch.testing.assert_close(step.prefill(), step.decode(), rtol=0, atol=1e-4)


def test_blocks_span_no_two_sequences() -> None:
    assert m.query_blocks([0, 3, 3, 11], 4) == ([0, 2, 2], [0, 3, 7])
    assert m.query_blocks([0], 4) == ([], [])
    assert m.query_tokens(AttentionShape(8, 2, 64)) == 16
    assert m.query_tokens(AttentionShape(9, 3, 64)) == 21


def test_tokens_of_sequences_without_blocks_are_left_alone() -> None:
    step = Step(AttentionShape(4, 2, 32), [(20, 20), (5, 5)], torch.float32)
    blocks: Any = tuple(torch.tensor([value], dtype=torch.int32, device=DEVICE) for value in (1, 20))
    out = m.prefill_attention(step.q, step.cache, step.sequences, blocks, step.shape, step.poisoned())
    assert out[:20].isnan().all()
    assert not out[20:].isnan().any()


def test_what_does_not_fit_is_refused() -> None:
    step = Step(AttentionShape(4, 2, 32), [(20, 1)], torch.float32)
    scratch = step.scratch()
    with pytest.raises(ValueError, match="expected fp32 planes"):
        step.decode(scratch={**scratch, "planes": scratch["planes"][:, :4]})
    with pytest.raises(ValueError, match="expected int32 semaphores"):
        step.decode(scratch={**scratch, "semaphores": scratch["semaphores"].long()})
    step.cache = tuple(side.transpose(2, 3) for side in step.cache)
    with pytest.raises(ValueError, match="cache"):
        step.decode()
    with pytest.raises(ValueError, match="multiple of 16"):
        m.decode_launch(AttentionShape(4, 2, 40), wide=True)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU here")
def test_decode_in_a_cuda_graph() -> None:
    step = Step(AttentionShape(8, 2, 128), [(1100, 1), (0, 1), (65, 1)], torch.bfloat16)
    scratch, out = step.scratch(), step.poisoned()
    contexts, tables = step.sequences.contexts, step.sequences.tables

    def launch() -> None:
        m.decode_attention(step.q, step.cache, contexts, tables, step.shape, out=out, **scratch)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    expected = out.clone()
    for _ in range(100):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
    step.check(out)
