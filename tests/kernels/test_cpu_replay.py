"""Recorded steps: run again for other inputs, they give the bits of steps that are queued anew."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from manylora.adapters.versions import AdapterRef
from manylora.kernels.cpu import available
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.lora_weights import LoraVectors, LoraWeights
from manylora.kernels.ops import Ops
from manylora.server.engine.batch import BatchBuilder, build_batch
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow, StepPlan
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.families import ModelSpec
from manylora.server.model.forward_batch import ForwardBatch
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base, synthetic_spec

if not available():
    pytest.skip("no AVX2 and FMA here", allow_module_level=True)

SPEC = synthetic_spec("tiny", max_position_embeddings=1024)
TIED = synthetic_spec("tiny", max_position_embeddings=1024, tie_word_embeddings=True)
PAGES = 200


class Model:
    """A decoder with three adapters: ranks 8 and 24, and one that has gains."""

    def __init__(self, lora: Any = "cpu", spec: ModelSpec = SPEC) -> None:
        from manylora.kernels.cpu.ops import NumbaOps

        self.ops: Ops = NumbaOps()
        self.pool = LoraPool(SPEC.lora_shapes(), max_slots=4, max_pages=8, max_rank=32)
        for slot, rank in enumerate((8, 24, 16)):
            self.pool.write(slot, synthetic_adapter(SPEC.lora_shapes(), rank, seed=slot))
        gains = {("q", 0): LoraVectors(gain=torch.full((SPEC.lora_shapes().out_features["q"],), 1.5))}
        self.pool.write(3, LoraWeights(synthetic_adapter(SPEC.lora_shapes(), 8, seed=9).pairs, gains))
        weights = DecoderWeights.prepare(spec, synthetic_base(spec), self.ops, max_context=1024)
        self.decoder = Decoder(spec, weights, self.ops, BatchedLora(self.pool, lora))
        self.cache = KVCache(spec, PAGES, self.ops)

    def hidden(self, batch: ForwardBatch) -> torch.Tensor:
        return self.decoder.hidden(batch, self.cache)

    @property
    def hits(self) -> int:
        assert self.decoder._recordings is not None
        return self.decoder._recordings.hits


def plain(model: Model) -> Model:
    """The same, which records nothing."""
    model.decoder._recordings = None
    return model


def rows(
    contexts: list[int], slots: list[tuple[int, ...]], *, counts: list[int] | None = None, first_page: int = 0
) -> StepPlan:
    """Each row computes the last token of its context, or ``counts`` of them; pages are in no order."""
    found, page = [], first_page
    for i, (context, own, count) in enumerate(zip(contexts, slots, counts or [1] * len(slots), strict=True)):
        request = Request(f"r{i}", [(7 * i + 3 * j) % 320 for j in range(context)], SamplingParams())
        n = -(-context // 16)
        request.pages = list(range(page + n - 1, page - 1, -1))
        page += n
        request.slots = own
        request.adapters = tuple(AdapterUse(AdapterRef(f"a{slot}", f"{slot:064d}"), 0.5 + slot) for slot in own)
        found.append(ScheduledRow(request, context - count, count))
    return StepPlan(tuple(found))


STEPS = [
    ([30, 17, 40], [(), (), ()]),
    ([31, 18, 41], [(0,), (1,), ()]),
    ([32, 19, 42], [(1,), (0,), ()]),  # the same shape, other slots
    ([33, 20, 270], [(2,), (), (0,)]),  # a table that is wider than the recorded one
    ([34, 21, 271], [(0,), (), (0,)]),  # one segment for two rows
    ([35, 22, 272], [(0, 1), (2,), ()]),
    ([36, 23, 273], [(1, 2), (0,), ()]),
    ([16, 24, 3], [(), (), ()]),
    ([17, 25, 4], [(), (), ()]),  # a new page
]


def prefill(model: Model, plan: StepPlan) -> None:
    """Keys and values of what a step's rows have behind them, without recordings."""
    recordings, model.decoder._recordings = model.decoder._recordings, None
    for row in plan.rows:
        before = ScheduledRow(row.request, 0, row.start)
        model.hidden(build_batch(StepPlan((before,))))
    model.decoder._recordings = recordings


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_as_without(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        recording, other = Model(), plain(Model())
        for contexts, slots in STEPS * 2:
            plan = rows(contexts, slots)
            for model in (recording, other):
                prefill(model, plan)
            expected = other.hidden(build_batch(plan))
            assert torch.isfinite(expected).all()
            assert torch.equal(recording.hidden(build_batch(plan)), expected)
        assert recording.hits >= len(STEPS), "the second time each shape is known"
    finally:
        torch.set_num_threads(before)


def agree(recording: Model, other: Model, plan: StepPlan) -> None:
    """The same last layer's outputs, keys and values."""
    expected = other.hidden(build_batch(plan))
    assert torch.isfinite(expected).all()
    assert torch.equal(recording.hidden(build_batch(plan)), expected)
    for ours, theirs in zip(recording.cache.layers, other.cache.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


PARTS: dict[str, list[tuple[list[int], list[tuple[int, ...]]]]] = {
    # Each a step of eight tokens: of how many each row, and with which adapters.
    "base": [([1] * 8, [()] * 8), ([5, 3], [()] * 2), ([8], [()]), ([1, 5, 1, 1], [()] * 4), ([2] * 4, [()] * 4)],
    "one adapter": [([1] * 8, [(0,)] * 8), ([5, 3], [(), (1,)]), ([5, 3], [(1,), ()]), ([8], [(0,)]),
                    ([1, 4, 3], [(), (1,), (1,)]), ([3, 1, 4], [(1,), (), ()])],
    "two adapters": [([1] * 8, [(0,), (1,)] * 4), ([5, 3], [(0,), (1,)]), ([3, 5], [(1,), (2,)]),
                     ([1, 6, 1], [(2,), (), (0,)]), ([7, 1], [(0,), (2,)])],
    "several of a row": [([1] * 8, [(0, 1)] * 8), ([5, 3], [(0, 1), ()]), ([3, 5], [(1,), (0, 1)]), ([8], [(1, 2)])],
}  # fmt: skip


@pytest.mark.parametrize("adapters", PARTS)
def test_steps_of_as_many_tokens_share_recordings(adapters: str) -> None:
    """However the tokens are divided among rows and adapters, in any order of such steps."""
    rng = random.Random(adapters)
    recording, other = Model(), plain(Model())
    kinds = PARTS[adapters]
    order = rng.sample(kinds, len(kinds)) + rng.choices(kinds, k=12)
    for counts, slots in order:
        plan = rows([count + rng.randrange(1, 60) for count in counts], slots, counts=counts)
        for model in (recording, other):
            prefill(model, plan)
        agree(recording, other, plan)
    assert recording.hits == len(order) - 1


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_grow_leave_and_join(seed: int) -> None:
    """Sequences that decode, draft (a part of which is thrown away) and begin, as a server's do, every step against one
    that is queued; one of them grows beyond the width of a recorded table."""
    rng = random.Random(seed)
    recording, other = Model(), plain(Model())
    free = [list(range(i * 20, i * 20 + 20)) for i in range(10)]  # pages of as many sequences
    running: list[tuple[Request, int]] = []
    for number in range(60):
        if free and rng.random() < (0.9 if number < 6 else 0.3):
            request = Request(f"r{number}", [rng.randrange(320) for _ in range(320)], SamplingParams())
            request.pages = free.pop()
            request.slots = rng.choice([(), (), (0,), (1,), (2,), (0, 1), (2, 0)])
            request.adapters = tuple(AdapterUse(AdapterRef(f"a{s}", f"{s:064d}"), 0.5 + s) for s in request.slots)
            start = rng.choice([0, 0, 250])
            if start:
                for model in (recording, other):
                    prefill(model, StepPlan((ScheduledRow(request, start, 1),)))
            running.append((request, start))
        if not running:
            continue
        stepped: list[ScheduledRow] = []
        for request, start in running:
            count = rng.randrange(2, 12) if start == 0 else rng.choice([0, 1, 1, 1, 2, 3, 5])
            if count:
                stepped.append(ScheduledRow(request, start, count))
        if not stepped:
            continue
        agree(recording, other, StepPlan(tuple(sorted(stepped, key=lambda row: row.request.slots))))
        advanced = {row.request: row.start + rng.randint(1, row.count) for row in stepped}
        running = [(request, advanced.get(request, start)) for request, start in running]
        for request, start in running:
            if start > 300 or rng.random() < 0.08:
                free.append(request.pages)
        running = [(request, start) for request, start in running if request.pages not in free]
    assert recording.hits > 5


def test_a_result_is_not_written_over_by_the_next_step() -> None:
    model = Model()
    plans = [rows(contexts, [(), (), ()]) for contexts in ([30, 17, 40], [31, 18, 41], [32, 19, 42])]
    prefill(model, plans[2])
    first = [model.hidden(build_batch(plan)) for plan in plans]
    again = [model.hidden(build_batch(plan)) for plan in plans]
    assert model.hits >= 4
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], first[1])


