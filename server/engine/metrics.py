"""Prometheus metrics: vLLM's names, so that existing dashboards and gateways work, and ``manylora_*`` beside them.

The step loop records into plain Python numbers (no lock, no label look-up: a few microseconds a step) and a collector
turns them into samples when ``/metrics`` is read, on another thread. A scrape may thus see a histogram's sum one
observation ahead of its buckets; that is the price, and the next scrape has both.

Label values are bounded: series carry an adapter's *name*, they are removed when its last version is freed, and at
most ``max_adapter_series`` names have series of their own; the rest share ``adapter="_other"``.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from manylora.adapters.host_tier import HostStats
from manylora.adapters.versions import AdapterRef
from manylora.server.engine.request import FinishReason, RequestTimes

# Seconds. Those of the vllm:* histograms are vLLM's own, so that panels made for it keep their axes.
_SECONDS: Final = (0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TTFT_BUCKETS: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, *_SECONDS, 160.0, 640.0, 2560.0)
_INTER_TOKEN_BUCKETS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, *_SECONDS[2:])
_MINUTES: Final = (15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_REQUEST_BUCKETS: Final = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, *_MINUTES)
_STEP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LOAD_BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_COUNT_BUCKETS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)

OTHER: Final = "_other"
"""Label value that the adapters beyond ``max_adapter_series`` share. No adapter can be named so (names begin with a
letter or digit)."""


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

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages in use, 0 to 1."""
        return self.kv_pages_used / self.kv_pages_total


