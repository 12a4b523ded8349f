"""Spans of a request and of its choices' phases, as OpenTelemetry names things."""

from __future__ import annotations

import http.server
import importlib.util
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.api.observing import tracing as tracing_module
from manylora.server.api.observing.tracing import Tracing, traces_url
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig, ConfigError
from manylora.server.engine.request import Event, FinishEvent, Request, RequestTimes
from tests.api.conftest import LOCAL
from tests.api.fakes import FakeEngine, token

BODY = {"model": "alice", "prompt": "the secret prompt", "max_tokens": 5}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

Spans = Callable[[], list[ReadableSpan]]


def timed(request: Request) -> list[list[Event]]:
    """Two tokens; 0.5 s in the queue, the first token after 2 s, the end after 3 s."""
    at = request.arrival_time
    times = RequestTimes(at, at + 0.5, at + 2.0, at + 3.0)
    return [[token("ab")], [FinishEvent("stop", None, len(request.prompt_token_ids), 2, times=times)]]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(
    serving: Serving, config: ApiConfig, engine: FakeEngine, exporter: InMemorySpanExporter
) -> Iterator[Callable[..., TestClient]]:
    engine.script = timed
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with ExitStack() as stack:

        def make(config: ApiConfig = config) -> TestClient:
            app = create_app(serving, config, tracing=Tracing(provider))
            return stack.enter_context(TestClient(app, base_url=LOCAL, raise_server_exceptions=False))

        yield make


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Spans:
    """Those that ended, the server's first, then by their start."""

    def finished() -> list[ReadableSpan]:
        return sorted(exporter.get_finished_spans(), key=lambda one: (one.kind != SpanKind.SERVER, one.start_time))

    return finished


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_completion(traced: Callable[..., TestClient], spans: Spans) -> None:
    before = time.time_ns()
    traced().post("/v1/completions", json=BODY, headers={"x-request-id": "it"})
    server, *phases = spans()
    assert (server.name, server.kind, server.parent) == ("POST /v1/completions", SpanKind.SERVER, None)
    attributes = dict(server.attributes or {})
    first = attributes.pop("gen_ai.response.time_to_first_chunk")
    assert isinstance(first, float)
    assert first >= 2.0
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "manylora.request_id": "it",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "manylora",
        "gen_ai.request.model": "alice",
        "gen_ai.usage.input_tokens": 18,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert server.status.status_code is StatusCode.UNSET
    assert server.start_time is not None
    assert abs(server.start_time - before) < 5e9
    assert [(one.name, round(seconds(one), 3), dict(one.attributes or {})) for one in phases] == [
        ("queue", 0.5, {}),
        ("prefill", 1.5, {"gen_ai.usage.input_tokens": 18}),
        ("decode", 1.0, {"gen_ai.usage.output_tokens": 2, "gen_ai.response.finish_reasons": ("stop",)}),
    ]
    for one in phases:
        assert one.context.trace_id == server.context.trace_id
        assert one.parent is not None
        assert one.parent.span_id == server.context.span_id
    assert phases[0].end_time == phases[1].start_time
    assert phases[1].end_time == phases[2].start_time


def test_each_choice_of_a_stream_has_its_phases(traced: Callable[..., TestClient], spans: Spans) -> None:
    messages = [{"role": "user", "content": "the secret prompt"}]
    traced().post("/v1/chat/completions", json={"model": "alice", "messages": messages, "n": 2, "stream": True})
    server, *phases = spans()
    assert (server.attributes or {})["gen_ai.operation.name"] == "chat"
    assert (server.attributes or {})["gen_ai.usage.output_tokens"] == 4
    assert sorted(one.name for one in phases) == ["decode", "decode", "prefill", "prefill", "queue", "queue"]


