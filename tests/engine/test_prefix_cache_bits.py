"""Logits behind a cached prefix against those of a server without a cache, by the model's own kernels: equal bits.

On the CPU every row has the same bits in whatever chunks it is computed, so nothing less is accepted. torch's products
depend on the number of rows, so there it is a bound, far below what another adapter makes of the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from manylora.adapters.versions import AdapterRef
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.ops import PAGE_SIZE, Ops
from manylora.server.engine.merge_builder import MergeBuilder
from manylora.server.engine.merges import MergedModel, MergeManager
from manylora.server.engine.request import AdapterUse, Request, SamplingParams
from manylora.server.engine.runner import ModelRunner
from manylora.server.engine.sampler import Sampler
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base, synthetic_spec
from tests.engine.test_merged_rows import PROBE, as_loaded
from tests.kernels.test_prepared_linear import OPS

SPEC = synthetic_spec("tiny")
SHAPES = SPEC.lora_shapes()
WEIGHTS = [
    synthetic_adapter(SHAPES, 8, seed=1),
    synthetic_adapter(SHAPES, 20, seed=2, projections=("q", "v", "lm_head")),
    synthetic_adapter(SHAPES, 8, seed=3),
]
A, B = AdapterRef("a", "1" * 64), AdapterRef("b", "2" * 64)
NEW_A = AdapterRef("a", "3" * 64)
"""The same name after a replace, with other weights."""
VERSIONS = [A.version, B.version, NEW_A.version]


class FixedSlots:
    """Every version is on the device, in the slot of its number."""

    def never_together(self, refs: Collection[AdapterRef]) -> str | None:
        return None

    def acquire(self, ref: AdapterRef) -> int | None:
        return VERSIONS.index(ref.version)

    def awaits_read(self, ref: AdapterRef) -> bool:
        return False

    def prefetch(self, ref: AdapterRef) -> None: ...
    def release(self, ref: AdapterRef) -> None: ...
    def drop(self, ref: AdapterRef) -> None: ...
    def check_integrity(self, *, idle: bool = False) -> None: ...

    def resident(self) -> list[AdapterRef]:
        return [A, B, NEW_A]

    def resident_versions(self) -> set[str]:
        return set(VERSIONS)


class Registry:
    def acquire(self, name: str) -> AdapterRef:
        return A

    def release(self, ref: AdapterRef) -> None: ...


@dataclass(frozen=True)
class Asked:
    prompt: tuple[int, ...]
    uses: tuple[tuple[AdapterRef, float], ...] = ()
    merged: bool = False
    count: int = 4
    salt: str | None = None


@dataclass
class Answer:
    logits: list[torch.Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cached: int = 0


class Server:
    def __init__(self, ops: Ops, *, cached: bool, pages: int = 64) -> None:
        pool = LoraPool(SHAPES, max_slots=3, max_pages=6, dtype=ops.dtype, device=ops.device)
        for slot, weights in enumerate(WEIGHTS):
            pool.write(slot, weights)
        base = DecoderWeights.prepare(SPEC, synthetic_base(SPEC), ops, max_context=256)
        decoder = Decoder(SPEC, base, ops, BatchedLora(pool))
        self.runner = ModelRunner(decoder, KVCache(SPEC, pages, ops), Sampler(SPEC.vocab_size, ops.device))
        config = SchedulerConfig(
            max_rows=8, max_batch_tokens=64, num_pages=pages, page_size=PAGE_SIZE, max_context=256, prefix_cache=cached
        )
        self.scheduler = Scheduler(config, FixedSlots())
        builder = MergeBuilder(decoder, self.between, PROBE)
        self.merges = MergeManager(Registry(), lambda ref: as_loaded(WEIGHTS[VERSIONS.index(ref.version)]), builder)
        self._made = 0

    @staticmethod
    def between(function: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function())
        return future

    def ask(self, *asked: Asked) -> list[Answer]:
        """All at once, to their ends, greedily: what every token was drawn from."""
        answers: dict[str, Answer] = {}
        for one in asked:
            self._made += 1
            uses = tuple(AdapterUse(*use) for use in one.uses)
            merged: MergedModel | None = self.merges.bind(one.uses[0][0]) if one.merged else None
            assert (merged is not None) == one.merged
            made = Request(f"r{self._made}", list(one.prompt), SamplingParams(max_tokens=one.count), uses)
            made.merged, made.cache_salt = merged, one.salt
            answers[made.request_id] = Answer()
            self.scheduler.add(made)
        while self.scheduler.num_waiting + self.scheduler.num_running:
            plan = self.scheduler.schedule()
            logits = self.runner.logits(plan).clone()
            self.scheduler.commit(plan)
            sampling = [row.request for row in plan.rows if row.sample]
            for request, row in zip(sampling, logits, strict=True):
                answer = answers[request.request_id]
                answer.logits.append(row)
                answer.tokens.append(int(row.argmax()))
                request.output_token_ids.append(answer.tokens[-1])
                if len(answer.tokens) == request.params.max_tokens:
                    answer.cached = request.num_cached
                    self.scheduler.finish(request)
                    if request.merged is not None:
                        request.merged.release()
            self.scheduler.check_integrity()
        return list(answers.values())


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(SPEC.vocab_size) for _ in range(count))


PREFIX = tokens(70)
USES: dict[str, tuple[tuple[AdapterRef, float], ...]] = {
    "base": (),
    "a": ((A, 1.0),),
    "a, half": ((A, 0.5),),
    "b": ((B, 1.0),),
    "both": ((A, 0.75), (B, 0.25)),
    "both, otherwise": ((A, 0.25), (B, 0.75)),
    "a replaced": ((NEW_A, 1.0),),
}


def same(got: Sequence[Answer], expected: Sequence[Answer], *, exact: bool) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.tokens == other.tokens
        for logits, others in zip(one.logits, other.logits, strict=True):
            if exact:
                assert torch.equal(logits, others)
            else:
                torch.testing.assert_close(logits, others, rtol=0, atol=1e-4)


@pytest.fixture(params=["numba", "torch resident"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return OPS[request.param]()


def is_exact(ops: Ops) -> bool:
    return type(ops).__name__ == "NumbaOps"


def test_every_composition_behind_a_prefix_of_its_own_and_of_nobody_elses(ops: Ops) -> None:
    """Each first alone, then all at once with other ends; then what they answered goes on."""
    cached, plain = Server(ops, cached=True, pages=256), Server(ops, cached=False, pages=256)
    for uses in USES.values():
        (first,) = cached.ask(Asked(PREFIX, uses))
        assert first.cached == 0
    ends = [Asked(PREFIX[: 40 + 5 * i] + tokens(9, i), uses) for i, uses in enumerate(USES.values())]
    got, expected = cached.ask(*ends), plain.ask(*ends)
    assert [one.cached for one in got] == [(40 + 5 * i) // PAGE_SIZE * PAGE_SIZE for i in range(len(ends))]
    same(got, expected, exact=is_exact(ops))
    turns = [
        Asked(end.prompt + tuple(answer.tokens) + tokens(11, 50), end.uses)
        for end, answer in zip(ends, expected, strict=True)
    ]
    got, expected = cached.ask(*turns), plain.ask(*turns)
    assert all(one.cached > 0 for one in got)
    same(got, expected, exact=is_exact(ops))
    # The compositions do differ on these tokens, or the above would show nothing.
    firsts = [plain.ask(Asked(PREFIX, uses, count=1))[0].logits[0] for uses in USES.values()]
    for i, one in enumerate(firsts):
        assert all(float((one - other).abs().max()) > 0.01 for other in firsts[:i])


def test_merged_rows_share_with_rows_of_the_same_merge_alone(ops: Ops) -> None:
    cached, plain = Server(ops, cached=True, pages=256), Server(ops, cached=False, pages=256)
    apart, merged = Asked(PREFIX, USES["a"]), Asked(PREFIX, USES["a"], merged=True)
    both = []
    for server in (cached, plain):
        answers = server.ask(apart)
        server.merges.merge("a")
        answers += server.ask(merged)
        answers += server.ask(apart, merged, Asked(PREFIX))
        server.merges.unmerge()
        answers += server.ask(apart)
        server.merges.merge("a")
        answers += server.ask(merged)
        both.append(answers)
    full = 4 * PAGE_SIZE
    assert [one.cached for one in both[0]] == [0, 0, full, full, 0, full, 0]
    same(*both, exact=is_exact(ops))
    assert not torch.equal(both[1][0].logits[0], both[1][1].logits[0])


def test_random_conversations_with_little_memory() -> None:
    """Pages are evicted, requests are preempted, and everything is shared that can be."""
    ops = OPS["numba"]()
    rng = random.Random(5)
    cached, plain = Server(ops, cached=True, pages=24), Server(ops, cached=False, pages=256)
    hits = 0
    for _ in range(6):
        asked = [
            Asked(
                PREFIX[: rng.randint(16, 70)] + tokens(rng.randint(1, 20), rng.randrange(3)),
                rng.choice(list(USES.values())[:4]),
                count=rng.randint(1, 40),
            )
            for _ in range(8)
        ]
        got = cached.ask(*asked)
        same(got, plain.ask(*asked), exact=True)
        hits += sum(one.cached > 0 for one in got)
    assert hits > 5
    assert cached.scheduler.pool.num_evicted > 20
    assert cached.scheduler.counts.preemptions > 0
