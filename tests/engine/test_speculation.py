"""With drafts and without: the same tokens, log-probabilities, texts and ends, to the bit, whatever is drafted.

The engine with a small real decoder on the CPU. Drafters here know what will be drawn, because it was drawn before
without them, and lie at random: so drafts are accepted and rejected at every place, under any sampling.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from manylora.adapters.versions import AdapterRef
from manylora.kernels.cpu import available
from manylora.kernels.cpu.replay import Recordings
from manylora.kernels.lora import BatchedLora
from manylora.kernels.lora_pool import LoraPool
from manylora.server.engine.constraint import Grammar
from manylora.server.engine.drafter import Drafter
from manylora.server.engine.engine import Engine
from manylora.server.engine.grammar.token_rules import TokenRules
from manylora.server.engine.metrics import Metrics
from manylora.server.engine.ngram_drafter import NgramDrafter
from manylora.server.engine.request import (
    STEP_FAILED,
    AdapterUse,
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
from manylora.server.model.merged import merge_adapter
from manylora.server.model.synthetic import synthetic_adapter, synthetic_base, synthetic_spec
from tests.engine.grammar_cases import EOS, compiled
from tests.engine.harness import go
from tests.fakes import FakeSlots, FakeTokenizer
from tests.kernels.test_prepared_linear import OPS
from tests.model.merged_model import with_weights

pytestmark = pytest.mark.skipif(not available(), reason="needs the CPU kernels: others' bits depend on the batch")

SPEC = synthetic_spec("tiny", vocab_size=272)
A, B = AdapterRef("a", "a" * 64), AdapterRef("b", "b" * 64)
SLOTS = {A.version: 0, B.version: 1}


class FixedSlots(FakeSlots):
    """The adapters have always been on the device."""

    def acquire(self, ref: AdapterRef) -> int:
        self.references[ref.version] += 1
        return SLOTS[ref.version]

    def resident(self) -> list[AdapterRef]:
        return [A, B]


@dataclass(eq=False)
class Merged:
    """As much of a ``MergedModel`` as the runner and the step loop use."""

    decoder: Decoder
    graphs: Any = None
    identity: int = 1

    def release(self) -> None: ...


class Model:
    """Adapters in slots 0 and 1, and the first of them merged."""

    def __init__(self) -> None:
        ops = OPS["numba"]()
        self.ops = ops
        pool = LoraPool(SPEC.lora_shapes(), max_slots=2, max_pages=3, dtype=ops.dtype, device=ops.device)
        adapters = [
            synthetic_adapter(pool.shapes, 8, seed=1),
            synthetic_adapter(pool.shapes, 20, seed=2, projections=("q", "v", "lm_head", "embed")),
        ]
        for slot, weights in enumerate(adapters):
            pool.write(slot, weights)
        base = DecoderWeights.prepare(SPEC, synthetic_base(SPEC), ops, max_context=512)
        self.decoder = Decoder(SPEC, base, ops, BatchedLora(pool))
        self.merged = Merged(with_weights(self.decoder, merge_adapter(self.decoder, adapters[0], "compact")))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@dataclass
class Asked:
    """A request as it is asked for, with speculation or without."""

    prompt: Sequence[int]
    params: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    merged: Any = None
    grammar: Grammar | None = None

    def request(self, number: int, drafter: Drafter | None) -> Request:
        return Request(
            f"r{number}", list(self.prompt), self.params, self.adapters, merged=self.merged, drafter=drafter,
            constraint=None if self.grammar is None else self.grammar.start(),
        )  # fmt: skip


Answer = tuple[TokenEvent, FinishEvent]


@dataclass
class Ran:
    answers: list[Answer]
    drafted: int
    accepted: int
    preemptions: int
    plans: list[StepPlan] = field(repr=False)

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        return [tokens.token_ids for tokens, _ in self.answers]


class Liar:
    """Proposes what will be drawn; each token is another one in so many of a hundred cases."""

    def __init__(self, truth: Sequence[int], seed: int, lies: int = 30, most: int = 5) -> None:
        self.truth, self.lies, self.most, self.seed = truth, lies, most, seed

    def propose(self, prompt: Sequence[int], output: Sequence[int], limit: int) -> list[int]:
        rng = random.Random(f"{self.seed} {len(output)}")
        known = self.truth[len(output) : len(output) + min(limit, rng.randint(0, self.most))]
        return [rng.randrange(272) if rng.randrange(100) < self.lies else token for token in known]

    def judge(self, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted
        assert drafted > 0


def run(
    model: Model,
    asked: Sequence[Asked],
    drafters: Sequence[Drafter | None] | None = None,
    abort: int | None = None,
    **limits: int,
) -> Ran:
    """All requests, submitted together; ``abort``: the one that is aborted in the middle."""
    config = SchedulerConfig(
        **{"max_rows": 8, "max_batch_tokens": 64, "num_pages": 120, "max_context": 400, "drafts_up_to": 48, **limits}
    )
    scheduler = Scheduler(config, FixedSlots(2))
    metrics = Metrics("base")
    cache = KVCache(SPEC, config.num_pages, model.ops)
    for tensors in cache.layers:
        for tensor in tensors:
            tensor.view(torch.uint8).fill_(255)  # NaN, as values and as scales: what is read before it is written shows
    runner = ModelRunner(model.decoder, cache, Sampler(SPEC.vocab_size, eos_token_ids=[EOS]))
    plans: list[StepPlan] = []
    execute = runner.execute

    def watched(plan: StepPlan) -> Any:
        plans.append(plan)
        scheduler.check_integrity()
        return execute(plan)

    runner.execute = watched  # type: ignore[method-assign]
    engine = Engine(runner, scheduler, vocabulary=FakeTokenizer(), metrics=metrics, eos_token_ids=[EOS], strict=True)
    requests = [one.request(i, drafters[i] if drafters else None) for i, one in enumerate(asked)]
    answers: list[Answer] = []

    async def main() -> None:
        streams = [engine.submit(request) for request in requests]
        engine.start()
        if abort is not None:
            async for _event in streams[abort]:
                break
            streams[abort].abort()
        for i, stream in enumerate(streams):
            if i != abort:
                answers.append(await stream.result())
        await engine.drain(30)
        await engine.close()
        assert scheduler.pool.num_used == 0

    go(main())
    assert all(finish.error != STEP_FAILED for _, finish in answers)
    return Ran(answers, metrics._drafted, metrics._accepted, scheduler.counts.preemptions, plans)


def liars(without: Ran, seed: int, **kwargs: int) -> list[Drafter]:
    return [Liar(tokens, seed + i, **kwargs) for i, tokens in enumerate(without.tokens)]


def assert_same(model: Model, asked: Sequence[Asked], seed: int = 0, **limits: int) -> tuple[Ran, Ran]:
    without = run(model, asked, **limits)
    drafting = run(model, asked, liars(without, seed), **limits)
    assert without.drafted == 0
    assert drafting.answers == without.answers
    return without, drafting


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampling": {"temperature": 1.0},
    "cold": {"temperature": 0.3, "top_p": 0.8},
    "truncated": {"temperature": 1.5, "top_k": 20, "min_p": 0.01},
    "penalties": {"temperature": 0.6, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "greedy with penalties": {"temperature": 0.0, "frequency_penalty": 1.5},
    "bias": {"temperature": 0.5, "logit_bias": {7: 3.0, 90: 2.5, 12: -100.0}},
    "min_tokens": {"temperature": 0.8, "min_tokens": 9, "stop_token_ids": tuple(range(0, 256, 5)),
                   "logit_bias": {EOS: 9}},
    "stop tokens": {"temperature": 0.8, "stop_token_ids": tuple(range(0, 256, 9))},
    "end of sequence": {"temperature": 0.9, "logit_bias": {EOS: 3.0}},
    "ignored end": {"temperature": 0.9, "logit_bias": {EOS: 3.0}, "ignore_eos": True},
    "logprobs": {"temperature": 0.9, "logprobs": 4},
    "greedy logprobs": {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 2},
}  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLING)
def test_one_row(model: Model, sampling: str) -> None:
    drafted = accepted = 0
    for seed in range(6):
        params = SamplingParams(max_tokens=30 + seed, seed=seed, **SAMPLING[sampling])
        _, drafting = assert_same(model, [Asked(prompt(seed, 3 + 9 * seed), params)], seed)
        drafted, accepted = drafted + drafting.drafted, accepted + drafting.accepted
    assert 0 < accepted < drafted, "drafts must be accepted and rejected, or nothing was tested"


def everybody(model: Model, seed: int, max_tokens: int = 25) -> list[Asked]:
    """Base, adapters, compositions and merged rows, each sampled in another way."""
    uses: list[tuple[AdapterUse, ...]] = [
        (),
        (AdapterUse(A),),
        (AdapterUse(B, 0.5),),
        (AdapterUse(A, 0.7), AdapterUse(B, 0.3)),
        (AdapterUse(A),),
        (AdapterUse(B), AdapterUse(A, -1.0)),
    ]
    asked = []
    for i, name in enumerate(SAMPLING):
        params = SamplingParams(max_tokens=max_tokens, seed=seed + i, **SAMPLING[name])
        merged = model.merged if i % len(uses) == 4 else None
        asked.append(Asked(prompt(seed + i, 2 + 7 * (i % 5)), params, uses[i % len(uses)], merged))
    return asked


@pytest.mark.parametrize("seed", range(3))
def test_mixed_batches(model: Model, seed: int) -> None:
    """More requests than rows, so that prompts begin while others decode."""
    _, drafting = assert_same(model, everybody(model, 100 * seed), seed)
    assert 0 < drafting.accepted < drafting.drafted
    mixed = [plan for plan in drafting.plans if any(row.drafts for row in plan.rows)]
    assert any(any(not row.drafts for row in plan.rows) for plan in mixed)


def test_others_do_not_notice(model: Model) -> None:
    """Every second row speculates."""
    asked = everybody(model, 7)
    without = run(model, asked)
    some: list[Drafter | None] = [drafter if i % 2 else None for i, drafter in enumerate(liars(without, 3))]
    drafting = run(model, asked, some)
    assert drafting.answers == without.answers
    assert drafting.accepted > 0


@pytest.mark.parametrize("seed", range(3))
def test_preemption_in_the_middle(model: Model, seed: int) -> None:
    """So few pages that running requests are preempted; drafts are no reason for more of that."""
    asked = everybody(model, 50 + seed, max_tokens=45)[:10]
    without, drafting = assert_same(model, asked, seed, num_pages=12, max_context=160)
    assert without.preemptions > 0
    assert drafting.preemptions > 0
    assert drafting.accepted > 0


@pytest.mark.parametrize("pages", [120, 40], ids=["much memory", "little memory"])
def test_beside_a_prefix_cache(model: Model, pages: int) -> None:
    """Everything is asked twice, the second time as a next turn: what accepted drafts left in the cache is what the
    tokens would have left there."""
    first = everybody(model, 11)
    without = run(model, first)
    turns = [
        replace(one, prompt=[*one.prompt, *tokens, 5, 6, 7]) for one, tokens in zip(first, without.tokens, strict=True)
    ]
    plain = run(model, [*first, *turns])
    cached = run(model, [*first, *turns], liars(plain, 2, lies=15), num_pages=pages, prefix_cache=True)
    assert [(t, replace(finish, cached_tokens=0)) for t, finish in cached.answers] == plain.answers
    assert cached.accepted > 0
    assert sum(finish.cached_tokens for _, finish in cached.answers) > 0


@pytest.mark.parametrize("cached", [False, True], ids=["no prefix cache", "prefix cache"])
def test_steps_with_drafts_are_run_from_recordings(model: Model, monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    """With the bits of steps that are queued anew, log-probabilities among them."""
    asked = everybody(model, 60)
    asked += [replace(one, prompt=[*one.prompt, 9, 9]) for one in asked]
    without = run(model, asked, prefix_cache=cached)
    hits = 0
    record = Recordings.run

    def watched(self: Recordings, *of_a_step: Any) -> torch.Tensor:
        nonlocal hits
        before = self.hits
        result = record(self, *of_a_step)
        hits += self.hits - before
        return result

    with monkeypatch.context() as patched:
        patched.setattr(Recordings, "run", watched)
        recorded = run(model, asked, liars(without, 5), prefix_cache=cached)
    monkeypatch.setattr(Decoder, "_may_be_recorded", lambda *_: False)
    queued = run(model, asked, liars(without, 5), prefix_cache=cached)
    assert recorded.answers == queued.answers
    assert recorded.tokens == without.tokens
    # More than there are computations without drafts: two decoders, the base's and the merged one.
    assert hits > 2 * sum(not any(row.drafts for row in plan.rows) for plan in recorded.plans)


def test_an_abort_in_the_middle(model: Model) -> None:
    asked = everybody(model, 30)
    without = run(model, asked)
    drafting = run(model, asked, liars(without, 1), abort=1)
    assert drafting.answers == without.answers[:1] + without.answers[2:]


def test_stop_strings_within_accepted_drafts(model: Model) -> None:
    """A stop string of two tokens, each found at every place of a draft; with text behind it that must not come."""
    params = SamplingParams(max_tokens=24, temperature=0.9, seed=5)
    ((tokens, _),) = run(model, [Asked(prompt(1, 9), params)]).answers
    ended_within = 0
    for at in range(2, 20):
        for included in (False, True):
            stop = (tokens.text[at : at + 2],)
            asked = [Asked(prompt(1, 9), replace(params, stop=stop, include_stop_str_in_output=included))]
            without = run(model, asked)
            # It drafts beyond the end, as it knows what would follow.
            drafting = run(model, asked, [Liar(tokens.token_ids, at, lies=0)])
            assert drafting.answers == without.answers
            assert drafting.answers[0][1].stop_reason == stop[0]
            ended_within += drafting.accepted > 0
    assert ended_within > 20


GRAMMARS: dict[str, Callable[[], Grammar]] = {
    "regex": lambda: compiled("regex", r"([a-z]{2,5} ){3}[0-9]+\."),
    "json": lambda: compiled("json_schema", '{"type": "array", "items": {"type": "integer"}, "maxItems": 6}'),
    "rules": lambda: TokenRules(allowed=range(60, 110), banned=[[70], [65, 66], [80, 81, 82]]),
    "rules on a regex": lambda: TokenRules(banned=[[97], [98, 98]], grammar=compiled("regex", "[a-d ]{10,40}")),
}


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_grammars(model: Model, grammar: str, temperature: float) -> None:
    made = GRAMMARS[grammar]()
    accepted = 0
    for seed in range(3):
        params = SamplingParams(max_tokens=30, seed=seed, temperature=temperature, logprobs=1)
        asked = [Asked(prompt(seed + i, 8), params, grammar=made if i < 3 else None) for i in range(4)]
        _, drafting = assert_same(model, asked, seed)
        accepted += drafting.accepted
    assert accepted > 0


def test_a_request_that_no_token_is_left_for_fails_at_the_same_place(model: Model) -> None:
    """Its grammar allows nothing after some tokens: those before came."""
    params = SamplingParams(max_tokens=20, temperature=0.7, seed=1, logit_bias={EOS: -100.0})
    grammar = TokenRules(allowed=[97, 98], banned=[[97] * 3, [97, 98], [98, 97], [98] * 3])
    asked = [Asked(prompt(3, 5), params, grammar=grammar), Asked(prompt(4, 5), params)]
    without, drafting = assert_same(model, asked)
    assert without.answers[0][1].reason == "error"
    assert len(without.tokens[0]) == 2
    assert drafting.accepted > 0


def test_ngram_drafts_of_a_text_that_repeats_itself(model: Model) -> None:
    """The real drafter, on greedy outputs that run into loops: fewer steps, the same tokens."""
    params = SamplingParams(max_tokens=120, temperature=0.0, logprobs=1)
    asked = [Asked(prompt(seed, 12), params, (AdapterUse(A),) if seed % 2 else ()) for seed in range(4)]
    without = run(model, asked)
    drafting = run(model, asked, [NgramDrafter(6) for _ in asked])
    assert drafting.answers == without.answers
    assert drafting.accepted > 60
    assert len(drafting.plans) < len(without.plans)


def test_choices_of_one_prompt(model: Model) -> None:
    """``n`` = 4: one prompt, four seeds."""
    params = SamplingParams(max_tokens=30, temperature=0.9)
    asked = [Asked(prompt(8, 20), replace(params, seed=11 + choice), (AdapterUse(B),)) for choice in range(4)]
    without, _ = assert_same(model, asked)
    assert len(set(without.tokens)) == 4


def test_sampling_without_a_seed_draws_from_the_same_distribution(model: Model) -> None:
    """Nothing of it is special: the seed is drawn when the request is made, and then it is as above."""
    asked = Asked(prompt(2, 6), SamplingParams(max_tokens=12, temperature=1.0))
    first = asked.request(0, None)
    again = replace(asked, params=replace(asked.params, seed=first.sampling_seed))
    assert again.request(0, None).sampling_seed == first.sampling_seed
    assert_same(model, [again])


def test_no_draft_goes_beyond_max_tokens(model: Model) -> None:
    """Nor beyond the context: a request that fills it to the last token."""
    asked = [Asked(prompt(2, 10), SamplingParams(max_tokens=22, temperature=0.0))]
    without = run(model, asked, max_context=32, num_pages=2)
    for seed in range(6):
        liar = Liar(without.tokens[0] + (1,) * 9, seed, lies=0, most=9)
        drafting = run(model, asked, [liar], max_context=32, num_pages=2)
        assert drafting.answers == without.answers
        last = max(row.start + row.count for plan in drafting.plans for row in plan.rows)
        assert last <= 31, "the last token drawn is never computed, nor is a draft that could not be drawn"


def test_logits_of_drafts_are_those_of_steps_of_one_token(model: Model) -> None:
    """Of the runner alone: rows with drafts beside a prompt and merged rows, against one token at a time."""
    cache = KVCache(SPEC, 40, model.ops)
    runner = ModelRunner(model.decoder, cache, Sampler(SPEC.vocab_size))

    def made(i: int, merged: Any = None) -> Request:
        request = Asked(prompt(i, 14 + i), SamplingParams(), (AdapterUse(A),), merged).request(i, None)
        request.pages, request.slots = [4 * i, 4 * i + 1, 4 * i + 2], () if merged else (0,)
        return request

    one, two = made(0), made(1, model.merged)
    runner.logits(StepPlan((ScheduledRow(one, 0, 13), ScheduledRow(two, 0, 14))))
    drafts = (5, 6, 7, 8)
    other = made(2)
    together = runner.logits(
        StepPlan((ScheduledRow(one, 13, 5, drafts), ScheduledRow(other, 0, 16), ScheduledRow(two, 14, 3, drafts[:2])))
    )
    assert together.shape[0] == 5 + 1 + 3
    for i, request in ((0, one), (6, two)):
        for j in range(5 if request is one else 3):
            if j:
                request.output_token_ids.append(drafts[j - 1])
            alone = runner.logits(StepPlan((ScheduledRow(request, request.num_tokens - 1, 1),)))
            assert torch.equal(together[i + j], alone[0])
