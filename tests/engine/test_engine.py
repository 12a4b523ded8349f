"""How requests end in the engine, with a scripted runner: stops, refusals and failures, none of which may spread."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest

from manylora.server.engine.engine import (
    AdaptersNeverFit,
    EngineDraining,
    EngineRefusal,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
)
from manylora.server.engine.request import (
    Request,
    SampledToken,
    SampleFailed,
    StepPlan,
    TokenEvent,
    TokenLogprob,
    TokenLogprobs,
)
from tests.engine.harness import EOS, A, Gate, Setup, events_of, finish_of, go, output, running
from tests.fakes import FakeSlots, Sampled, adapter, request, scripted

# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "params", "text", "reason", "stop"),
    [
        (["hello"], {"max_tokens": 5}, "hello", "length", None),
        (["hi", EOS, "more"], {}, "hi", "stop", None),
        (["hi", EOS, "more"], {"ignore_eos": True, "max_tokens": 5}, "himo", "length", None),
        (["hi!x"], {"stop_token_ids": (ord("!"),)}, "hi", "stop", ord("!")),
        (["hi!x"], {"stop_token_ids": (ord("!"),), "include_stop_str_in_output": True}, "hi!", "stop", ord("!")),
        (["hi END x"], {"stop": ("END", "?")}, "hi ", "stop", "END"),
        (["hi END x"], {"stop": ("END",), "include_stop_str_in_output": True}, "hi END", "stop", "END"),
        (["hi EN", EOS], {"stop": ("END",)}, "hi EN", "stop", None),
        (["hi EN"], {"stop": ("END",), "max_tokens": 5}, "hi EN", "length", None),
        (["hiEND"], {"stop": ("END",), "max_tokens": 5}, "hi", "stop", "END"),
        (["a", EOS, "b", EOS], {"min_tokens": 3}, "ab", "stop", None),
        (["aENDbEND"], {"stop": ("END",), "min_tokens": 4}, "aENDb", "stop", "END"),
        (["abEND"], {"stop": ("bEND",), "min_tokens": 2, "max_tokens": 5}, "abEND", "length", None),
        ([EOS], {}, "", "stop", None),
    ],
)
def test_how_a_request_ends(script: Any, params: Any, text: str, reason: str, stop: str | int | None) -> None:
    async def main() -> None:
        async with running(Setup(scripted(*script))) as setup:
            made = request(prompt=[1, 2, 3], **params)
            got, finish = await output(setup, made)
            assert (got, finish.reason, finish.stop_reason) == (text, reason, stop)
            assert (finish.prompt_tokens, finish.completion_tokens) == (3, len(made.output_token_ids))
            assert finish.error is None

    go(main())


def test_events_carry_every_token_and_its_logprobs() -> None:
    logprobs = TokenLogprobs(TokenLogprob(ord("x"), -0.5, 0), ())

    async def main() -> None:
        async with running(Setup(scripted(SampledToken(ord("x"), logprobs), "y"))) as setup:
            events = await events_of(setup.submit(request(max_tokens=2)))
            tokens = [event for event in events if isinstance(event, TokenEvent)]
            assert [i for event in tokens for i in event.token_ids] == [ord("x"), ord("y")]
            assert [one for event in tokens for one in event.logprobs] == [logprobs]

    go(main())


def test_output_does_not_depend_on_neighbours_chunks_or_preemptions() -> None:
    """Each request alone in a large engine, then all at once in a small one that must preempt."""
    rng = random.Random(0)
    adapters = [None, A, adapter("b"), adapter("c")]

    def requests() -> list[Request]:
        rng.seed(0)
        return [
            request(f"r{i}", [rng.randrange(100) for _ in range(rng.randint(1, 20))], max_tokens=rng.randint(1, 20),
                    adapter=rng.choice(adapters), priority=rng.choice([0, 1]))
            for i in range(25)
        ]  # fmt: skip

    async def main() -> None:
        async with running(Setup()) as setup:
            alone = [await output(setup, made) for made in requests()]
        small = Setup(max_rows=6, max_batch_tokens=8, num_pages=16, max_context=40, slots=FakeSlots(2, latency=2))
        async with running(small):
            together = await asyncio.gather(*(output(small, made) for made in requests()))
            assert small.engine.stats().preemptions > 0
        assert together == alone

    go(main())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refused_request_stays_the_callers() -> None:
    async def refuse(setup: Setup, made: Request, error: type[EngineRefusal], message: str) -> None:
        with pytest.raises(error, match=message):
            setup.engine.submit(made)  # without acquiring: the fake registry would notice a release

    async def main() -> None:
        async with running(Setup(max_context=50)) as setup:
            await refuse(
                setup, request(prompt=range(45), max_tokens=6, adapter=A), PromptTooLong, "45 tokens.* 51 .*50"
            )
            await refuse(setup, request(prompt=[]), InvalidRequest, "no tokens")
            await refuse(setup, request(max_tokens=-1), InvalidRequest, "max_tokens must not be negative, got -1")
            setup.scheduler._slots = None
            await refuse(setup, request(adapter=A), AdaptersNeverFit, "without adapters")

    go(main())


def test_a_full_queue_refuses_and_then_takes_again() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate, max_rows=2, max_waiting=3)) as setup:
            streams = [setup.submit(request(f"r{i}")) for i in range(5)]
            with pytest.raises(QueueFull, match="3 requests wait, 3 may") as refused:
                setup.engine.submit(request("more"))
            assert refused.value.retry_after >= 1
            gate.open()
            await asyncio.gather(*map(events_of, streams))
            assert (await finish_of(setup.submit(request("more")))).reason == "length"

    go(main())


def test_an_id_in_use_is_refused() -> None:
    gate = Gate()

    async def main() -> None:
        async with running(Setup(before_step=gate)) as setup:
            stream = setup.submit(request("same"))
            with pytest.raises(InvalidRequest, match="same is already running"):
                setup.engine.submit(request("same"))
            gate.open()
            await events_of(stream)
            await events_of(setup.submit(request("same")))

    go(main())


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failing_step_ends_its_own_requests_and_the_loop_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail(plan: StepPlan) -> None:
        if any(row.request.request_id == "bad" for row in plan.rows):
            raise RuntimeError("the device is on fire")

    async def main() -> None:
        async with running(Setup(before_step=fail, max_rows=1)) as setup:
            bad = setup.submit(request("bad", adapter=A))
            waiting = setup.submit(request("waiting"))
            finish = await finish_of(bad)
            assert (finish.reason, finish.completion_tokens) == ("error", 0)
            assert finish.error is not None
            assert "fire" not in finish.error, "a client must not see internals"
            assert (await finish_of(waiting)).reason == "length"

    go(main())
    assert "the device is on fire" in caplog.text


@pytest.mark.parametrize("bad", [SampleFailed("not finite"), None])
def test_a_row_that_cannot_be_sampled_ends_alone(bad: Sampled | None) -> None:
    def model(made: Request, tokens: Sequence[int]) -> Sampled:
        if made.request_id == "bad" and len(made.output_token_ids) == 2:
            return bad  # type: ignore[return-value]
        return SampledToken(ord("x"))

    async def main() -> None:
        async with running(Setup(model)) as setup:
            streams = [setup.submit(request(name, max_tokens=8)) for name in ("good", "bad")]
            good, broken = await asyncio.gather(*map(finish_of, streams))
            assert (good.reason, good.completion_tokens) == ("length", 8)
            assert (broken.reason, broken.completion_tokens) == ("error", 2)
            assert broken.error == ("not finite" if bad else broken.error)

    go(main())


def test_an_adapter_that_cannot_be_uploaded_ends_its_request_alone() -> None:
    async def main() -> None:
        async with running(Setup(slots=FakeSlots(2, refused=["a"]))) as setup:
            refused, other = await asyncio.gather(
                finish_of(setup.submit(request("r0", adapter=A))), finish_of(setup.submit(request("r1")))
            )
            assert (refused.reason, refused.error) == ("error", "a cannot be uploaded")
            assert other.reason == "length"

    go(main())


def test_a_failing_scheduler_ends_what_lives_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running(Setup()) as setup:
            real, calls = setup.scheduler.schedule, []

            def broken() -> StepPlan:
                calls.append(1)
                if len(calls) == 2:
                    raise RuntimeError("a bug")
                return real()

            monkeypatch.setattr(setup.scheduler, "schedule", broken)
            assert (await finish_of(setup.submit(request("r0")))).reason == "error"
            assert (await finish_of(setup.submit(request("r1")))).reason == "length"

    go(main())


def test_if_the_bookkeeping_fails_everything_ends_and_nothing_new_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Going on with pages that nobody can account for might mean wrong answers."""
    gate = Gate()

    async def main() -> None:
        setup = Setup(before_step=gate, max_rows=1)
        setup.engine.start()
        streams = [setup.submit(request(f"r{i}", adapter=A, max_tokens=1)) for i in range(3)]
        setup.slots.release = None  # type: ignore[assignment,method-assign]
        gate.open()
        ends = await asyncio.gather(*map(finish_of, streams))
        assert [end.reason for end in ends] == ["length", "error", "error"]
        await asyncio.to_thread(setup.engine._thread.join, 30)
        assert not setup.engine.is_healthy
        assert not setup.engine.is_draining, "a dead engine is not one that was told to end: /health must fail"
        with pytest.raises(EngineDraining):
            setup.engine.submit(request())
        assert setup.registry.references.total() == 0

    go(main())
    assert "the step loop has stopped" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_was_asked_for_beside_the_failure_is_answered() -> None:
    """A merge waits for its call on the loop; requests wait for their ends."""

    async def main() -> None:
        setup = Setup()
        setup.engine.start()

        def fail() -> None:
            raise RuntimeError("a bug")

        with setup.engine._condition:  # all taken in at once
            setup.engine._inbox.calls.append(fail)
            answer = setup.engine.call(lambda: "done")
        assert await asyncio.wait_for(asyncio.wrap_future(answer), 30) == "done"
        await asyncio.to_thread(setup.engine._thread.join, 30)

    go(main())


def test_a_leak_is_noticed_when_idle(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        setup = Setup()
        setup.engine.start()
        await events_of(setup.submit(request()))
        setup.scheduler.pool.allocate(1)
        await events_of(setup.submit(request()))
        with pytest.raises(RuntimeError, match="1 are in use, but requests hold 0"):
            await setup.engine.close()

    go(main())
    assert "integrity check failed" in caplog.text