class _Histogram:
    """Cumulative counts are made at scrape time; observing costs a bisection and two additions."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        # bisect_left: a bucket holds the values less than *or equal to* its bound.
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts.copy(), strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        family.add_metric(labels, buckets, self._sum)


@dataclass
class _AdapterSeries:
    prompt_tokens: int = 0
    generation_tokens: int = 0
    queue_seconds: float = 0.0
    queued: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    versions: set[str] = field(default_factory=set)


class Metrics(Collector):
    """Records what the engine does; ``render()`` is the body of ``/metrics``.

    Methods that record are called on the step-loop thread, apart from ``adapter_loaded`` (any thread).
    """

    def __init__(self, model_name: str, *, max_adapter_series: int = 1000) -> None:
        self.model_name = model_name
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._max_adapter_series = max_adapter_series
        self._stats: Callable[[], EngineStats] | None = None
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished: Counter[str] = Counter()
        self._ttft = _Histogram(_TTFT_BUCKETS)
        self._inter_token = _Histogram(_INTER_TOKEN_BUCKETS)
        self._e2e = _Histogram(_REQUEST_BUCKETS)
        self._queue = _Histogram(_REQUEST_BUCKETS)
        self._prefill = _Histogram(_REQUEST_BUCKETS)
        self._decode = _Histogram(_REQUEST_BUCKETS)
        self._steps = {phase: _Histogram(_STEP_BUCKETS) for phase in ("prefill", "decode", "mixed")}
        self._batch_rows = _Histogram(_COUNT_BUCKETS)
        self._batch_tokens = _Histogram(_COUNT_BUCKETS)
        self._batch_adapters = _Histogram((0.0, *_COUNT_BUCKETS))
        self._loads = {result: _Histogram(_LOAD_BUCKETS) for result in ("loaded", "refused")}
        self._adapters: dict[str, _AdapterSeries] = {}

    def bind(self, stats: Callable[[], EngineStats]) -> None:
        """Give the source of the gauges, read at each scrape; the engine does this."""
        self._stats = stats

    def render(self) -> bytes:
        """The Prometheus text format; its content type is ``prometheus_client.CONTENT_TYPE_LATEST``."""
        return generate_latest(self.registry)

    # --- recording -----------------------------------------------------------------------------------------------

    def step(self, seconds: float, *, rows: int, prefill_rows: int, tokens: int, adapters: int, generated: int) -> None:
        """One step was executed: its rows, those of them that prefilled, the tokens it computed, its distinct
        adapters, the tokens it generated."""
        self._generation_tokens += generated
        phase = "decode" if prefill_rows == 0 else "prefill" if prefill_rows == rows else "mixed"
        self._steps[phase].observe(seconds)
        self._batch_rows.observe(rows)
        self._batch_tokens.observe(tokens)
        self._batch_adapters.observe(adapters)

    def first_token(self, seconds: float, prompt_tokens: int) -> None:
        """The first token of a request, which had so long a prompt, came ``seconds`` after its arrival."""
        self._ttft.observe(seconds)
        self._prompt_tokens += prompt_tokens

    def inter_token(self, seconds: float) -> None:
        """A later token of a request came ``seconds`` after the one before."""
        self._inter_token.observe(seconds)

    def request_ended(
        self,
        adapters: Collection[AdapterRef],
        reason: FinishReason,
        times: RequestTimes,
        *,
        prompt_tokens: int,
        generation_tokens: int,
    ) -> None:
        """A request has ended; its tokens are counted now, for each of its adapters in full."""
        self._finished[reason] += 1
        self._e2e.observe(times.ended - times.arrived)
        queued = (times.ended if times.scheduled is None else times.scheduled) - times.arrived
        self._queue.observe(queued)
        if times.scheduled is not None and times.first_token is not None:
            self._prefill.observe(times.first_token - times.scheduled)
            self._decode.observe(times.ended - times.first_token)
        for adapter in adapters:
            series = self._series(adapter)
            series.requests[reason] += 1
            series.prompt_tokens += 0 if times.first_token is None else prompt_tokens
            series.generation_tokens += generation_tokens
            series.queue_seconds += queued
            series.queued += 1

    def adapter_loaded(self, seconds: float, *, refused: bool = False) -> None:
        """Reading and checking an adapter took ``seconds``."""
        self._loads["refused" if refused else "loaded"].observe(seconds)

    def adapter_tokens(self, name: str) -> tuple[int, int]:
        """Prompt and generated tokens of an adapter's requests that have ended; zeros before the first. Any thread."""
        series = self._adapters.get(name)
        return (0, 0) if series is None else (series.prompt_tokens, series.generation_tokens)

    def adapter_freed(self, adapter: AdapterRef) -> None:
        """A version is gone for good (``AdapterRegistry``'s ``on_freed``): the name's series go with its last one."""
        series = self._adapters.get(adapter.name)
        if series is not None:
            series.versions.discard(adapter.version)
            if not series.versions:
                del self._adapters[adapter.name]

    def _series(self, adapter: AdapterRef) -> _AdapterSeries:
        series = self._adapters.get(adapter.name)
        if series is None:
            if len(self._adapters) >= self._max_adapter_series:
                return self._adapters.setdefault(OTHER, _AdapterSeries())
            series = self._adapters[adapter.name] = _AdapterSeries()
        series.versions.add(adapter.version)
        return series

    # --- exposition ----------------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        yield from self._collect_vllm()
        yield from self._collect_adapters()
        yield from self._collect_steps()
        if self._stats is not None:
            yield from self._collect_gauges(self._stats())

    def _collect_vllm(self) -> Iterator[Metric]:
        model = (self.model_name,)
        for name, text, count in (
            ("vllm:prompt_tokens", "Prompt tokens whose first output token came.", self._prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", self._generation_tokens),
        ):
            family = CounterMetricFamily(name, text, labels=("model_name",))
            family.add_metric(model, count)
            yield family
        success = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by reason.", labels=("model_name", "finished_reason")
        )
        for reason, count in self._finished.copy().items():
            success.add_metric((self.model_name, reason), count)
        yield success
        for name, text, histogram in (
            ("time_to_first_token", "From arrival to the first token.", self._ttft),
            ("inter_token_latency", "Between two tokens of a request.", self._inter_token),
            ("e2e_request_latency", "From arrival to the end.", self._e2e),
            ("request_queue_time", "From arrival to the first step.", self._queue),
            ("request_prefill_time", "From the first step to the first token.", self._prefill),
            ("request_decode_time", "From the first token to the end.", self._decode),
        ):
            times = HistogramMetricFamily(f"vllm:{name}_seconds", text, labels=("model_name",))
            histogram.add_to(times, model)
            yield times

    def _collect_adapters(self) -> Iterator[Metric]:
        series = sorted(self._adapters.copy().items())
        yield _counter("manylora_adapter_prompt_tokens", "Prompt tokens, by adapter.", series, "prompt_tokens")
        yield _counter("manylora_adapter_generation_tokens", "Generated tokens.", series, "generation_tokens")
        requests = CounterMetricFamily(
            "manylora_adapter_requests", "Requests that ended.", labels=("adapter", "finished_reason")
        )
        queue = SummaryMetricFamily(
            "manylora_adapter_queue_seconds", "From arrival to first step.", labels=("adapter",)
        )
        for name, one in series:
            for reason, count in one.requests.copy().items():
                requests.add_metric((name, reason), count)
            queue.add_metric((name,), one.queued, one.queue_seconds)
        yield requests
        yield queue

    def _collect_steps(self) -> Iterator[Metric]:
        steps = HistogramMetricFamily("manylora_step_seconds", "Seconds a step took, by phase.", labels=("phase",))
        for phase, histogram in self._steps.items():
            histogram.add_to(steps, (phase,))
        yield steps
        loads = HistogramMetricFamily("manylora_adapter_load_seconds", "Seconds an adapter took.", labels=("result",))
        for result, histogram in self._loads.items():
            histogram.add_to(loads, (result,))
        yield loads
        for name, text, histogram in (
            ("manylora_step_rows", "Rows in a step.", self._batch_rows),
            ("manylora_step_tokens", "Tokens computed in a step.", self._batch_tokens),
            ("manylora_step_distinct_adapters", "Distinct adapters in a step.", self._batch_adapters),
        ):
            family = HistogramMetricFamily(name, text)
            histogram.add_to(family, ())
            yield family

    def _collect_gauges(self, stats: EngineStats) -> Iterator[Metric]:
        for name, text, value in (
            ("vllm:num_requests_running", "Requests that hold a row.", stats.running),
            ("vllm:num_requests_waiting", "Requests that wait for one.", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", stats.kv_usage),
        ):
            yield _gauge(name, text, {"model_name": self.model_name}, value)
        yield _gauge(
            "vllm:lora_requests_info",
            "Unix time; running_lora_adapters are those resident on the device.",
            {
                "max_lora": str(stats.max_slots),
                "running_lora_adapters": ",".join(stats.resident_adapters),
                "waiting_lora_adapters": ",".join(stats.waiting_adapters),
            },
            time.time(),
        )
        yield _gauge("manylora_slots_used", "Device slots that hold an adapter.", {}, len(stats.resident_adapters))
        yield _gauge("manylora_slots", "Device slots in all.", {}, stats.max_slots)
        preemptions = CounterMetricFamily("vllm:num_preemptions", "Preemptions.", labels=("model_name",))
        preemptions.add_metric((self.model_name,), stats.preemptions)
        yield preemptions
        lookups = CounterMetricFamily(
            "manylora_adapter_lookups", "Admissions, by whether the tier had the adapter.", labels=("tier", "result")
        )
        lookups.add_metric(("device", "hit"), stats.slot_hits)
        lookups.add_metric(("device", "miss"), stats.slot_misses)
        host, totals = stats.host, stats.host.counters
        lookups.add_metric(("host", "hit"), totals.hits)
        lookups.add_metric(("host", "miss"), totals.misses)
        yield lookups
        yield _gauge("manylora_host_adapter_bytes", "Bytes of the adapters in host memory.", {}, host.nbytes)
        yield _gauge("manylora_host_adapters", "Adapter versions in host memory.", {}, host.copies)
        for name, text, count in (
            ("manylora_host_evictions", "Adapter versions that left host memory to make room.", totals.evictions),
            ("manylora_host_read_failures", "Adapter versions that could not be read again.", totals.failures),
            ("manylora_host_prefetches", "Reads that began before their adapter's turn.", totals.prefetches),
        ):
            family = CounterMetricFamily(name, text)
            family.add_metric((), count)
            yield family
        reads = SummaryMetricFamily("manylora_host_read_seconds", "Reading an adapter again that had left memory.")
        reads.add_metric((), totals.reads, totals.read_seconds)
        yield reads


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family


def _counter(name: str, text: str, series: Iterable[tuple[str, _AdapterSeries]], attribute: str) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=("adapter",))
    for adapter, one in series:
        family.add_metric((adapter,), getattr(one, attribute))
    return family