def test_threads_may_change_between_runs() -> None:
    model, before = Model(), torch.get_num_threads()
    plan = rows([30, 17], [(0,), (1,)])
    prefill(model, plan)
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(model.hidden(build_batch(plan)))
    finally:
        torch.set_num_threads(before)
    assert model.hits == 3
    assert all(torch.equal(result, results[0]) for result in results)


def test_an_adapter_that_was_replaced_is_read_anew() -> None:
    """A recording holds addresses, not what was there."""
    recording, other = Model(), plain(Model())
    plan = rows([30, 17], [(0,), (1,)])
    for model in (recording, other):
        prefill(model, plan)
        model.hidden(build_batch(plan))
        model.pool.clear(0)
        model.pool.write(0, synthetic_adapter(SPEC.lora_shapes(), 30, seed=77))
    assert torch.equal(recording.hidden(build_batch(plan)), other.hidden(build_batch(plan)))
    assert recording.hits == 1


@pytest.mark.parametrize("what", ["gains", "prompt", "torch adapters"])
def test_what_cannot_be_recorded_is_computed_all_the_same(what: str) -> None:
    kind = "torch" if what == "torch adapters" else "cpu"
    recording, other = Model(kind), plain(Model(kind))
    counts = [64, 1] if what == "prompt" else [1, 2]
    plan = rows([90, 17], [(3,) if what == "gains" else (0,), (1,)], counts=counts)
    for model in (recording, other):
        prefill(model, plan)
    expected = other.hidden(build_batch(plan))
    for _ in range(3):
        assert torch.equal(recording.hidden(build_batch(plan)), expected)
    assert recording.hits == 0


