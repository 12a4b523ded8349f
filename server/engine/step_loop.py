"""The step loop's own half of the engine: the requests that live, and what a step does to them.

Only the step loop's thread comes here; ``engine.Engine`` is the half that other threads see.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.constraint import ConstraintFailed
from manylora.server.engine.detokenizer import Detokenizer
from manylora.server.engine.metrics import Metrics
from manylora.server.engine.request import (
    STEP_FAILED,
    FinishEvent,
    FinishReason,
    Request,
    RequestState,
    RequestTimes,
    SampledToken,
    SampleFailed,
    ScheduledRow,
    StepPlan,
    TokenEvent,
    TokenLogprobs,
)
from manylora.server.engine.scheduling.scheduler import Scheduler
from manylora.server.engine.stream import Delivery, Mailbox, RequestStream, joined

_log = logging.getLogger(__name__)

_NAMES_EVERY_S: Final = 0.1
"""How old ``StepLoop.adapter_names`` may be."""


class Runner(Protocol):
    """Computes steps. ``server.engine.runner`` is the real one, ``tests/fakes.py`` has a scripted one."""

    def execute(self, plan: StepPlan) -> Mapping[str, SampledToken | SampleFailed]:
        """Run the step; by request id, the next token of each row that has ``sample``, and a failure for any row that
        cannot go on. Adds to ``Request.prompt_logprobs`` of those that ask for them. May raise anything."""

    def draw_on(self, requests: Sequence[Request]) -> Mapping[str, SampledToken | SampleFailed]:
        """The token after the last one of each, which was drawn from this step's logits, was the row's draft for that
        place, and has been appended; by request id. May raise anything."""


class Releaser(Protocol):
    """What the engine needs of ``adapters.registry.AdapterRegistry``."""

    def release(self, ref: AdapterRef) -> None: ...


@dataclass(eq=False)
class LiveRequest:
    """A request on its way, and what only the engine knows about it. Times are the clock's seconds."""

    request: Request
    stream: RequestStream
    detokenizer: Detokenizer
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    held: list[TokenEvent] = field(default_factory=list)
    """What its consumer, who wants all at once, is told with its end."""

    def append(self, token: int, eos: Collection[int]) -> tuple[str, FinishReason | None, str | int | None]:
        """One more token: the text it gives and, if it is the last, why and because of what (FinishEvent).

        Raises ConstraintFailed if the request's constraint cannot follow.
        """
        params, output, detokenizer = self.request.params, self.request.output_token_ids, self.detokenizer
        constraint = self.request.constraint
        output.append(token)
        if constraint is not None:
            constraint.accept(token)
        reason: FinishReason | None = None
        stop: str | int | None = None
        if len(output) >= params.min_tokens:
            if token in eos and not params.ignore_eos:
                reason = "stop"
            elif token in params.stop_token_ids:
                reason, stop = "stop", token
        # The token that ends a request is not part of its text, unless that was asked for.
        text = ""
        if reason is None or params.include_stop_str_in_output:
            # As in vLLM, a stop string is looked for in the text after the first min_tokens tokens only.
            text = detokenizer.feed(token, check_stop=reason is None and len(output) > params.min_tokens)
        if reason is None and constraint is not None and constraint.is_complete:
            reason = "stop"  # the output is whole with this token: no end-of-sequence is waited for
        if reason is None and len(output) >= params.max_tokens:
            reason = "length"
        if reason is not None:
            text += detokenizer.finish()
        if detokenizer.stop is not None:
            reason, stop = "stop", detokenizer.stop
        return text, reason, stop


