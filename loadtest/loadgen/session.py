"""One load test from its settings to its records: the requests, the run's clock, who takes part, when it is over."""

from __future__ import annotations

import itertools
import time

import gevent
from gevent.event import Event
from locust.contrib.fasthttp import FastHttpSession
from locust.env import Environment

from loadgen.adapter_swaps import ListedSources, Swapper, UploadedVersions
from loadgen.errors import TargetError
from loadgen.generator_health import GeneratorHealth
from loadgen.profiles import requests_of
from loadgen.records import Record
from loadgen.settings import Settings, bearer
from loadgen.target import Target
from loadgen.traces import TracedRequest, read_trace


class LoadTest:
    """What users, swaps and report share. ``clock`` is 0 when the first user is ready."""

    def __init__(self, settings: Settings, target: Target) -> None:
        """ProfileError, TraceError or TargetError if it cannot be done."""
        self.settings = settings
        self.target = target
        self.headers = bearer(settings.bearer)
        self.records: list[Record] = []
        self.swapper: Swapper | None = None
        self.over = Event()
        self.interrupted = False
        self.health = GeneratorHealth(self.clock)
        self._began: float | None = None
        self._members = self._left = 0
        self._watcher: gevent.Greenlet | None = None
        self._swapping: gevent.Greenlet | None = None

        profile = settings.profile
        self.sending_s = profile.seconds
        """When the last request may be due."""
        if settings.trace is not None:
            requests = read_trace(settings.trace)
            self.sending_s = min(self.sending_s, requests[-1].at_s + 1e-6) if not self.closed else self.sending_s
            kept = [request for request in requests if self.closed or request.at_s < self.sending_s]
            self.left_out = max(len(requests) - profile.max_requests, len(requests) - len(kept), 0)
            self._requests = iter(kept[: profile.max_requests])
            self._check_models({request.model for request in requests})
            self.models = tuple(dict.fromkeys(request.model for request in kept))
        else:
            self.left_out = 0
            adapters = (settings.adapters or target.adapters)[: settings.n_adapters]
            base = settings.base or target.base
            shares = profile.popularity.shares(adapters, base)
            self._check_models(set(shares))
            self.models = tuple(name for name, share in shares.items() if share > 0)
            self._requests = requests_of(profile, adapters, base)
        self._source = self._swap_source()

    def _check_models(self, names: set[str]) -> None:
        unknown = sorted(names - set(self.target.models))
        if unknown and not self.settings.unlisted_models:
            listed = ", ".join(self.target.models) or "none"
            raise TargetError(
                f"the server does not list {', '.join(unknown[:8])}{' ...' if len(unknown) > 8 else ''} "
                f"(it lists {listed}); --unlisted-models asks all the same"
            )

    def _swap_source(self) -> UploadedVersions | ListedSources | None:
        if self.settings.profile.swaps is None:
            return None
        if self.settings.swap_upload is not None:
            return UploadedVersions(self.settings.swap_upload)
        return ListedSources(self.target.sources)

    # --- what users ask ----------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        return self.settings.profile.loop == "closed"

    @property
    def users(self) -> int:
        return self.settings.profile.peak_clients if self.closed else 1

    @property
    def begun(self) -> bool:
        return self._began is not None

    @property
    def end_s(self) -> float:
        """When the run is over, whatever still runs."""
        return self.sending_s + self.settings.grace_s

    def clock(self) -> float:
        """Seconds since the start; 0 before it."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def next_request(self) -> TracedRequest | None:
        return next(self._requests, None)

    def record(self, request: TracedRequest, *, scheduled_s: float) -> Record:
        record = Record(request, scheduled_s=scheduled_s)
        self.records.append(record)
        return record

    def join(self) -> int:
        """A user begins; its number. The first one starts the clock."""
        if self._began is None:
            self._began = time.perf_counter()
            self._watcher = gevent.spawn(self.health.watch)
            if self.swapper is not None:
                self._swapping = gevent.spawn(self.swapper.run, self.sending_s)
        self._members += 1
        return self._members - 1

    def leave(self) -> None:
        """A user has nothing more to ask. When the last one has left, it is over."""
        self._left += 1
        if self._left == self.users:
            if self._swapping is not None:
                self._swapping.join(timeout=max(self.end_s - self.clock(), 0.0))
            self.over.set()

    # --- before and after --------------------------------------------------------------------------------------------

    def prepare(self, environment: Environment) -> None:
        """What needs locust's environment."""
        plan = self.settings.profile.swaps
        if plan is not None and self._source is not None:
            session = FastHttpSession(
                base_url=self.target.url, request_event=environment.events.request, user=None, max_retries=0,
                network_timeout=self.settings.timeout_s, connection_timeout=30.0,
            )  # fmt: skip
            self.swapper = Swapper(
                url=self.target.url, plan=plan, source=self._source, headers=self.headers,
                admin_headers=bearer(self.settings.admin_bearer) or self.headers, timeout_s=self.settings.timeout_s,
                clock=self.clock, session=session,
            )  # fmt: skip

    def stop(self) -> None:
        """End what still runs. Requests that were due and never got their turn are in the records, unfinished."""
        for greenlet in (self._swapping, self._watcher):
            if greenlet is not None:
                greenlet.kill()
        now = self.clock()
        for record in self.records:
            if record.sent_s is None or record.failure == "unfinished":
                record.fail("unfinished", "never sent" if record.sent_s is None else "cut off")
                record.message = record.message or "cut off"
        for request in itertools.takewhile(lambda one: not self.closed and one.at_s <= now, self._requests):
            # Due in an open loop, but the generator did not come so far.
            self.record(request, scheduled_s=request.at_s).fail("unfinished", "never sent")

    @property
    def window(self) -> tuple[float, float]:
        """What throughput is counted over: from the warm-up to the end of sending, as what drains afterwards has less
        and less company. A trace, or a run that ended before its time, has no such end: there, to the last answer."""
        last = max((record.end_s for record in self.records if record.end_s is not None), default=self.clock())
        by_time = self.settings.trace is None and not self.interrupted and not self._cut_short
        end = self.sending_s if by_time else last
        return self.settings.warmup_s, max(end, self.settings.warmup_s)

    @property
    def _cut_short(self) -> bool:
        return len(self.records) >= self.settings.profile.max_requests
