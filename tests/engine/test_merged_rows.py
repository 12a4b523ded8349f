"""Steps with rows of merged requests among others: whose weights compute what, and that nobody else notices."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.adapters.versions import AdapterRef
from manylora.adapters.weights import AdapterWeights, LoadReport
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_weights import LoraWeights
from manylora.kernels.ops import Ops
from manylora.kernels.sites import SITES
from manylora.kernels.torch_ops import TorchOps
from manylora.server.engine.auto_merge import TokenShares
from manylora.server.engine.decode_graphs import DecodeGraphs
from manylora.server.engine.errors import EngineDraining
from manylora.server.engine.merge_builder import MergeBuilder, _group_bytes, free_bytes
from manylora.server.engine.merges import MergedModel, MergeManager, MergeMode
from manylora.server.engine.request import AdapterUse, Request, SampledToken, SamplingParams, ScheduledRow, StepPlan
from manylora.server.engine.runner import ModelRunner
from manylora.server.engine.sampler import Sampler
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.families import ModelSpec
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.merged import merge_adapter
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base, synthetic_spec
from tests.kernels.test_prepared_linear import OPS
from tests.model.merged_model import logits as logits_of
from tests.model.merged_model import with_weights
from tests.model.test_merged import digest

SPEC = synthetic_spec("tiny")
SMALL = synthetic_spec(
    "tiny", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
PROBE = [7 * i % 320 for i in range(48)]


def adapters_of(spec: ModelSpec) -> list[LoraWeights]:
    shapes = spec.lora_shapes()
    some = synthetic_adapter(shapes, 20, seed=2, projections=("q", "v", "lm_head"))
    return [synthetic_adapter(shapes, 8, seed=1), some]


ADAPTERS = adapters_of(SPEC)
REFS = [AdapterRef(f"adapter-{i}", str(i) * 64) for i in range(2)]


class Registry:
    """Names that are always there."""

    def __init__(self) -> None:
        self.references = 0

    def acquire(self, name: str) -> AdapterRef:
        self.references += 1
        return next(ref for ref in REFS if ref.name == name)

    def release(self, ref: AdapterRef) -> None:
        self.references -= 1


def as_loaded(lora: LoraWeights) -> AdapterWeights:
    return AdapterWeights("0" * 64, lora, LoadReport((8,), (1.0,), ("q",), 1, 1, "bfloat16", None))


class Server:
    """Decoder, pages, slots 0 and 1 with two adapters, and merges made on the caller's thread."""

    def __init__(self, ops: Ops, spec: ModelSpec = SPEC, *, graphs: bool = False, n_probe: int = 48) -> None:
        self.pool = LoraPool(spec.lora_shapes(), max_slots=2, max_pages=3, dtype=ops.dtype, device=ops.device)
        adapters = adapters_of(spec)
        for slot, adapter in enumerate(adapters):
            self.pool.write(slot, adapter)
        weights = DecoderWeights.prepare(spec, synthetic_base(spec), ops, max_context=128)
        self.decoder = Decoder(spec, weights, ops, BatchedLora(self.pool))
        self.cache = KVCache(spec, 64, ops)
        self.shares = TokenShares()
        self.graphs = DecodeGraphs(self.decoder, self.cache, max_rows=2, max_context=64) if graphs else None
        sampler = Sampler(spec.vocab_size, ops.device)
        self.runner = ModelRunner(self.decoder, self.cache, sampler, self.graphs, shares=self.shares)
        self.threads: list[str] = []
        builder = MergeBuilder(
            self.decoder,
            self.between,
            [token % spec.vocab_size for token in PROBE[:n_probe]],
            warm_up=self.runner.merged_warm_up,
        )
        self.registry = Registry()
        self.merges = MergeManager(self.registry, lambda ref: as_loaded(adapters[REFS.index(ref)]), builder)
        self._made = 0

    def between(self, function: Callable[[], Any]) -> Future[Any]:
        """On another thread, as the step loop's is."""
        future: Future[Any] = Future()
        thread = threading.Thread(target=lambda: future.set_result(function()), name="step-loop")
        thread.start()
        thread.join()
        self.threads.append(thread.name)
        return future

    def request(self, adapter: int | None, length: int, merged: MergedModel | None = None) -> Request:
        """Random tokens, in pages of its own."""
        number, self._made = self._made, self._made + 1
        random = torch.Generator().manual_seed(length)
        tokens = torch.randint(0, self.decoder.spec.vocab_size, (length,), generator=random).tolist()
        made = Request(f"r{number}", tokens, SamplingParams(temperature=0.0), merged=merged)
        if adapter is not None:
            made.adapters = (AdapterUse(REFS[adapter]),)
            made.slots = () if merged is not None else (adapter,)
        made.pages = [4 * number + i for i in (2, 0, 3, 1)]
        return made

    def logits(self, *rows: ScheduledRow) -> torch.Tensor:
        return self.runner.logits(in_order(rows)).cpu().clone()

    def step(self, *rows: ScheduledRow) -> dict[str, int]:
        found = {}
        for request_id, token in self.runner.execute(in_order(rows)).items():
            assert isinstance(token, SampledToken)
            found[request_id] = token.token_id
        return found


