"""The engine: one step-loop thread beside any number of asyncio callers.

A request enters by ``submit`` (any asyncio loop) and its events come out of a ``RequestStream`` on that loop. All else
happens on the step loop's thread, which alone touches the scheduler, the runner and the slots: take submissions and
aborts, schedule, execute, append tokens, look for stops, post events. When there is nothing to do it sleeps on a
condition.

Every request that ``submit`` took ends with exactly one FinishEvent, and its adapter references are released exactly
once, whatever happens. If a step fails, its requests end with ``reason="error"`` and the loop goes on. If the
bookkeeping itself fails while a request is being ended, the loop ends, and every request with it: to go on might mean
to compute with another request's pages.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, TypeVar

from manylora.adapters.host_tier import HostStats
from manylora.adapters.versions import AdapterRef
from manylora.server.engine.detokenizer import Detokenizer, Vocabulary
from manylora.server.engine.errors import (
    AdaptersNeverFit,
    EngineDraining,
    EngineRefusal,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
)
from manylora.server.engine.metrics import EngineStats, Metrics
from manylora.server.engine.request import Request
from manylora.server.engine.scheduling.queue_limits import QueueLimits
from manylora.server.engine.scheduling.scheduler import Scheduler
from manylora.server.engine.step_loop import LiveRequest, Releaser, Runner, StepLoop
from manylora.server.engine.stream import Mailbox, RequestStream

__all__ = [
    "AdaptersNeverFit",
    "Engine",
    "EngineDraining",
    "EngineRefusal",
    "EngineStats",
    "InvalidRequest",
    "PromptTooLong",
    "QueueFull",
    "RequestStream",
    "Runner",
]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_POLL_S: Final = 0.05
"""How often requests that wait for an adapter, with nothing else to do, are tried again. ``wake`` makes it sooner."""


@dataclass
class _Inbox:
    """What other threads ask of the step loop."""

    submitted: list[LiveRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    calls: list[Callable[[], None]] = field(default_factory=list)
    woken: bool = False

    def __bool__(self) -> bool:
        return bool(self.woken or self.submitted or self.aborted or self.calls)


class Engine:
    """See the module's text. ``start`` it, and ``close`` it at the end.

    Args:
        runner, scheduler: used on the step loop's thread only.
        registry: gets back, by ``release``, the adapter references of every request that ended. None without adapters.
        vocabulary: see ``detokenizer.vocabulary_for``.
        metrics: the engine binds itself as the source of its gauges.
        eos_token_ids: end a request with stop_reason None, unless it has ``ignore_eos``.
        max_slots: the device's adapter slots, for the metrics.
        host_stats: of the adapters in host memory, for the metrics; any thread.
        strict: for tests: a failed integrity check is raised by ``close``, not only logged.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        vocabulary: Vocabulary,
        metrics: Metrics,
        registry: Releaser | None = None,
        eos_token_ids: Collection[int] = (),
        max_slots: int = 0,
        host_stats: Callable[[], HostStats] = HostStats,
        strict: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics
        self._scheduler = scheduler
        self._vocabulary = vocabulary
        self._max_slots = max_slots
        self._host_stats = host_stats
        self._strict = strict
        self._clock = clock
        self._loop = StepLoop(
            runner,
            scheduler,
            metrics=metrics,
            registry=registry,
            eos_token_ids=eos_token_ids,
            clock=clock,
            on_ended=self._ended,
        )
        self._thread = threading.Thread(target=self._run, name="manylora-step-loop", daemon=True)

        # Shared between threads, under the condition's lock.
        self._condition = threading.Condition()
        self._inbox = _Inbox()
        self._unfinished: dict[str, str] = {}
        """Request id and tenant's name."""
        self._queues = QueueLimits(scheduler.config.max_rows, scheduler.config.max_waiting, clock)
        self._idle_futures: list[Future[None]] = []
        self._is_draining = False
        self._is_closing = False
        self._has_failed = False
        self._is_over = False
        self._mailbox: Mailbox | None = None
        metrics.bind(self.stats)

    # --- callers -------------------------------------------------------------------------------------------------

    @property
    def max_request_tokens(self) -> int:
        """Prompt and output tokens of the largest request that is accepted."""
        return self._scheduler.config.max_request_tokens

    @property
    def is_healthy(self) -> bool:
        """Whether the step loop runs."""
        return self._thread.is_alive()

    @property
    def is_draining(self) -> bool:
        return self._is_draining and not self._has_failed

    @property
    def integrity_error(self) -> RuntimeError | None:
        """What the last integrity check that failed said. The step loop checks each time nothing lives any more, and
        when it ends."""
        return self._loop.integrity_error

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> RequestStream:
        """Queue a request; its events come on the running asyncio loop.

        From here on the request belongs to the engine. So do the references that the caller took on its adapters,
        one for each, *if this returns*; if it raises, the caller releases them. ``arrival_time`` 0 means now.

        Raises QueueFull (its tenant has as many requests here as it may), EngineDraining, PromptTooLong,
        AdaptersNeverFit, InvalidRequest; RuntimeError outside an asyncio loop.
        """
        loop = asyncio.get_running_loop()
        self._check(request)
        detokenizer = Detokenizer(
            self._vocabulary.stream(
                skip_special_tokens=request.params.skip_special_tokens, shown=request.params.shown_special_ids
            ),
            request.params.stop,
            include_stop=request.params.include_stop_str_in_output,
        )
        request.arrival_time = request.arrival_time or self._clock()
        with self._condition:
            if self._is_draining or self._is_closing:
                raise EngineDraining
            if request.request_id in self._unfinished:
                raise InvalidRequest(f"A request with id {request.request_id} is already running.")
            if self._mailbox is None or self._mailbox.loop is not loop:
                self._mailbox = Mailbox(loop)
            self._queues.enter(request.tenant)
            stream = RequestStream(request.request_id, self._mailbox, self.abort)
            self._unfinished[request.request_id] = request.tenant.name
            self._inbox.submitted.append(LiveRequest(request, stream, detokenizer))
            self._condition.notify()
        return stream

    def abort(self, request_id: str) -> None:
        """End a request with reason "abort"; any thread. Nothing happens if it has ended already."""
        with self._condition:
            if request_id in self._unfinished:
                self._inbox.aborted.append(request_id)
                self._condition.notify()

    def wake(self) -> None:
        """Try again what could not run; any thread. To be given to SlotManager as ``on_ready``."""
        with self._condition:
            self._inbox.woken = True
            self._condition.notify()

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """Run ``function`` on the step loop's thread, between two steps; any thread. Its result or exception comes by
        the future, which is cancelled if the engine is closed."""
        future: Future[_T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except Exception as error:  # noqa: BLE001 - not ours: it belongs to whoever waits for the future
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._condition:
            if self._is_closing:
                future.cancel()
            else:
                self._inbox.calls.append(run)
                self._condition.notify()
        return future

    def drop_adapter(self, ref: AdapterRef) -> None:
        """A name's version retired (AdapterRegistry's ``on_retired``): its metrics go, and its slot, unless the version
        is live by another name; any thread."""
        self._call_for(ref, lambda: self._loop.drop_adapter(ref), "the slot of adapter %s could not be dropped")

    def version_freed(self, ref: AdapterRef) -> None:
        """A version has neither name nor reference any more (AdapterRegistry's ``when_freed``): its cached keys and
        values go; any thread."""
        self._call_for(ref, lambda: self._loop.version_freed(ref), "what is cached of adapter %s could not be freed")

    def _call_for(self, ref: AdapterRef, function: Callable[[], None], message: str) -> None:
        def log_failure(called: Future[None]) -> None:
            if not called.cancelled() and (error := called.exception()) is not None:
                _log.error(message, ref.name, exc_info=error)

        self.call(function).add_done_callback(log_failure)

    def stats(self) -> EngineStats:
        """A moment's view, from any thread. The names of adapters in it may be 0.1 s old."""
        scheduler, (resident, waiting) = self._scheduler, self._loop.adapter_names
        return EngineStats(
            running=scheduler.num_running,
            waiting=max(len(self._unfinished) - scheduler.num_running, 0),
            kv_pages_used=scheduler.pool.num_used,
            kv_pages_total=scheduler.pool.num_pages,
            preemptions=scheduler.counts.preemptions,
            slot_hits=scheduler.counts.slot_hits,
            slot_misses=scheduler.counts.slot_misses,
            max_slots=self._max_slots,
            resident_adapters=resident,
            waiting_adapters=waiting,
            resident_versions=self._loop.resident_versions,
            host=self._host_stats(),
            prefix_queries=scheduler.kv.num_queries,
            prefix_hits=scheduler.kv.num_hits,
            prefix_pages=len(scheduler.pool.cache),
            prefix_evictions=scheduler.pool.num_evicted,
        )

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - what remains is aborted, not abandoned
        """Take nothing new and return when everything has ended. After ``timeout`` seconds the rest is aborted."""
        with self._condition:
            self._is_draining = True
            idle: Future[None] = Future()
            if self._is_over or not self._thread.is_alive():
                return
            self._idle_futures.append(idle)
            self._inbox.woken = True
            self._condition.notify()
        waiting = asyncio.wrap_future(idle)
        done, _ = await asyncio.wait([waiting], timeout=timeout)
        if not done:
            with self._condition:
                _log.warning("draining took over %g s: %d requests are aborted", timeout, len(self._unfinished))
                self._inbox.aborted.extend(self._unfinished)
                self._condition.notify()
            await waiting

    async def close(self) -> None:
        """End every request (reason "abort") and the thread, after the step that it is in. Raises RuntimeError if
        ``strict`` and an integrity check failed."""
        with self._condition:
            self._is_draining = self._is_closing = True
            self._condition.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        if self._strict and self.integrity_error is not None:
            raise self.integrity_error

    def _check(self, request: Request) -> None:
        prompt, params = request.prompt_token_ids, request.params
        if not prompt:
            raise InvalidRequest("The prompt has no tokens.")
        if params.max_tokens < 0:
            raise InvalidRequest(f"max_tokens must not be negative, got {params.max_tokens}.")
        if len(prompt) + params.max_tokens > self.max_request_tokens:
            raise PromptTooLong(len(prompt), params.max_tokens, self.max_request_tokens)
        if (reason := self._scheduler.never_fits(request)) is not None:
            raise AdaptersNeverFit(reason)

    # --- the step loop's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closing and not self._loop.is_broken:
                self._take_in()
                ran = self._loop.step() if self._loop.live else False
                self._loop.refresh_names()
                self._loop.post()
                if not self._loop.live:
                    self._when_idle()
                if not ran:
                    with self._condition:
                        self._condition.wait_for(self._has_work, timeout=_POLL_S if self._loop.live else None)
        finally:
            self._stop()

    def _has_work(self) -> bool:
        return bool(self._inbox) or self._is_closing

    def _take_in(self) -> None:
        with self._condition:
            if not self._inbox:
                return
            inbox, self._inbox = self._inbox, _Inbox()
        try:
            while inbox.submitted:
                self._loop.add(inbox.submitted.pop(0))
            while inbox.aborted:
                self._loop.abort(inbox.aborted.pop(0))
            while inbox.calls:
                inbox.calls.pop(0)()
        finally:
            # Unless one of them raised, nothing is left: then the loop ends, and what is left is taken in at its end.
            if inbox.submitted or inbox.aborted or inbox.calls:
                with self._condition:
                    self._inbox.submitted[:0] = inbox.submitted
                    self._inbox.aborted[:0] = inbox.aborted
                    self._inbox.calls[:0] = inbox.calls

    def _ended(self, request_id: str) -> None:
        with self._condition:
            self._queues.leave(self._unfinished.pop(request_id))

    def _when_idle(self) -> None:
        self._loop.check_idle()
        with self._condition:
            if self._inbox.submitted:
                return
            futures, self._idle_futures = self._idle_futures, []
        for future in futures:
            if future.set_running_or_notify_cancel():  # else whoever drained was cancelled
                future.set_result(None)

    def _stop(self) -> None:
        """The loop is over, as asked or by an error: end what lives, so that nobody waits for ever."""
        with self._condition:
            was_asked = self._is_closing and not self._loop.is_broken
            self._has_failed = not was_asked
            self._is_draining = self._is_closing = True
        if not was_asked:
            _log.critical("the step loop has stopped: nothing more is served")
        try:
            self._take_in()
        finally:
            if was_asked:
                self._loop.end_all("abort")
            else:
                self._loop.end_all("error", "The engine has stopped; the server's log has the cause.")
            self._loop.post()
            with self._condition:
                self._is_over = True
            self._when_idle()