@pytest.mark.parametrize("spec", [SPEC, TIED, replace(TIED, embed_scale=3.0)])
def test_full_steps_of_prompts_are_recorded(spec: ModelSpec) -> None:
    """However 256 tokens are divided among prompts and rows that decode. Not where Python makes what the first layer
    is given, as the recording would keep a copy of that."""
    recording, other = Model(spec=spec), plain(Model(spec=spec))
    steps = [[64] * 4, [256], [100, 1, 1, 154], [1, 255], [17, 64, 64, 64, 47]]
    for counts in steps:
        slots: list[tuple[int, ...]] = [(), (0,)][: len(counts)] + [(1,)] * (len(counts) - 2)
        plan = rows([count + 3 for count in counts], slots, counts=counts)
        for model in (recording, other):
            prefill(model, plan)
            model.decoder.logits(model.hidden(build_batch(plan)), build_batch(plan), None)  # scratch of another size
        agree(recording, other, plan)
    assert recording.hits > len(steps) if spec is TIED else recording.hits == 0


def test_each_thread_has_recordings_of_its_own() -> None:
    model, other = Model(), plain(Model())
    plans = [rows([30 + i, 17], [(), ()], first_page=20 * i) for i in range(3)]
    for plan in plans:
        prefill(model, plan)
        prefill(other, plan)
    expected = [other.hidden(build_batch(plan)) for plan in plans]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(30):
            if not torch.equal(model.hidden(build_batch(plans[i])), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_another_cache_is_another_recording() -> None:
    model, plan = Model(), rows([30, 17], [(), ()])
    results = []
    for _ in range(3):
        model.cache = KVCache(SPEC, PAGES, model.ops)
        prefill(model, plan)
        results.append(model.hidden(build_batch(plan)))
        assert model.cache.layers[-1][0].any()
    assert model.hits == 0
    assert all(torch.equal(result, results[0]) for result in results)


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from manylora.kernels.cpu import replay

    monkeypatch.setattr(replay, "_KEPT", 2)
    model, other = Model(), plain(Model())
    for n in (1, 2, 3, 1, 3):
        plan = rows([20] * n, [()] * n)
        for one in (model, other):
            prefill(one, plan)
        assert torch.equal(model.hidden(build_batch(plan)), other.hidden(build_batch(plan)))
    assert model.decoder._recordings is not None
    assert len(model.decoder._recordings._kept) == 2
    assert model.hits == 1, "the last one; the first was forgotten"


@pytest.mark.parametrize("spec", [SPEC, TIED, replace(TIED, embed_scale=3.0), replace(TIED, logit_softcap=0.5)])
def test_a_recorded_step_has_its_logits_and_their_maxima(spec: ModelSpec) -> None:
    recording, other = Model(spec=spec), plain(Model(spec=spec))
    for contexts, slots in STEPS * 2:
        plan = rows(contexts, slots)
        for model in (recording, other):
            prefill(model, plan)
        expected = other.decoder.forward(build_batch(plan), other.cache)
        found = recording.decoder.step(BatchBuilder().arrays(plan.rows), recording.cache)
        assert torch.equal(found.logits, expected)
        assert torch.equal(found.hidden, other.hidden(build_batch(plan)))
        assert found.maxima is not None
        assert found.maxima.places.tolist() == expected.argmax(1).tolist()
        assert found.maxima.highest.tolist() == expected.amax(1).tolist()
    assert recording.hits >= len(STEPS)


def test_a_step_that_samples_some_of_its_tokens_has_no_maxima() -> None:
    recording, other = Model(), plain(Model())
    plan = rows([30, 17], [(0,), ()], counts=[3, 1])
    for _ in range(2):
        for model in (recording, other):
            prefill(model, plan)
        expected = other.decoder.forward(build_batch(plan), other.cache)
        found = recording.decoder.step(BatchBuilder().arrays(plan.rows), recording.cache)
        assert torch.equal(found.logits, expected)
        assert found.maxima is None


def test_a_token_that_there_is_not() -> None:
    """It ends its own row and no other, also where the look-up is recorded."""
    model = Model(spec=TIED)
    plan = rows([30, 17], [(), ()])
    prefill(model, plan)
    model.decoder.step(BatchBuilder().arrays(plan.rows), model.cache)
    plan.rows[0].request.prompt_token_ids[-1] = 10**6
    found = model.decoder.step(BatchBuilder().arrays(plan.rows), model.cache)
    assert found.logits[0].isnan().all()
    assert found.logits[1].isfinite().all()
    with pytest.raises(IndexError):
        plain(model).decoder.step(BatchBuilder().arrays(plan.rows), model.cache)