def in_order(rows: Sequence[ScheduledRow]) -> StepPlan:
    return StepPlan(tuple(sorted(rows, key=lambda row: (row.request.merged is not None, row.request.slots))))


def prompt(request: Request) -> ScheduledRow:
    return ScheduledRow(request, 0, request.num_tokens)


def last(request: Request) -> ScheduledRow:
    return ScheduledRow(request, request.num_tokens - 1, 1)


@pytest.fixture(params=["numba", "torch resident"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return OPS[request.param]()


@pytest.mark.parametrize("mode", ["exact", "compact"])
def test_others_have_the_same_bits_beside_merged_rows(mode: MergeMode) -> None:
    """Prompts and then decode steps: base rows and both adapters, with merged rows among them and without."""
    alone, mixed = Server(OPS["numba"]()), Server(OPS["numba"]())
    mixed.merges.merge("adapter-0", mode)
    merged = mixed.merges.bind(REFS[0])
    assert merged is not None
    others = [(None, 5), (0, 19), (1, 3), (None, 17)]
    without = [alone.request(*which) for which in others]
    beside = [mixed.request(*which) for which in others]
    own = [mixed.request(0, 11, merged), mixed.request(0, 2, merged)]
    for step in (prompt, last, last):
        expected = alone.logits(*map(step, without))
        got = mixed.logits(*map(step, [*beside, *own]))
        assert torch.equal(got[:4], expected)
        for i, request in enumerate(in_order(list(map(step, without))).rows):
            token = int(expected[i].argmax())
            request.request.output_token_ids.append(token)
        for i, request in enumerate(in_order(list(map(step, [*beside, *own]))).rows):
            request.request.output_token_ids.append(int(got[i].argmax()))
    merged.release()


@pytest.mark.parametrize("mode", ["exact", "compact"])
def test_merged_rows_are_computed_by_the_merged_weights(ops: Ops, mode: MergeMode) -> None:
    server = Server(ops)
    server.merges.merge("adapter-0", mode)
    merged = server.merges.bind(REFS[0])
    assert merged is not None
    request, unmerged, base = server.request(0, 21, merged), server.request(0, 21), server.request(None, 21)
    got = server.logits(prompt(base), prompt(request), prompt(unmerged))
    expected = logits_of(with_weights(server.decoder, merge_adapter(server.decoder, ADAPTERS[0], mode)),
                         request.prompt_token_ids)[-1]  # fmt: skip
    order = [row.request for row in in_order([prompt(base), prompt(request), prompt(unmerged)]).rows]
    torch.testing.assert_close(got[order.index(request)], expected, rtol=0, atol=1e-5)
    off = (got[order.index(request)] - got[order.index(unmerged)]).abs().max()
    away = (got[order.index(base)] - got[order.index(unmerged)]).abs().max()
    assert off > 0
    if mode == "exact":
        assert off < 0.1 * away, "merged weights are the adapter's, but for their rounding"
    merged.release()


def test_rows_of_two_merges_and_none_in_one_step(ops: Ops) -> None:
    """A merge that is ending still computes its own requests beside the next one's."""
    server = Server(ops)
    models = []
    for ref in REFS:
        server.merges.merge(ref.name)
        models.append(server.merges.bind(ref))
    first, second = models
    assert first is not None
    assert second is not None
    requests = [server.request(None, 6), server.request(0, 7, first), server.request(1, 8, second)]
    got = server.logits(*map(prompt, requests))
    for i, model in ((1, first), (2, second)):
        alone = logits_of(model.decoder, requests[i].prompt_token_ids)[-1]
        torch.testing.assert_close(got[i], alone, rtol=0, atol=1e-5)
    tokens = server.step(*map(prompt, requests))
    assert tokens == {r.request_id: int(got[i].argmax()) for i, r in enumerate(requests)}
    first.release()
    assert first.is_freed
    second.release()


def test_unmerging_gives_back_bytes_and_bits() -> None:
    server = Server(OPS["numba"]())
    prompts = [(None, 5), (0, 19), (1, 3)]
    before_bytes = digest(server.decoder.weights)
    before = server.logits(*(prompt(server.request(*which)) for which in prompts))
    for mode in ("exact", "compact"):
        server.merges.merge("adapter-0", mode)
        merged = server.merges.bind(REFS[0])
        assert merged is not None
        watched = [weakref.ref(merged.decoder), weakref.ref(merged.decoder.weights)]
        server.step(prompt(server.request(0, 9, merged)))
        server.merges.unmerge()
        assert all(ref() is not None for ref in watched)
        merged.release()
        assert all(ref() is None for ref in watched), "the copy is still in memory"
        assert digest(server.decoder.weights) == before_bytes
        server._made = 0
        after = server.logits(*(prompt(server.request(*which)) for which in prompts))
        assert torch.equal(after, before)
    server.merges.check_integrity(idle=True)
    assert server.registry.references == 0


def with_pair(weight: torch.Tensor, adapter: LoraWeights, module: tuple[str, int]) -> torch.Tensor:
    pair = adapter.pairs.get(module)
    return weight if pair is None else weight + pair.scale * (pair.b.float() @ pair.a.float())


def plain_logits(weight: Callable[[str, int], torch.Tensor], head: torch.Tensor) -> torch.Tensor:
    """Of the probe, by the plain torch operations over dense fp32 matrices."""
    ops = TorchOps("cpu", torch.float32, resident=True)
    weights = DecoderWeights.prepare(SPEC, synthetic_base(SPEC), ops, max_context=128)
    for layer, parts in enumerate(weights.layers):
        for site, prepared in parts.sites.items():
            prepared.resident.copy_(torch.cat([weight(p, layer) for p in SITES[site]]))
    return logits_of(Decoder(SPEC, replace(weights, head=head), ops, None), PROBE)


@pytest.mark.parametrize("mode", ["exact", "compact"])
@pytest.mark.parametrize("which", [0, 1])
def test_the_drift_reported_is_the_drift_measured_offline(which: int, mode: MergeMode) -> None:
    """Here in plain torch from dense fp32 matrices: W + sBA for the adapter, and what the merged model says that it
    multiplies with, dequantised; all positions, the whole vocabulary. The effect: against W alone."""
    server = Server(OPS["numba"]())
    info = server.merges.merge(f"adapter-{which}", mode)
    bound = server.merges.bind(REFS[which])
    assert bound is not None
    merged, adapter = bound.decoder, ADAPTERS[which]

    def adapted(p: str, layer: int) -> torch.Tensor:
        return with_pair(server.decoder.weight(p, layer), adapter, (p, layer))

    unmerged = plain_logits(adapted, with_pair(server.decoder.table("lm_head"), adapter, ("lm_head", 0)))
    for compared, found in (
        (plain_logits(merged.weight, merged.table("lm_head")), info.measured.drift),
        (plain_logits(server.decoder.weight, server.decoder.table("lm_head")), info.measured.effect),
    ):
        difference = (compared - unmerged).abs()
        assert found.max == pytest.approx(float(difference.max()), rel=0.01)
        assert found.mean == pytest.approx(float(difference.mean()), rel=0.01)
    bound.release()
    assert info.measured.drift.max > 1e-3


def test_drift_is_measured_between_steps_and_leaves_the_cache_alone() -> None:
    server = Server(OPS["numba"]())
    requests = [server.request(None, 20), server.request(0, 20)]
    server.logits(*map(prompt, requests))
    pages = [tensor.clone() for pair in server.cache.layers for tensor in pair]
    server.merges.merge("adapter-0")
    assert server.threads == ["step-loop"] * 3
    assert all(torch.equal(a, b) for a, b in zip(pages, (t for pair in server.cache.layers for t in pair), strict=True))
    assert server.pool.pages_of(0), "the serving pool's slots are as they were"


def test_a_merge_that_is_being_built_ends_when_the_server_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(OPS["numba"]())
    kind = type(server.decoder.ops)
    real, done = kind.dense, 0

    def dense(ops: Ops, weight: Any) -> torch.Tensor:
        nonlocal done
        done += 1
        if done == 3:
            server.merges.close()
        return real(ops, weight)

    monkeypatch.setattr(kind, "dense", dense)
    with pytest.raises(EngineDraining):
        server.merges.merge("adapter-0")
    assert done == 3
    assert server.registry.references == 0


def test_what_is_generated_is_counted_for_whom() -> None:
    server = Server(OPS["numba"]())
    server.merges.merge("adapter-0")
    merged = server.merges.bind(REFS[0])
    assert merged is not None
    requests = [server.request(None, 4), server.request(1, 4), server.request(0, 4, merged), server.request(0, 4)]
    server.step(*map(prompt, requests))
    assert server.shares.take()[0] == {REFS[0].version: 2, REFS[1].version: 1, "": 1}
    merged.release()


def test_merged_rows_have_graphs_of_their_own() -> None:
    """Over the CUDA operations (in the interpreter): the same buffers, other graphs; nothing of a step before is
    computed again when they are captured."""
    server = Server(OPS["cuda"](), SMALL, graphs=True, n_probe=4)
    base = server.request(None, 5)
    server.step(prompt(base))
    base.output_token_ids.append(3)
    server.step(last(base))  # its row stays in the buffers
    pages = [tensor.clone() for pair in server.cache.layers for tensor in pair]
    server.merges.merge("adapter-1")
    changed = [
        not torch.equal(a, b) for a, b in zip(pages, (t for pair in server.cache.layers for t in pair), strict=True)
    ]
    assert not any(changed), "capturing has computed a row of the last step by the merged weights"
    merged = server.merges.bind(REFS[1])
    assert merged is not None
    assert set(merged.graphs._graphs) == {(rows, False) for rows in (1, 2)}
    request = server.request(1, 4, merged)
    server.step(prompt(request), last(base))
    request.output_token_ids.append(9)
    tokens = server.step(last(request), last(base))
    expected = logits_of(merged.decoder, [*request.prompt_token_ids, 9])[-1]
    assert tokens[request.request_id] == int(expected.argmax())
    alone = logits_of(with_weights(server.decoder, server.decoder.weights), [*base.prompt_token_ids, 3])[-1]
    assert tokens[base.request_id] == int(alone.argmax())
    merged.release()
    server.merges.unmerge()
    assert merged.graphs is None


def test_free_bytes_is_what_the_system_says() -> None:
    found = free_bytes(torch.device("cpu"))
    assert 1 << 20 < found < 1 << 50


def test_a_control_group_limits_what_is_free(tmp_path: Path) -> None:
    assert _group_bytes(tmp_path) == 1 << 62, "there is none"
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\n")
    assert _group_bytes(tmp_path) == 450_000
    (tmp_path / "memory.max").write_text("max\n")
    assert _group_bytes(tmp_path) == 1 << 62
