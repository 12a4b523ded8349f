from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from manylora.deploy.ray_serve.calls import call, whole
from manylora.deploy.ray_serve.metrics_pages import one_page
from manylora.deploy.ray_serve.routes import Body, Kind, Message, Scope, adapters_named, carried, kind_of, of_adapters
from manylora.server.api.app import routes

CHANGES = {
    ("PUT", "/v1/adapters/{name:path}"),
    ("PATCH", "/v1/adapters/{name:path}"),
    ("DELETE", "/v1/adapters/{name:path}"),
    ("POST", "/v1/adapters/unmerge"),
    ("POST", "/v1/adapters/{name:path}/merge"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/load_lora_adapter"),
    ("POST", "/unload_lora_adapter"),
}


def test_every_route_of_the_server_is_of_the_right_kind() -> None:
    """A route that changes adapters and is taken for one that does not would change one replica alone."""
    seen = set()
    for route in routes():
        for method in route.methods:  # type: ignore[attr-defined]
            path = route.path  # type: ignore[attr-defined]
            kind = kind_of(method, path.replace("{name:path}", "org/some:name"))
            expected = Kind.ANSWER
            if (method, path) in CHANGES:
                expected = Kind.CHANGE
                seen.add((method, path))
            elif path == "/metrics":
                expected = Kind.METRICS
            elif path in ("/health", "/ready"):
                expected = Kind.STATUS
            assert kind is expected, (method, path)
    assert seen == CHANGES


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"model": "sql"}, ("sql",)),
        ({"model": "base", "lora_path": "sql"}, ("sql",)),
        ({"model": "base", "adapters": [{"name": "a", "scale": 2}, {"name": "b"}]}, ("a", "b")),
        ({"model": "base", "adapters": [{"name": "a"}, {"name": "a"}, 5, {"nome": "x"}, {"name": 7}]}, ("a",)),
        ({"model": 5}, ()),
        ({}, ()),
        ([], ()),
    ],
)
def test_the_names_are_read_as_the_server_will_read_them(fields: Any, names: tuple[str, ...]) -> None:
    body = json.dumps(fields).encode()
    assert adapters_named("POST", "/v1/completions", body) == names
    assert adapters_named("POST", "/v1/chat/completions", body) == names
    assert adapters_named("POST", "/tokenize", body) == ()
    assert adapters_named("GET", "/v1/completions", body) == ()


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'"model"', b"null"])
def test_a_body_that_says_nothing_names_nothing(body: bytes) -> None:
    assert adapters_named("POST", "/v1/completions", body) == ()


def test_no_body_names_more_than_a_request_may() -> None:
    body = json.dumps({"model": "base", "adapters": [{"name": f"a{i}"} for i in range(10_000)]}).encode()
    assert len(adapters_named("POST", "/v1/completions", body)) <= 64


def test_names_of_adapters_are_told_from_the_base_s() -> None:
    assert of_adapters(("base", "base:sql", "org:sql", "sql"), "base") == ("sql", "org:sql", "sql")


def test_a_scope_is_carried_without_what_is_of_this_process_alone() -> None:
    scope = {"type": "http", "path": "/x", "headers": [(b"a", memoryview(b"b"))], "app": object(), "state": {}}
    assert carried(scope) == {"type": "http", "path": "/x", "headers": [(b"a", b"b")]}


# --- calls -----------------------------------------------------------------------------------------------------------


async def _echo(scope: Scope, receive: Any, send: Any) -> None:
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body(messages: list[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages)


def test_a_body_comes_from_memory_or_from_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "body").write_bytes(data)
    assert _body(asyncio.run(whole(_echo, {}, Body(data)))) == data
    messages = asyncio.run(whole(_echo, {}, Body(path=str(tmp_path / "body"))))
    assert _body(messages) == data
    assert max(len(message.get("body", b"")) for message in messages) <= 1 << 20


def test_who_stops_listening_is_gone_for_the_application() -> None:
    told: list[str] = []

    async def endless(scope: Scope, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        told.append((await receive())["type"])

    async def main() -> None:
        answer = call(endless, {}, Body())
        assert (await anext(answer))[0]["status"] == 200
        await answer.aclose()

    asyncio.run(main())
    assert told == ["http.disconnect"]


def test_an_application_that_fails_is_heard_of_unless_it_has_answered() -> None:
    async def fails(scope: Scope, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        if scope["answers"]:
            await send({"type": "http.response.body", "body": b"sorry", "more_body": False})
        raise ValueError("a bug")

    assert _body(asyncio.run(whole(fails, {"answers": True}, Body()))) == b"sorry"
    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(whole(fails, {"answers": False}, Body()))


# --- metrics ---------------------------------------------------------------------------------------------------------

PAGE = """# HELP up Whether it is.
# TYPE up gauge
up 1.0
# HELP asked_total Requests.
# TYPE asked_total counter
asked_total{path="/a b",note="say \\"hi\\" {x} } y"} 3.0
asked_total{path="/c"} 4.0
# TYPE empty_labels gauge
empty_labels{} 2.0
"""


def test_the_samples_of_all_replicas_are_told_apart() -> None:
    page = one_page({"r1": PAGE, 'r"2\\': PAGE.replace("4.0", "9.0")})
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert families["up"].documentation == "Whether it is."
    assert families["asked"].type == "counter"
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families.values()
        for sample in family.samples
    }
    note = ("note", 'say "hi" {x} } y')
    assert found == {
        (name, tuple(sorted((*labels, ("replica", replica))))): value
        for replica, c in (("r1", 4.0), ('r"2\\', 9.0))
        for name, labels, value in (
            ("up", (), 1.0),
            ("asked_total", (("path", "/a b"), note), 3.0),
            ("asked_total", (("path", "/c"),), c),
            ("empty_labels", (), 2.0),
        )
    }
    assert page.count("# TYPE up gauge") == 1


def test_a_page_of_one_client_library_is_understood() -> None:
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

    registry = CollectorRegistry()
    Counter("tokens", "Tokens.", ["model"], registry=registry).labels("a").inc(5)
    Histogram("wait", "Waits.", registry=registry).observe(0.3)
    page = one_page({"x": generate_latest(registry).decode(), "y": generate_latest(registry).decode()})
    for family in text_string_to_metric_families(page):
        by_replica = {
            replica: [sample for sample in family.samples if sample.labels["replica"] == replica] for replica in "xy"
        }
        assert len(by_replica["x"]) == len(by_replica["y"]) > 0