@dataclass(eq=False, slots=True)  # one for each row of a step
class Advance:
    """What a step gave one request: the tokens drawn for it, and its end if it has come."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    is_beginning: bool = False
    """Whether its output begins with them."""
    reason: FinishReason | None = None
    stop: str | int | None = None
    error: str | None = None
    is_refusal: bool = False

    def fail(self, error: str, *, is_refusal: bool = False) -> None:
        self.reason, self.error, self.is_refusal = "error", error, is_refusal

    def num_accepted(self, drafts: Sequence[int]) -> int:
        """How many of the drafts were drawn."""
        n = 0
        for drawn, draft in zip(self.token_ids, drafts, strict=False):
            if drawn != draft:
                break
            n += 1
        return n


class StepLoop:
    """``on_ended`` is told the id of each request that ends."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        metrics: Metrics,
        registry: Releaser | None,
        eos_token_ids: Collection[int],
        clock: Callable[[], float],
        on_ended: Callable[[str], None],
    ) -> None:
        self.live: dict[str, LiveRequest] = {}
        self.adapter_names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        """Names of the adapters on the device, and of those that waiting requests ask for."""
        self.resident_versions: frozenset[str] = frozenset()
        """Adapter versions on the device; as old as the names."""
        self.is_broken = False
        """Whether pages, slots or references could not be freed: nothing more may be computed."""
        self.integrity_error: RuntimeError | None = None
        """What the last failed check said."""
        self._runner = runner
        self._scheduler = scheduler
        self._metrics = metrics
        self._registry = registry
        self._eos = frozenset(eos_token_ids)
        self._clock = clock
        self._on_ended = on_ended
        self._deliveries: dict[Mailbox, list[Delivery]] = {}
        self._names_at = float("-inf")
        self._is_checked = True

    def add(self, live: LiveRequest) -> None:
        self.live[live.request.request_id] = live
        self._is_checked = False
        self._scheduler.add(live.request)

    def abort(self, request_id: str) -> None:
        live = self.live.get(request_id)
        if live is not None:
            self._end(live, "abort")

    def drop_adapter(self, ref: AdapterRef) -> None:
        self._scheduler.drop_adapter(ref)
        self._metrics.adapter_freed(ref)

    def version_freed(self, ref: AdapterRef) -> None:
        self._scheduler.forget_version(ref.version)

    def step(self) -> bool:
        """Plan and compute one step; whether there was anything to compute."""
        plan: StepPlan | None = None
        try:
            plan = self._scheduler.schedule()
            for request, message in self._scheduler.take_failed():
                self._end(self.live[request.request_id], "error", error=message, is_unavailable=True)
            if plan.rows:
                self._compute(plan)
        except Exception:  # noqa: BLE001 - the one boundary: what a step ran into must not end the other requests
            hit = [row.request.request_id for row in plan.rows] if plan is not None else list(self.live)
            _log.exception("a step failed; its requests end with an error: %s", ", ".join(hit))
            if not self.is_broken:
                for request_id in hit:
                    if request_id in self.live:
                        self._end(self.live[request_id], "error", error=STEP_FAILED)
            return True
        return bool(plan.rows)

    def post(self) -> None:
        """Send the events that have gathered, to each asyncio loop at once."""
        if not self._deliveries:
            return
        posted, self._deliveries = self._deliveries, {}
        for mailbox, deliveries in posted.items():
            if not mailbox.post(deliveries):
                for stream in {stream for stream, _ in deliveries}:
                    stream.abort()  # nobody is left to read it

    def check_idle(self) -> None:
        """With nothing alive, and once after each time something was: check that nothing leaked."""
        if self._is_checked:
            return
        self._is_checked = True
        try:
            self._scheduler.check_integrity()
        except RuntimeError as error:
            _log.exception("integrity check failed")
            self.integrity_error = error

    def refresh_names(self) -> None:
        """Bring ``adapter_names`` up to date, if they are old."""
        now = self._clock()
        if self.live and now - self._names_at < _NAMES_EVERY_S:
            return
        self._names_at = now
        waiting = {use.ref.name for request in self._scheduler.waiting() for use in request.adapters}
        resident = {ref.name for ref in self._scheduler.resident_adapters()}
        self.adapter_names = tuple(sorted(resident)), tuple(sorted(waiting))
        self.resident_versions = frozenset(self._scheduler.resident_versions())

    def end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End what lives. Every request gets its FinishEvent even if freeing what another holds fails."""
        for live in list(self.live.values()):
            try:
                self._end(live, reason, error=error)
            except Exception:  # noqa: BLE001 - the loop is over; the other requests must still get their end
                _log.exception("request %s was ended, but not everything it held was freed", live.request.request_id)

    def _compute(self, plan: StepPlan) -> None:
        start = self._clock()
        n_prefill = n_drafted = 0
        for row in plan.rows:
            live = self.live[row.request.request_id]
            if live.scheduled is None:
                live.scheduled = start
            n_drafts = len(row.drafts)
            n_prefill += row.count - n_drafts > 1 or row.start < len(row.request.prompt_token_ids)
            n_drafted += n_drafts
        advances = self._draw(plan)
        accepted = {
            row.request.request_id: advances[row.request.request_id].num_accepted(row.drafts)
            for row in plan.rows
            if row.drafts
        }
        self._scheduler.commit(plan, accepted)
        now = self._clock()
        self._metrics.step(
            now - start,
            rows=len(plan.rows),
            prefill_rows=n_prefill,
            tokens=plan.num_tokens,
            adapters=len({slot for row in plan.rows for slot in row.request.slots}),
            generated=sum(len(advance.token_ids) for advance in advances.values()),
            drafts=len(accepted),
            drafted=n_drafted,
            accepted=sum(accepted.values()),
        )
        for request_id, advance in advances.items():
            self._tell(self.live[request_id], advance, now)

    def _draw(self, plan: StepPlan) -> dict[str, Advance]:
        """Compute the step and append what is drawn, token by token: each draft that was right lets its request draw
        another, from the logits that were computed behind it, as the next step would have without drafts."""
        sampling = [row for row in plan.rows if row.sample]  # asked for now: it changes with what is appended
        results = self._runner.execute(plan)
        advances: dict[str, Advance] = {}
        for row in plan.rows:
            request_id = row.request.request_id
            failed = results.get(request_id)
            if isinstance(failed, SampleFailed):  # perhaps a prompt that cannot be scored, which samples nothing
                advances[request_id] = Advance()
                advances[request_id].fail(failed.message, is_refusal=failed.is_refusal)
        going_on: list[ScheduledRow] = []
        for row in sampling:
            request_id = row.request.request_id
            if request_id not in advances:
                advance = advances[request_id] = Advance()
                self._append(self.live[request_id], advance, results.get(request_id))
                if row.drafts and advance.reason is None and advance.token_ids[0] == row.drafts[0]:
                    going_on.append(row)
        n_drawn = 1
        while going_on:
            results = self._runner.draw_on([row.request for row in going_on])
            for row in going_on:
                request_id = row.request.request_id
                self._append(self.live[request_id], advances[request_id], results.get(request_id))
            going_on = [
                row
                for row in going_on
                if (advance := advances[row.request.request_id]).reason is None
                and n_drawn < len(row.drafts)
                and advance.token_ids[n_drawn] == row.drafts[n_drawn]
            ]
            n_drawn += 1
        return advances

    def _append(self, live: LiveRequest, advance: Advance, result: SampledToken | SampleFailed | None) -> None:
        """Append what was drawn; nothing is told or ended yet."""
        if not isinstance(result, SampledToken):
            message = STEP_FAILED if result is None else result.message
            advance.fail(message, is_refusal=result is not None and result.is_refusal)
            return
        if not live.request.output_token_ids:
            advance.is_beginning = True
        if live.request.params.max_tokens == 0:  # the prompt was all that was asked for
            advance.reason = "length"
            return
        try:
            text, advance.reason, advance.stop = live.append(result.token_id, self._eos)
        except ConstraintFailed as error:
            advance.fail(str(error), is_refusal=True)
            return
        except BaseException:  # noqa: BLE001 - one request's output must not end the others; a Rust panic is no Exception
            _log.exception("request %s: its token %d could not be appended", live.request.request_id, result.token_id)
            advance.fail(STEP_FAILED)
            return
        advance.token_ids.append(result.token_id)
        advance.text += text
        if result.logprobs is not None:
            advance.logprobs.append(result.logprobs)

    def _tell(self, live: LiveRequest, advance: Advance, now: float) -> None:
        """Deliver what a step gave a request, and end it if that was the end."""
        request = live.request
        if advance.error is None or advance.token_ids:
            num_tokens, elapsed = len(advance.token_ids), now - live.last_token
            if live.first_token is None:
                live.first_token = now
                self._metrics.first_token(now - request.arrival_time, len(request.prompt_token_ids))
                num_tokens, elapsed = num_tokens - 1, 0.0
            if num_tokens > 0:
                self._metrics.inter_token(elapsed / num_tokens, num_tokens)
            live.last_token = now
            prompt_logprobs = tuple(request.prompt_logprobs) if advance.is_beginning else ()
            self._deliver(
                live, TokenEvent(advance.text, tuple(advance.token_ids), tuple(advance.logprobs), prompt_logprobs)
            )
        if advance.reason is not None:
            self._end(live, advance.reason, stop=advance.stop, error=advance.error, is_refusal=advance.is_refusal)

    def _end(
        self,
        live: LiveRequest,
        reason: FinishReason,
        *,
        stop: str | int | None = None,
        error: str | None = None,
        is_unavailable: bool = False,
        is_refusal: bool = False,
    ) -> None:
        """The one place where a request ends. What its client is waiting for comes first."""
        request = live.request
        del self.live[request.request_id]
        n_prompt, n_output = len(request.prompt_token_ids), len(request.output_token_ids)
        times = RequestTimes(request.arrival_time, live.scheduled, live.first_token, self._clock())
        finish = FinishEvent(
            reason, stop, n_prompt, n_output, error, is_unavailable, times, is_refusal, request.num_cached
        )
        self._deliver(live, finish)
        self._on_ended(request.request_id)
        if error is not None:
            _log.warning("request %s ended with an error: %s", request.request_id, error)
        self._metrics.request_ended(
            [use.ref for use in request.adapters],
            reason,
            times,
            prompt_tokens=n_prompt,
            generation_tokens=n_output,
            tenant=request.tenant.name,
        )
        was_broken, self.is_broken = self.is_broken, True  # unless what follows goes well
        try:
            if request.state is not RequestState.FINISHED:  # the scheduler may have given it up itself
                self._scheduler.finish(request)
        finally:
            if request.merged is not None:
                request.merged.release()
            if self._registry is not None:
                for use in request.adapters:
                    self._registry.release(use.ref)
        self.is_broken = was_broken

    def _deliver(self, live: LiveRequest, event: TokenEvent | FinishEvent) -> None:
        stream = live.stream
        if stream.wants_whole and isinstance(event, TokenEvent):
            live.held.append(event)
            return
        deliveries = self._deliveries.setdefault(stream.mailbox, [])
        if live.held:
            deliveries.append((stream, joined(live.held)))  # it is the end, behind which nothing comes
        deliveries.append((stream, event))