def test_a_trace_that_came_with_the_request_goes_on(
    traced: Callable[..., TestClient], spans: Spans, exporter: InMemorySpanExporter
) -> None:
    client = traced()
    client.post(
        "/v1/completions", json=BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    )
    for one in spans():
        assert f"{one.context.trace_id:032x}" == TRACE
        assert one.context.trace_state.get("vendor") == "1"
    parent = spans()[0].parent
    assert parent is not None
    assert f"{parent.span_id:016x}" == PARENT
    exporter.clear()
    client.post("/v1/completions", json=BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert spans() == []  # whoever began the trace does not sample it
    client.post("/v1/completions", json=BODY, headers=[(b"traceparent", b"00-nonsense-\xff-01")])
    assert spans()[0].parent is None


def test_errors(traced: Callable[..., TestClient], spans: Spans, engine: FakeEngine) -> None:
    client = traced()
    client.post("/v1/completions", json=BODY | {"model": "nobody"})
    engine.script = lambda request: [[FinishEvent("error", None, len(request.prompt_token_ids), 0, "broken")]]
    client.post("/v1/completions", json=BODY)
    client.get("/made/up")
    found = [(one.name, (one.attributes or {})["error.type"], one.status.status_code) for one in spans()]
    assert found == [
        ("POST /v1/completions", "NotFoundError", StatusCode.UNSET),  # the client's own doing is no error of ours
        ("POST /v1/completions", "InternalServerError", StatusCode.ERROR),
        ("GET _other", "NotFoundError", StatusCode.UNSET),
    ]


def test_a_choice_that_never_ran_only_queued(
    traced: Callable[..., TestClient], spans: Spans, engine: FakeEngine
) -> None:
    def script(request: Request) -> list[list[Event]]:
        at = request.arrival_time
        return [[FinishEvent("error", None, 1, 0, "no", times=RequestTimes(at, None, None, at + 0.25))]]

    engine.script = script
    traced().post("/v1/completions", json=BODY)
    assert [(one.name, round(seconds(one), 3)) for one in spans()[1:]] == [("queue", 0.25)]


def test_no_prompt_and_no_key_is_in_any_span(
    traced: Callable[..., TestClient], spans: Spans, config: ApiConfig
) -> None:
    client = traced(replace(config, api_keys=("key-a1b2c3",)))
    headers = {"authorization": "Bearer key-a1b2c3"}
    client.post("/v1/completions", json=BODY, headers=headers)
    client.post("/v1/completions", json=BODY, headers={"authorization": "Bearer a1b2c3"})
    client.get("/v1/models/a1b2c3?k=a1b2c3", headers=headers)
    assert len(spans()) == 6
    for one in spans():
        text = one.to_json()
        assert "a1b2c3" not in text
        assert "secret" not in text


def test_probes_have_none(traced: Callable[..., TestClient], spans: Spans) -> None:
    client = traced()
    for path in ("/health", "/ready", "/metrics"):
        client.get(path)
    assert spans() == []


def test_the_log_has_the_traces_id(
    traced: Callable[..., TestClient], spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    traced().post("/v1/completions", json=BODY)
    [line] = [record.manylora_fields for record in caplog.records if record.name == "manylora.access"]  # type: ignore[attr-defined]
    assert line["trace_id"] == f"{spans()[0].context.trace_id:032x}"


def test_nothing_of_it_is_imported_when_it_is_off() -> None:
    code = (
        "import sys, manylora.server.api.app; sys.exit(any(one.startswith('opentelemetry.sdk') for one in sys.modules))"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)


# --- sending them ----------------------------------------------------------------------------------------------------


class Collector(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_args: Any) -> None:
        return


@pytest.fixture
def collector() -> Iterator[Any]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    server.got = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_collector_gets_them_by_the_end(
    serving: Serving, config: ApiConfig, engine: FakeEngine, collector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    engine.script = timed
    url = f"http://127.0.0.1:{collector.server_port}"
    with TestClient(create_app(serving, replace(config, otlp_endpoint=url)), base_url=LOCAL) as client:
        client.post("/v1/completions", json=BODY)
    [(path, body)] = collector.got
    assert path == "/v1/traces"
    [resource] = ExportTraceServiceRequest.FromString(body).resource_spans
    labels = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert (labels["service.name"], labels["deployment.environment.name"]) == ("manylora", "test")
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["POST /v1/completions", "decode", "prefill", "queue"]


def test_the_environment_names_the_service(
    serving: Serving, config: ApiConfig, collector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    url = f"http://127.0.0.1:{collector.server_port}/collect"
    with TestClient(create_app(serving, replace(config, otlp_endpoint=url)), base_url=LOCAL) as client:
        client.get("/v1/models")
    [(path, body)] = collector.got
    assert path == "/collect"
    [resource] = ExportTraceServiceRequest.FromString(body).resource_spans
    assert {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"] == "mine"


def test_a_collector_that_does_not_answer_does_not_hold_up_the_end(
    serving: Serving, config: ApiConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing_module, "_FLUSH_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with TestClient(create_app(serving, replace(config, otlp_endpoint=url)), base_url=LOCAL) as client:
            assert client.get("/v1/models").status_code == 200
            start = time.monotonic()
        assert time.monotonic() - start < 3
    assert "did not take the last spans" in caplog.text


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("http://localhost:4318/", "http://localhost:4318/v1/traces"),
        ("https://collector/custom", "https://collector/custom"),
    ],
)
def test_where_they_go(given: str, url: str) -> None:
    assert traces_url(given) == url


@pytest.mark.parametrize("url", ["localhost:4318", "ftp://x", "http://", "", "grpc://x:4317"])
def test_what_is_no_collector(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--otlp-endpoint: expected a URL"):
        ApiConfig(otlp_endpoint=url)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_name: str) -> None:
        raise ModuleNotFoundError("No module named 'opentelemetry'")

    monkeypatch.setattr(importlib.util, "find_spec", nothing)
    with pytest.raises(ConfigError, match=r"^--otlp-endpoint: .*pip install 'manylora\[otel\]'"):
        ApiConfig(otlp_endpoint="http://localhost:4318")
