"""Prometheus metrics: vLLM's names, so that existing dashboards and gateways work, and ``manylora_*`` beside them.

The step loop records into plain Python numbers (no lock, no label look-up: a few microseconds a step) and a collector
turns them into samples when ``/metrics`` is read, on another thread. A scrape may thus see a histogram's sum one
observation ahead of its buckets; that is the price, and the next scrape has both.

Label values are bounded: series carry an adapter's *name*, they are removed when its last version is freed, and at
most ``max_adapter_series`` names have series of their own; the rest share ``adapter="_other"``. So it is with tenants,
whose series go when the file of keys no longer has them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from manylora.adapters.host_tier import HostStats
from manylora.adapters.versions import AdapterRef
from manylora.server.engine.metric_families import (
    COUNT_BUCKETS,
    INTER_TOKEN_BUCKETS,
    LOAD_BUCKETS,
    OTHER,
    REQUEST_BUCKETS,
    STEP_BUCKETS,
    TTFT_BUCKETS,
    Histogram,
    counter,
    gauge,
)
from manylora.server.engine.request import FinishReason, RequestTimes
from manylora.server.engine.usage_series import AdapterUsage, TenantUsage

__all__ = ["OTHER", "EngineStats", "Metrics"]


@dataclass(frozen=True)
class EngineStats:
    """A moment's view of the engine, as ``Engine.stats`` gives it."""

    running: int
    waiting: int
    kv_pages_used: int
    kv_pages_total: int
    preemptions: int
    slot_hits: int
    slot_misses: int
    max_slots: int
    resident_adapters: tuple[str, ...]
    """Names of the adapters on the device."""
    waiting_adapters: tuple[str, ...]
    """Names, distinct, of the adapters that waiting requests ask for."""
    resident_versions: frozenset[str] = frozenset()
    """Versions on the device, whatever names they have."""
    host: HostStats = field(default_factory=HostStats)
    """The adapters in host memory."""
    prefix_queries: int = 0
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_hits: int = 0
    """Those of them whose keys and values were there."""
    prefix_pages: int = 0
    """Pages of the KV cache that the prefix cache could find, in use or not."""
    prefix_evictions: int = 0
    """Pages that left the prefix cache to make room."""

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages in use, 0 to 1."""
        return self.kv_pages_used / self.kv_pages_total


class Metrics(Collector):
    """Records what the engine does; ``render()`` is the body of ``/metrics``.

    Methods that record are called on the step-loop thread, apart from ``adapter_loaded`` (any thread).
    """

    def __init__(self, model_name: str, *, max_adapter_series: int = 1000, max_tenant_series: int = 1000) -> None:
        self.model_name = model_name
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._stats: Callable[[], EngineStats] | None = None
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._drafts = self._drafted = self._accepted = 0
        self._finished: Counter[str] = Counter()
        self._ttft = Histogram(TTFT_BUCKETS)
        self._inter_token = Histogram(INTER_TOKEN_BUCKETS)
        self._e2e = Histogram(REQUEST_BUCKETS)
        self._queue = Histogram(REQUEST_BUCKETS)
        self._prefill = Histogram(REQUEST_BUCKETS)
        self._decode = Histogram(REQUEST_BUCKETS)
        self._steps = {phase: Histogram(STEP_BUCKETS) for phase in ("prefill", "decode", "mixed")}
        self._batch_rows = Histogram(COUNT_BUCKETS)
        self._batch_tokens = Histogram(COUNT_BUCKETS)
        self._batch_adapters = Histogram((0.0, *COUNT_BUCKETS))
        self._loads = {result: Histogram(LOAD_BUCKETS) for result in ("loaded", "refused")}
        self._adapters = AdapterUsage(max_adapter_series)
        self._tenants = TenantUsage(max_tenant_series)

    def bind(self, stats: Callable[[], EngineStats]) -> None:
        """Give the source of the gauges, read at each scrape; the engine does this."""
        self._stats = stats

    def render(self) -> bytes:
        """The Prometheus text format; its content type is ``prometheus_client.CONTENT_TYPE_LATEST``."""
        return generate_latest(self.registry)

    # --- recording -----------------------------------------------------------------------------------------------

    def step(
        self,
        seconds: float,
        *,
        rows: int,
        prefill_rows: int,
        tokens: int,
        adapters: int,
        generated: int,
        drafts: int = 0,
        drafted: int = 0,
        accepted: int = 0,
    ) -> None:
        """One step was executed: its rows, those of them that prefilled, the tokens it computed (drafts, too), its
        distinct adapters, the tokens it generated; the rows with drafts, the tokens drafted, and those of them that
        were drawn."""
        self._generation_tokens += generated
        self._drafts += drafts
        self._drafted += drafted
        self._accepted += accepted
        phase = "decode" if prefill_rows == 0 else "prefill" if prefill_rows == rows else "mixed"
        self._steps[phase].observe(seconds)
        self._batch_rows.observe(rows)
        self._batch_tokens.observe(tokens)
        self._batch_adapters.observe(adapters)

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """The first token of a request, which had so long a prompt, came ``seconds`` after its arrival."""
        self._ttft.observe(seconds)
        self._prompt_tokens += prompt_tokens

    def inter_token(self, seconds: float, tokens: int = 1) -> None:
        """So many later tokens of a request came, each ``seconds`` after the one before: of those that came in one
        step, the mean."""
        self._inter_token.observe(seconds, tokens)

    def request_ended(
        self,
        adapters: Collection[AdapterRef],
        reason: FinishReason,
        times: RequestTimes,
        *,
        prompt_tokens: int,
        generation_tokens: int,
        tenant: str = "",
    ) -> None:
        """A request has ended; its tokens are counted now, for its tenant, and for each of its adapters in full."""
        self._finished[reason] += 1
        self._e2e.observe(times.ended - times.arrived)
        queued = (times.ended if times.scheduled is None else times.scheduled) - times.arrived
        self._queue.observe(queued)
        if times.scheduled is not None and times.first_token is not None:
            self._prefill.observe(times.first_token - times.scheduled)
            self._decode.observe(times.ended - times.first_token)
        prompt_tokens = 0 if times.first_token is None else prompt_tokens
        for usage in (self._tenants.of(tenant), *map(self._adapters.of, adapters)):
            usage.add(reason, queued, prompt_tokens, generation_tokens)

    def adapter_loaded(self, seconds: float, *, refused: bool = False) -> None:
        """Reading and checking an adapter took ``seconds``."""
        self._loads["refused" if refused else "loaded"].observe(seconds)

    def adapter_tokens(self, name: str) -> tuple[int, int]:
        """Prompt and generated tokens of an adapter's requests that have ended; zeros before the first. Any thread."""
        return self._adapters.tokens(name)

    def adapter_freed(self, adapter: AdapterRef) -> None:
        """A version is gone for good (``AdapterRegistry``'s ``on_freed``): the name's series go with its last one."""
        self._adapters.forget(adapter)

    def tenant_label(self, name: str) -> str:
        """The value of ``tenant`` in the series of the tenant ``name``, shared ones included. Any thread."""
        return self._tenants.label(name)

    def retain_tenants(self, names: Collection[str]) -> None:
        """These are all the tenants there are now: the series of others go, and do not come back. Any thread."""
        self._tenants.retain(names)

    # --- exposition ----------------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        yield from self._collect_vllm()
        yield from self._adapters.collect()
        yield from self._tenants.collect()
        yield from self._collect_steps()
        if self._stats is not None:
            stats = self._stats()
            yield from self._collect_gauges(stats)
            yield from self._collect_adapter_tiers(stats)

    def _collect_vllm(self) -> Iterator[Metric]:
        by, model = ("model_name",), (self.model_name,)
        yield counter(
            "vllm:prompt_tokens", "Prompt tokens whose first output token came.", by, [(model, self._prompt_tokens)]
        )
        yield counter("vllm:generation_tokens", "Tokens generated.", by, [(model, self._generation_tokens)])
        for name, text, count in (
            ("num_drafts", "Rows that were computed with drafts, one for each step.", self._drafts),
            ("num_draft_tokens", "Tokens that were drafted and checked.", self._drafted),
            ("num_accepted_tokens", "Drafted tokens that were drawn.", self._accepted),
        ):
            yield counter(f"vllm:spec_decode_{name}", text, by, [(model, count)])
        yield counter(
            "vllm:request_success",
            "Requests that ended, one for each choice, by reason.",
            (*by, "finished_reason"),
            [((*model, reason), count) for reason, count in self._finished.copy().items()],
        )
        for name, text, histogram in (
            ("time_to_first_token", "Seconds from arrival to the first token.", self._ttft),
            ("inter_token_latency", "Seconds between two tokens of a request.", self._inter_token),
            ("e2e_request_latency", "Seconds from arrival to the end.", self._e2e),
            ("request_queue_time", "Seconds from arrival to the first step.", self._queue),
            ("request_prefill_time", "Seconds from the first step to the first token.", self._prefill),
            ("request_decode_time", "Seconds from the first token to the end.", self._decode),
        ):
            times = HistogramMetricFamily(f"vllm:{name}_seconds", text, labels=by)
            histogram.add_to(times, model)
            yield times

    def _collect_steps(self) -> Iterator[Metric]:
        steps = HistogramMetricFamily(
            "manylora_step_seconds",
            "Seconds a step took, by what its rows did: all decoded, all prefilled, or mixed.",
            labels=("phase",),
        )
        for phase, histogram in self._steps.items():
            histogram.add_to(steps, (phase,))
        yield steps
        loads = HistogramMetricFamily(
            "manylora_adapter_load_seconds",
            "Seconds it took to read and check an adapter, by whether it was taken.",
            labels=("result",),
        )
        for result, histogram in self._loads.items():
            histogram.add_to(loads, (result,))
        yield loads
        for name, text, histogram in (
            ("manylora_step_rows", "Rows computed in a step.", self._batch_rows),
            ("manylora_step_tokens", "Tokens computed in a step.", self._batch_tokens),
            ("manylora_step_distinct_adapters", "Distinct adapters in a step.", self._batch_adapters),
        ):
            family = HistogramMetricFamily(name, text)
            histogram.add_to(family, ())
            yield family

    def _collect_gauges(self, stats: EngineStats) -> Iterator[Metric]:
        by, model = ("model_name",), (self.model_name,)
        for name, text, value in (
            ("vllm:num_requests_running", "Requests that hold a row.", stats.running),
            ("vllm:num_requests_waiting", "Requests that wait for one.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", stats.kv_usage),
        ):
            yield gauge(name, text, {"model_name": self.model_name}, value)
        for name, text, count in (
            ("vllm:num_preemptions", "Requests put back to make room, to be computed again.", stats.preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
        ):
            yield counter(name, text, by, [(model, count)])
        yield gauge(
            "manylora_prefix_cache_pages", "KV pages that can be found again, in use or not.", {}, stats.prefix_pages
        )
        yield counter(
            "manylora_prefix_cache_evictions",
            "KV pages that were cached and made room.",
            (),
            [((), stats.prefix_evictions)],
        )
        yield gauge(
            "vllm:lora_requests_info",
            "Unix time; running_lora_adapters are those resident on the device.",
            {
                "max_lora": str(stats.max_slots),
                "running_lora_adapters": ",".join(stats.resident_adapters),
                "waiting_lora_adapters": ",".join(stats.waiting_adapters),
            },
            time.time(),
        )

    def _collect_adapter_tiers(self, stats: EngineStats) -> Iterator[Metric]:
        host, totals = stats.host, stats.host.counters
        yield gauge("manylora_slots_used", "Device slots that hold an adapter.", {}, len(stats.resident_adapters))
        yield gauge("manylora_slots", "Device slots in all.", {}, stats.max_slots)
        yield counter(
            "manylora_adapter_lookups",
            "Admissions, by whether the tier (device, host) had the adapter.",
            ("tier", "result"),
            [
                (("device", "hit"), stats.slot_hits),
                (("device", "miss"), stats.slot_misses),
                (("host", "hit"), totals.hits),
                (("host", "miss"), totals.misses),
            ],
        )
        yield gauge("manylora_host_adapter_bytes", "Bytes of the adapters in host memory.", {}, host.nbytes)
        yield gauge("manylora_host_adapters", "Adapter versions in host memory.", {}, host.copies)
        for name, text, count in (
            ("manylora_host_evictions", "Adapter versions that left host memory to make room.", totals.evictions),
            ("manylora_host_read_failures", "Adapter versions that could not be read again.", totals.failures),
            ("manylora_host_prefetches", "Reads that began before their adapter's turn.", totals.prefetches),
        ):
            yield counter(name, text, (), [((), count)])
        reads = SummaryMetricFamily(
            "manylora_host_read_seconds", "Seconds it took to read an adapter again that had left host memory."
        )
        reads.add_metric((), totals.reads, totals.read_seconds)
        yield reads
