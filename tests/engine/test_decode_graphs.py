"""The runner with decode steps in static buffers: in the interpreter each "graph" is run anew, on a GPU it is
replayed. What is tested is the same: padding, buckets, buffers that keep what the last step wrote, prompts beside
decoding rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from manylora.adapters.versions import AdapterRef
from manylora.kernels.cuda.ops import CudaOps
from manylora.server.engine.batch import adapter_segments
from manylora.server.engine.decode_graphs import DecodeGraphs
from manylora.server.engine.request import AdapterUse, Request, SampledToken, ScheduledRow, StepPlan
from manylora.server.engine.runner import ModelRunner
from manylora.server.engine.sampler import Sampler
from manylora.server.model.synthetic import synthetic_adapter, synthetic_spec
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 - a fixture
from tests.model.cuda_model import DEVICE, FP32_ROUNDINGS, Model, Reference, by_slot, last_token, request

SPEC = synthetic_spec("tiny", num_hidden_layers=1)


class Runner:
    def __init__(self) -> None:
        self.model = Model(SPEC, CudaOps(DEVICE, torch.float32), "triton")
        self.graphs = DecodeGraphs(self.model.decoder, self.model.cache, max_rows=3, max_context=64)
        self.runner = ModelRunner(self.model.decoder, self.model.cache, Sampler(SPEC.vocab_size, DEVICE), self.graphs)
        self.seen: list[int] = []
        replay = self.graphs.run

        def watched(rows, segments):  # type: ignore[no-untyped-def]
            self.seen.append(len(rows))
            return replay(rows, segments)

        self.graphs.run = watched  # type: ignore[method-assign]

    def step(self, *rows: ScheduledRow) -> None:
        """Execute, and append each token to its request."""
        plan = StepPlan(by_slot(rows))
        tokens = self.runner.execute(plan)
        assert set(tokens) == {row.request.request_id for row in plan.rows if row.sample}
        for row in plan.rows:
            token = tokens.get(row.request.request_id)
            if row.sample:
                assert isinstance(token, SampledToken)
                row.request.output_token_ids.append(token.token_id)

    def decode_logits(self, *requests: Request) -> torch.Tensor:
        with torch.inference_mode():
            rows = list(by_slot(list(map(last_token, requests))))
            return self.graphs.run(rows, adapter_segments(rows, DEVICE)).cpu().clone()  # it is the graph's own buffer


@pytest.fixture
def runner() -> Runner:
    return Runner()


def prompt(r: Request) -> ScheduledRow:
    return ScheduledRow(r, 0, len(r.prompt_token_ids))


def slot_and_scale(r: Request) -> tuple[int | None, float]:
    return (r.slots[0], r.adapters[0].scale) if r.slots else (None, 1.0)


def compose(r: Request, *uses: tuple[int, float]) -> None:
    r.adapters = tuple(AdapterUse(AdapterRef("a", str(slot)), scale) for slot, scale in uses)
    r.slots = tuple(slot for slot, _ in uses)


def test_tokens_are_those_of_torch(runner: Runner) -> None:
    """Greedy: prompts, decoding, a prompt beside decoding rows, adapters that come and go, 1 to 3 rows and back."""
    requests = [request(0, 5, None), request(1, 14, 0), request(2, 3, 2, 0.5)]
    runner.step(prompt(requests[0]), prompt(requests[1]))
    runner.step(last_token(requests[0]), last_token(requests[1]), prompt(requests[2]))
    for _ in range(2):
        runner.step(*map(last_token, requests))
    runner.step(last_token(requests[1]))
    runner.step(last_token(requests[0]), last_token(requests[1]))
    assert runner.seen == [2, 3, 3, 1, 2]

    reference = Model(SPEC, Reference(DEVICE, torch.float32, resident=True), "torch")
    for r in requests:
        full = request(int(r.request_id[1:]), len(r.prompt_token_ids), *slot_and_scale(r))
        full.prompt_token_ids = r.prompt_token_ids + r.output_token_ids
        for length in range(len(r.prompt_token_ids), r.num_tokens):
            logits = reference.logits(ScheduledRow(full, 0, length))  # samples nothing ...
            assert logits.shape[0] == 0
            short = request(0, 1, *slot_and_scale(r))
            short.prompt_token_ids, short.pages = full.prompt_token_ids[:length], full.pages
            best = reference.logits(prompt(short))[0]
            token = full.prompt_token_ids[length]
            # The same token, unless two logits are as close as rounding.
            assert best.max() - best[token] <= 2 * FP32_ROUNDINGS * best.abs().max(), (r.request_id, length)


@pytest.mark.usefixtures("ordered_dot")
def test_a_decoding_rows_bits_depend_on_nothing_beside_it(runner: Runner) -> None:
    """Not on the bucket, on padding, on other rows' adapters, on what was computed before in the same buffers."""
    requests = [request(0, 5, None), request(1, 4, 0), request(2, 3, 2)]
    runner.step(*map(prompt, requests))
    together = runner.decode_logits(*requests)
    for i, r in enumerate(requests):
        assert torch.equal(runner.decode_logits(r)[0], together[i]), r.request_id
    assert torch.equal(runner.decode_logits(requests[0], requests[2]), together[[0, 2]])
    with torch.inference_mode():
        eager = runner.model.logits(*map(last_token, requests))
    assert torch.equal(eager, together)


