"""Log-probabilities of prompts: a token has the very bits it has when it is drawn, however its prompt was computed, and
nobody else notices."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
import torch

from manylora.adapters.versions import AdapterRef
from manylora.kernels.cpu import available
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.kernels.ops import Ops
from manylora.kernels.torch_ops import TorchOps
from manylora.server.engine import prompt_logprobs
from manylora.server.engine.batch import build_batch
from manylora.server.engine.engine import Engine
from manylora.server.engine.logprobs import score_on_host
from manylora.server.engine.metrics import Metrics
from manylora.server.engine.request import (
    AdapterUse,
    Event,
    FinishEvent,
    Request,
    SamplingParams,
    ScheduledRow,
    StepPlan,
    TokenEvent,
)
from manylora.server.engine.runner import ModelRunner
from manylora.server.engine.sampler import Sampler
from manylora.server.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from manylora.server.model.decoder import Decoder
from manylora.server.model.decoder_weights import DecoderWeights
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base, synthetic_spec
from tests.engine.harness import go
from tests.fakes import FakeTokenizer

SPEC: Final = synthetic_spec("tiny")
SHAPES: Final = SPEC.lora_shapes()
REFS: Final = [AdapterRef(name, str(i) * 64) for i, name in enumerate(("all", "head"))]
POISON: Final = 7
"""A token whose embedding is not a number, where a test asks for that."""


class FixedSlots:
    """Both adapters are always in their slots."""

    def never_together(self, refs: Collection[AdapterRef], /) -> str | None:
        return None

    def acquire(self, ref: AdapterRef) -> int | None:
        return REFS.index(ref)

    def awaits_read(self, ref: AdapterRef) -> bool:
        return False

    def prefetch(self, ref: AdapterRef) -> None: ...
    def release(self, ref: AdapterRef) -> None: ...
    def drop(self, ref: AdapterRef) -> None: ...
    def resident(self) -> list[AdapterRef]:
        return REFS

    def resident_versions(self) -> set[str]:
        return {ref.version for ref in REFS}

    def check_integrity(self, *, idle: bool = False) -> None: ...


class Model:
    """A tiny decoder with its runner and two adapters, one of them on lm_head."""

    def __init__(self, ops: Ops, *, n_pages: int = 64, poisoned: bool = False) -> None:
        pool = LoraPool(SHAPES, max_slots=2, max_pages=4, max_rank=32, device=ops.device)
        pool.write(0, synthetic_adapter(SHAPES, 8, seed=1))
        pool.write(1, synthetic_adapter(SHAPES, 20, seed=2, projections=("q", "down", "lm_head")))
        base = synthetic_base(SPEC)
        if poisoned:
            embed = base.embed.clone()
            embed[POISON] = math.nan
            base = replace(base, embed=embed)
        weights = DecoderWeights.prepare(SPEC, base, ops, max_context=128)
        self.decoder = Decoder(SPEC, weights, ops, BatchedLora(pool))
        self.cache = KVCache(SPEC, n_pages, ops)
        self.runner = ModelRunner(self.decoder, self.cache, Sampler(SPEC.vocab_size, eos_token_ids=[0]))
        self.n_pages = n_pages

    def engine(self, **limits: int) -> Engine:
        config = SchedulerConfig(**{"max_context": 128, "num_pages": self.n_pages, "max_rows": 8, **limits})
        scheduler = Scheduler(config, FixedSlots())
        return Engine(
            self.runner,
            scheduler,
            vocabulary=FakeTokenizer(),
            metrics=Metrics("base"),
            eos_token_ids=[0],
            strict=True,
        )


def implementations() -> list[str]:
    return ["torch", "cpu"] if available() else ["torch"]


@pytest.fixture(params=implementations())
def ops(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param)


def make_ops(name: str) -> Ops:
    if name == "torch":
        return TorchOps(torch.device("cpu"), torch.float32, resident=True)
    from manylora.kernels.cpu.ops import NumbaOps

    return NumbaOps()


def exact_ops() -> Ops:
    """Whose results for a row do not depend on the rows beside it."""
    if not available():
        pytest.skip("the CPU kernels need AVX2, FMA and numba")
    return make_ops("cpu")


def tokens_of(length: int, seed: int) -> list[int]:
    """Random, none of which ends a sequence or is the poisoned one."""
    rng = random.Random(seed)
    return [rng.randrange(POISON + 1, SPEC.vocab_size) for _ in range(length)]


def ask(name: str, prompt: Sequence[int], adapter: int | None = None, **params: Any) -> Request:
    uses = () if adapter is None else (AdapterUse(REFS[adapter]),)
    return Request(name, list(prompt), SamplingParams(**{"temperature": 0.0, **params}), adapters=uses)


async def answers(engine: Engine, requests: Sequence[Request]) -> list[tuple[TokenEvent, FinishEvent]]:
    engine.start()
    try:
        return await asyncio.gather(*(engine.submit(request).result() for request in requests))
    finally:
        await engine.close()


def run(model: Model, requests: Sequence[Request], **limits: int) -> list[TokenEvent]:
    found: list[TokenEvent] = []

    async def main() -> None:
        for tokens, finish in await answers(model.engine(**limits), requests):
            assert finish.reason == "length", finish
            found.append(tokens)

    go(main())
    return found


# --- what is drawn and what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 40, 512])
@pytest.mark.parametrize("adapter", [None, 0, 1])
def test_a_prompt_tokens_logprobs_are_those_of_drawing_it(chunk: int, adapter: int | None) -> None:
    """To the bit: generate, then give prompt and output as a prompt, in chunks of any size, beside other prompts."""
    model = Model(exact_ops())
    prompt, n_output = tokens_of(9, 1), 70
    [drawn] = run(model, [ask("draw", prompt, adapter, max_tokens=n_output, logprobs=3, ignore_eos=True)])
    replay = [*prompt, *drawn.token_ids]
    others = [ask(f"other-{i}", tokens_of(13 * i + 2, i), i % 2, max_tokens=4, prompt_logprobs=i) for i in range(3)]
    read = run(
        model,
        [ask("read", replay, adapter, max_tokens=1, prompt_logprobs=3), *others],
        max_rows=min(8, chunk),
        max_batch_tokens=chunk,
    )
    assert len(drawn.logprobs) == n_output
    assert read[0].prompt_logprobs[0] is None
    assert read[0].prompt_logprobs[len(prompt) :] == drawn.logprobs
    assert [one.sampled.token_id for one in read[0].prompt_logprobs[1:] if one is not None] == replay[1:]
    for i, other in enumerate(others):
        [alone] = run(model, [ask("alone", other.prompt_token_ids, i % 2, max_tokens=4, prompt_logprobs=i)])
        assert read[i + 1] == alone
        assert [len(one.top) for one in alone.prompt_logprobs if one is not None] == [i] * (13 * i + 1)


def test_others_have_the_same_bits_beside_who_asks(ops: Ops) -> None:
    """Tokens and log-probabilities of base rows and both adapters, in steps where a prompt asks and where none does."""
    model = Model(ops)

    def group(k: int | None) -> list[Request]:
        asking = ask("asking", tokens_of(50, 9), 1, max_tokens=2, prompt_logprobs=k)
        rest = [ask(f"r{i}", tokens_of(6 + i, i), which, max_tokens=20, logprobs=2, temperature=1.0, seed=i)
                for i, which in enumerate((None, 0, 1))]  # fmt: skip
        return [*rest, asking]

    without, beside = run(model, group(None), max_batch_tokens=8), run(model, group(2), max_batch_tokens=8)
    assert without[:3] == beside[:3]
    assert without[3] == replace(beside[3], prompt_logprobs=())
    assert len(beside[3].prompt_logprobs) == 50


def test_a_preempted_request_has_all_of_them_once() -> None:
    """With pages for some of the requests only: what was preempted in its prompt or later is computed anew."""
    roomy, tight = Model(exact_ops()), Model(exact_ops(), n_pages=8)

    def group() -> list[Request]:
        return [ask(f"r{i}", tokens_of(30, i), i % 2, max_tokens=30, prompt_logprobs=2, ignore_eos=True)
                for i in range(4)]  # fmt: skip

    requests = group()
    got = run(tight, requests, max_batch_tokens=16)
    assert sum(request.num_preemptions for request in requests) > 0
    assert got == run(roomy, group())
    assert [len(tokens.prompt_logprobs) for tokens in got] == [30] * 4


def test_a_prompt_that_is_given_up_halfway_goes_on_from_what_is_known() -> None:
    """As the scheduler preempts: other pages, from the first token on, in other chunks; then again when it is done."""
    model = Model(exact_ops())

    def compute(request: Request, first_page: int, *bounds: int) -> None:
        request.pages = list(range(first_page, first_page + 6))
        for start, end in zip((0, *bounds), bounds, strict=False):
            model.runner.execute(StepPlan((ScheduledRow(request, start, end - start),)))

    whole, broken = (ask(name, tokens_of(90, 9), 1, prompt_logprobs=3) for name in ("whole", "broken"))
    whole.slots = broken.slots = (1,)
    compute(whole, 0, 90)
    compute(broken, 6, 3, 4, 37)
    assert len(broken.prompt_logprobs) == 38
    compute(broken, 12, 20, 41, 89, 90)
    assert broken.prompt_logprobs == whole.prompt_logprobs
    assert len(broken.prompt_logprobs) == 90
    broken.output_token_ids = [9, 10]
    compute(broken, 6, 50, 92)
    assert broken.prompt_logprobs == whole.prompt_logprobs


def test_logits_are_made_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(exact_ops())
    prompt = tokens_of(100, 3)
    [whole] = run(model, [ask("r", prompt, 1, max_tokens=1, prompt_logprobs=4)])
    monkeypatch.setattr(prompt_logprobs, "PIECE", 7)
    made: list[int] = []
    logits = model.decoder.logits

    def counted(x: torch.Tensor, batch: Any, rows: torch.Tensor | None) -> torch.Tensor:
        found = logits(x, batch, rows)
        made.append(found.shape[0])
        return found

    monkeypatch.setattr(model.decoder, "logits", counted)
    [pieces] = run(model, [ask("r", prompt, 1, max_tokens=1, prompt_logprobs=4)])
    assert pieces == whole
    assert max(made) == 7
    assert sum(made) == 99 + 1


def test_they_come_with_the_first_event_alone() -> None:
    async def main() -> None:
        engine = Model(exact_ops()).engine(max_batch_tokens=8)
        engine.start()
        events: list[Event] = []
        async for event in engine.submit(ask("r", tokens_of(20, 1), max_tokens=3, prompt_logprobs=0, ignore_eos=True)):
            events.append(event)
            await asyncio.sleep(0)
        await engine.close()
        lengths = [len(event.prompt_logprobs) for event in events if isinstance(event, TokenEvent)]
        assert lengths[0] == 20
        assert not any(lengths[1:])

    go(main())


def test_a_prompt_of_one_token_has_nothing_before_it() -> None:
    [tokens] = run(Model(exact_ops()), [ask("r", [9], max_tokens=2, prompt_logprobs=5)])
    assert tokens.prompt_logprobs == (None,)


@pytest.mark.parametrize("k", [None, 1])
def test_no_tokens_may_be_asked_for(k: int | None) -> None:
    """The prompt is computed and nothing drawn; a prompt may then be as long as the context."""
    model, prompt = Model(exact_ops()), tokens_of(128, 4)
    [tokens] = run(model, [ask("r", prompt, 0, max_tokens=0, logprobs=1, prompt_logprobs=k)], max_batch_tokens=50)
    assert (tokens.text, tokens.token_ids, tokens.logprobs) == ("", (), ())
    if k is None:
        assert tokens.prompt_logprobs == ()
    else:
        [expected] = run(model, [ask("r", prompt[:-1], 0, max_tokens=1, prompt_logprobs=k)])
        assert tokens.prompt_logprobs[:-1] == expected.prompt_logprobs
        assert len(tokens.prompt_logprobs) == 128


def test_a_prompt_that_gives_no_numbers_ends_its_request_alone(ops: Ops) -> None:
    async def main() -> None:
        prompt = tokens_of(40, 1)
        prompt[3] = POISON
        model = Model(ops, poisoned=True)
        bad = ask("bad", prompt, max_tokens=1, prompt_logprobs=1)
        good = ask("good", tokens_of(40, 2), 1, max_tokens=1, prompt_logprobs=1)
        (_, error), (tokens, finish) = await answers(model.engine(max_batch_tokens=16), [bad, good])
        assert error.reason == "error"
        assert error.error is not None
        assert "not finite (largest logit: nan)" in error.error
        assert bad.num_computed < 40, "it ends at once, not after the rest of its prompt"
        assert finish.reason == "length"
        assert len(tokens.prompt_logprobs) == 40

    go(main())


def test_beside_graphs_and_of_a_prompt_of_two_tokens() -> None:
    """On CUDA (or in Triton's interpreter) rows that decode are computed by graphs, prompts are not: the last row of a
    prompt, which is a decode step to look at, has nothing to tell."""
    pytest.importorskip("triton")
    from tests.engine.test_decode_graphs import Runner
    from tests.model.cuda_model import DEVICE, FP32_ROUNDINGS, request

    runner = Runner()
    asking, short = request(0, 4, 0), request(1, 2, None)
    for one in (asking, short):
        one.params = replace(one.params, prompt_logprobs=2)
        one.prompt_logprobs.append(None)
    runner.step(ScheduledRow(asking, 0, 3), ScheduledRow(short, 0, 1))
    runner.step(ScheduledRow(asking, 3, 1), ScheduledRow(short, 1, 1))
    assert runner.seen == [2]
    rows = tuple(ScheduledRow(one, 0, len(one.prompt_token_ids)) for one in (short, asking))
    with torch.inference_mode():
        batch = build_batch(StepPlan(rows), DEVICE)
        together = runner.model.decoder.forward(replace(batch, sample_rows=None), runner.model.cache).double().cpu()
    for one, logits in ((short, together[:2]), (asking, together[2:])):
        exact = logits.log_softmax(-1)
        assert len(one.prompt_logprobs) == len(one.prompt_token_ids)
        for i, given in enumerate(one.prompt_logprobs[1:]):
            assert given is not None
            assert given.sampled.token_id == one.prompt_token_ids[i + 1]
            for t in (given.sampled, *given.top):
                assert t.logprob == pytest.approx(
                    float(exact[i, t.token_id]), abs=2 * FP32_ROUNDINGS * float(logits.abs().max())
                )
            assert len(given.top) == 2


def test_merged_weights_tell_of_their_own_prompts() -> None:
    """A request bound to merged weights reads its prompt by them, beside one that is not."""
    exact_ops()
    from tests.engine.test_merged_rows import REFS as MERGED_REFS
    from tests.engine.test_merged_rows import Server, in_order
    from tests.kernels.test_prepared_linear import OPS
    from tests.model.merged_model import logits as logits_of

    server = Server(OPS["numba"]())
    server.merges.merge("adapter-0", "compact")
    merged = server.merges.bind(MERGED_REFS[0])
    assert merged is not None
    requests = [server.request(0, 30, merged), server.request(0, 30), server.request(None, 30)]
    for one in requests:
        one.params = replace(one.params, prompt_logprobs=1)
        one.prompt_logprobs.append(None)
    for start in (0, 13):
        server.runner.execute(in_order([ScheduledRow(one, start, (13, 17)[start > 0]) for one in requests]))
    merged_logits = logits_of(merged.decoder, requests[0].prompt_token_ids)
    base_logits = logits_of(server.decoder, requests[2].prompt_token_ids)
    for one, logits in ((requests[0], merged_logits), (requests[2], base_logits)):
        tokens = one.prompt_token_ids[1:]
        assert one.prompt_logprobs[1:] == score_on_host(logits[:-1], tokens, [1] * 29, np.empty(320, np.float32))
    assert requests[0].prompt_logprobs != requests[1].prompt_logprobs
    merged.release()


def test_a_gap_is_an_error_of_the_engine() -> None:
    """What somebody else computed has no logits here; nothing must be told of the tokens after it as if it had."""
    model = Model(exact_ops())
    one = ask("r", tokens_of(40, 1), prompt_logprobs=1)
    one.pages = [0, 1, 2]
    with pytest.raises(RuntimeError, match="log-probabilities of 1 prompt tokens, but is computed from position 16 on"):
        model.runner.execute(StepPlan((ScheduledRow(one, 16, 24),)))
