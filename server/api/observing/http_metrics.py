"""Metrics of the HTTP layer, beside the engine's (``engine.metrics``): what came in, and what was turned away.

Label values are bounded: routes are templates, unknown paths and unusual methods share ``_other``, and a tenant has a
series of its own if it has one there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from manylora.server.api.observing.observation import Observed
from manylora.server.engine.metric_families import HTTP_BUCKETS, Histogram, counter


class HttpMetrics(Collector):
    """``record`` is called on the event loop's thread, ``render`` on any.

    ``tenant_label``: the label of a tenant's series, by its name (``engine.metrics.Metrics.tenant_label``).
    """

    def __init__(self, tenant_label: Callable[[str], str]) -> None:
        self._tenant_label = tenant_label
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._rejected: Counter[tuple[str, str]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def record(self, observed: Observed) -> None:
        """A request is over."""
        context = observed.context
        self._requests[observed.route, observed.method, observed.status] += 1
        if observed.route not in self._seconds:
            self._seconds[observed.route] = Histogram(HTTP_BUCKETS)
        self._seconds[observed.route].observe(observed.seconds)
        if context.rejection is not None:
            self._rejected[self._tenant_label(context.caller.tenant.name), context.rejection] += 1

    def render(self) -> bytes:
        """The Prometheus text format, to be appended to the engine's: no family is in both."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield counter(
            "manylora_http_requests",
            "HTTP requests that are over, by route, method and status.",
            ("route", "method", "status"),
            [
                ((route, method, str(status)), count)
                for (route, method, status), count in sorted(self._requests.copy().items())
            ],
        )
        seconds = HistogramMetricFamily(
            "manylora_http_request_seconds",
            "Seconds from an HTTP request's head to the end of its response, by route.",
            labels=("route",),
        )
        for route, histogram in sorted(self._seconds.copy().items()):
            histogram.add_to(seconds, (route,))
        yield seconds
        yield counter(
            "manylora_rejected",
            "HTTP requests that were turned away, by tenant and reason.",
            ("tenant", "reason"),
            # The series of a tenant that is gone are counted on, in case it comes back, and not shown.
            [
                ((tenant, reason), count)
                for (tenant, reason), count in sorted(self._rejected.copy().items())
                if tenant.startswith("_") or self._tenant_label(tenant) == tenant
            ],
        )