def test_an_adapter_replaced_in_its_slot_is_used_at_once(runner: Runner) -> None:
    """The routing is copied only when it has changed: a new adapter in the same slot must count as a change."""
    requests = [request(0, 3, 0), request(1, 3, 2)]
    runner.step(*map(prompt, requests))
    before = runner.decode_logits(*requests)
    pool = runner.model.pool
    pool.clear(2)
    pool.write(2, synthetic_adapter(pool.shapes, 48, seed=9, projections=("o", "gate")))
    after = runner.decode_logits(*requests)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    requests[1].adapters = (replace(requests[1].adapters[0], scale=0.0),)
    assert torch.allclose(
        runner.decode_logits(*requests)[1], runner.model.logits(*map(last_token, requests))[1], atol=1e-5
    )


def test_what_graphs_cannot_hold_is_computed_without_them(runner: Runner) -> None:
    """An adapter with a delta on the embedding, and more rows than the largest bucket."""
    pool = runner.model.pool
    pool.write(1, synthetic_adapter(pool.shapes, 4, seed=3, projections=("embed", "q")))
    requests = [request(i, 2, None if i else 1) for i in range(4)]
    runner.step(*map(prompt, requests))
    runner.step(last_token(requests[0]))
    assert runner.seen == []
    runner.step(*map(last_token, requests[1:]))
    runner.step(*map(last_token, requests))
    assert runner.seen == [3]


def test_composed_adapters_up_to_what_a_graph_holds(runner: Runner) -> None:
    """Two adapters on a row are replayed, three are computed without a graph, and both are right."""
    requests = [request(0, 5, None), request(1, 6, 0), request(2, 4, 2)]
    model, reference = runner.model, Model(SPEC, Reference(DEVICE, torch.float32, resident=True), "torch")
    for pool in (model.pool, reference.pool):
        pool.write(1, synthetic_adapter(pool.shapes, 3, seed=5, projections=("k", "down")))
    compose(requests[1], (2, 0.5), (0, -1.0))
    compose(requests[2], (0, 0.25), (1, 2.0), (2, 1.0))
    runner.step(*map(prompt, requests))
    runner.step(*map(last_token, requests[:2]))
    assert runner.seen == [2]
    runner.step(*map(last_token, requests))
    assert runner.seen == [2], "a row with three adapters was replayed from a graph that holds two"

    for r, logits in (requests[1], runner.decode_logits), (requests[2], lambda r: model.logits(last_token(r))):
        whole = request(3, 1, None)
        whole.adapters, whole.slots = r.adapters, r.slots
        whole.prompt_token_ids = r.prompt_token_ids + r.output_token_ids
        expected = reference.logits(prompt(whole))[0]
        assert (logits(r)[0] - expected).abs().max() <= FP32_ROUNDINGS * expected.abs().max()
        compose(r, *((slot, 1.01 * use.scale) for slot, use in zip(r.slots, r.adapters, strict=True)))
        assert (logits(r)[0] - expected).abs().max() > 10 * FP32_ROUNDINGS * expected.abs().max()


def test_a_chunk_of_one_token_is_no_decode_step(runner: Runner) -> None:
    """A prompt that gets the last token of a step's budget is not sampled."""
    r, long = request(0, 3, 0), request(1, 9, None)
    runner.step(prompt(r), ScheduledRow(long, 0, 4))
    runner.step(last_token(r), ScheduledRow(long, 4, 1))
    assert runner.seen == [1]
    assert len(r.output_token_ids) == 2
    assert long.output_token_ids == []
    runner.step(last_token(r), ScheduledRow(long, 5, 4))
    assert len(long.output_token_ids) == 1


def test_warm_up_leaves_no_trace(runner: Runner) -> None:
    r = request(1, 4, 0)
    runner.step(prompt(r))
    before = runner.decode_logits(r)
    fresh = Runner()
    fresh.runner.warm_up(20, 12)
    again = request(1, 4, 0)
    fresh.step(prompt(again))
    assert again.output_token_ids == r.output_token_ids
    assert torch.equal(fresh.decode_logits(again), before)
