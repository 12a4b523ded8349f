"""OpenTelemetry traces: a span for each request, and below it its choices' time in the queue, in prefill, in decoding.

Spans are made when the request is over, from the times that were taken anyway, so that a request costs nothing more
while it runs, and nothing at all where tracing is off. They carry numbers and names, never prompts or completions.
OpenTelemetry's SDK (the extra ``otel``) is imported here only, and only if tracing is on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from manylora.server.api.observing.observation import PROBES, Observed
from manylora.server.engine.request import FinishEvent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_log = logging.getLogger(__name__)

_NAME: Final = "manylora"
_TRACES_PATH: Final = "/v1/traces"
_OPERATIONS: Final = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
"""``gen_ai.operation.name`` by route."""
_FLUSH_S: Final = 5.0
"""What a collector that does not answer may delay the end of the process."""


class Tracing:
    """Makes spans of requests that are over. Probes and scrapes have none.

    The trace goes on from the request's ``traceparent``, if it has one, with its sampling decision; otherwise the
    provider's sampler decides.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer(_NAME)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_collector(cls, endpoint: str, version: str) -> Tracing:
        """Send spans to an OTLP/HTTP collector. ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``,
        ``OTEL_TRACES_SAMPLER`` and the exporter's variables are honoured. Raises ImportError without the extra."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # The environment goes last, where it wins.
        own = Resource.create({SERVICE_NAME: _NAME, SERVICE_VERSION: version})
        provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=traces_url(endpoint))))
        return cls(provider)

    def record(self, observed: Observed) -> None:
        """A request is over."""
        if observed.route in PROBES:
            return
        from opentelemetry.trace import SpanKind, StatusCode

        # Wall-clock nanoseconds of the monotonic clock's zero: both are read now, so that steps of the wall clock
        # during the request do not tear its spans apart.
        zero = time.time_ns() - time.monotonic_ns()
        context = observed.context
        span = self._tracer.start_span(
            f"{observed.method} {observed.route}",
            context=self._propagator.extract(_trace_headers(observed)),
            kind=SpanKind.SERVER,
            attributes=_attributes(observed),
            start_time=zero + _nanoseconds(context.arrived),
        )
        if span.is_recording():
            for finish in context.finished:
                self._record_choice(span, finish, zero)
            if observed.status >= 500:
                span.set_status(StatusCode.ERROR)
        if span.get_span_context().is_valid:
            context.trace_id = f"{span.get_span_context().trace_id:032x}"
        span.end(zero + _nanoseconds(observed.ended))

    def _record_choice(self, parent: Span, finish: FinishEvent, zero: int) -> None:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent)
        for name, start, end in _phases(finish):
            attributes: dict[str, Any] = {}
            if name == "prefill":
                attributes["gen_ai.usage.input_tokens"] = finish.prompt_tokens
            if name == "decode":
                attributes["gen_ai.usage.output_tokens"] = finish.completion_tokens
                attributes["gen_ai.response.finish_reasons"] = [finish.reason]
            span = self._tracer.start_span(
                name, context=context, attributes=attributes, start_time=zero + _nanoseconds(start)
            )
            span.end(zero + _nanoseconds(end))

    def close(self) -> None:
        """Send what there is, for some seconds at most; blocks."""
        # The exporter tries again for longer than anybody wants to wait for the end of a process.
        thread = threading.Thread(target=self._provider.shutdown, name="manylora-tracing", daemon=True)
        thread.start()
        thread.join(_FLUSH_S)
        if thread.is_alive():
            _log.warning("the trace collector did not take the last spans within %g s; they are lost", _FLUSH_S)


def traces_url(endpoint: str) -> str:
    """The URL that spans are posted to: as given, or its ``/v1/traces`` if it has no path of its own."""
    return endpoint.rstrip("/") + _TRACES_PATH if urlsplit(endpoint).path in ("", "/") else endpoint


def _trace_headers(observed: Observed) -> Mapping[str, str]:
    headers = {name: value for name, value in observed.scope["headers"] if name in (b"traceparent", b"tracestate")}
    return {name.decode(): value.decode("latin-1") for name, value in headers.items()}


def _attributes(observed: Observed) -> dict[str, Any]:
    """OpenTelemetry's names for HTTP and generative AI, and ours for what they have none for."""
    context = observed.context
    attributes: dict[str, Any] = {
        "http.request.method": observed.method,
        "http.route": observed.route,
        "http.response.status_code": observed.status,
        "manylora.request_id": context.request_id,
        "manylora.tenant": context.caller.tenant.name or None,
        "error.type": context.error_type,
        "gen_ai.operation.name": _OPERATIONS.get(observed.route),
        "gen_ai.request.model": context.model,
        "gen_ai.usage.input_tokens": context.prompt_tokens,
    }
    if observed.route in _OPERATIONS:
        attributes["gen_ai.provider.name"] = _NAME
    if context.finished:
        attributes["gen_ai.usage.output_tokens"] = observed.completion_tokens
        attributes["gen_ai.response.finish_reasons"] = observed.finish_reasons
    if (first := observed.first_token_seconds) is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = first
    return {name: value for name, value in attributes.items() if value is not None}


def _phases(finish: FinishEvent) -> Iterator[tuple[str, float, float]]:
    """What a choice came to: the phases that it entered, each to its own end or the request's."""
    times = finish.times
    if times is None:
        return
    yield "queue", times.arrived, times.ended if times.scheduled is None else times.scheduled
    if times.scheduled is not None:
        yield "prefill", times.scheduled, times.ended if times.first_token is None else times.first_token
    if times.first_token is not None:
        yield "decode", times.first_token, times.ended


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
