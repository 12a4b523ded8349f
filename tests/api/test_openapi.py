"""The OpenAPI document is valid, whole, and what the server does (``tests.api.conformance`` holds every test to it)."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from starlette.testclient import TestClient

from manylora.server.api.access.auth import OPEN_PATHS
from manylora.server.api.app import routes
from manylora.server.api.body import harmless_fields
from manylora.server.api.openapi.document import document, operation_of
from manylora.server.api.openapi.page import page
from manylora.server.api.schemas import CompletionRequest
from manylora.server.config import ApiConfig
from tests.api.conformance import NotDocumented, check, check_schema, operation_at, the_document
from tests.api.fakes import FakeEngine, finish, token

DOCUMENT = the_document()
OPERATIONS = [
    (method, path, operation) for path, methods in DOCUMENT["paths"].items() for method, operation in methods.items()
]
IDS = [f"{method.upper()} {path}" for method, path, _ in OPERATIONS]


def parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in the document."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for one in value if isinstance(value, list) else ():
        yield from parts(one)


def test_it_is_valid() -> None:
    schemathesis.openapi.from_dict(copy.deepcopy(DOCUMENT)).validate()
    broken = copy.deepcopy(DOCUMENT)
    del broken["paths"]["/health"]["get"]["responses"]["200"]["description"]
    with pytest.raises(Exception, match="description"):  # whatever class the validator has for it
        schemathesis.openapi.from_dict(broken).validate()


def test_every_route_is_in_it() -> None:
    undescribed = [route.path for route in routes() if operation_of(route) is None]  # type: ignore[attr-defined]
    assert undescribed == []
    assert len(OPERATIONS) == sum(len(route.methods) for route in routes())  # type: ignore[attr-defined]


def test_every_reference_leads_somewhere_and_nothing_is_left_over() -> None:
    referred = {part["$ref"] for part in parts(DOCUMENT) if "$ref" in part}
    there = {
        f"#/components/{kind}/{name}"
        for kind, named in DOCUMENT["components"].items()
        if kind != "securitySchemes"
        for name in named
    }
    assert referred == there


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=IDS)
def test_an_operation_is_told_in_full(method: str, path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"].endswith((".", "?"))
    assert set(operation["tags"]) <= {tag["name"] for tag in DOCUMENT["tags"]}
    named = {one["name"] for one in operation["parameters"] if one.get("in") == "path"}
    assert named == set(re.findall(r"\{(\w+)\}", path))
    assert any(status.startswith("2") for status in operation["responses"])
    assert "500" in operation["responses"]
    assert (method in ("post", "put", "patch")) >= ("requestBody" in operation)


def test_operations_have_ids_of_their_own() -> None:
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(set(ids)) == len(ids)


def test_objects_are_closed() -> None:
    """Nothing is accepted and ignored, nothing is answered that is not documented: no schema is open by oversight."""
    for name, schema in DOCUMENT["components"]["schemas"].items():
        if schema.get("type") == "object":
            assert schema["additionalProperties"] is not True, name
            assert "additionalProperties" in schema, name


@pytest.mark.parametrize(
    "keys", [{}, {"api_keys": ("user",)}, {"admin_key": "admin"}, {"api_keys": ("user",), "admin_key": "admin"}]
)
def test_keys_are_asked_for_where_it_says_so(connect: Callable[..., TestClient], config: ApiConfig, keys: Any) -> None:
    """Without a key an operation is refused just where the server's own document says that it takes one."""
    client = connect(ApiConfig(adapter_roots=config.adapter_roots, **keys))
    key = next(iter(filter(None, [keys.get("admin_key"), *keys.get("api_keys", ())])), None)
    headers = {"authorization": f"Bearer {key}"}
    served = client.get("/openapi.json", headers=headers).json()
    assert set(served["paths"]) == set(DOCUMENT["paths"])
    for path, methods in served["paths"].items():
        for method, operation in methods.items():
            where = re.sub(r"\{\w+\}", "nobody", path)
            assert (client.request(method, where).status_code == 401) == bool(operation["security"]), (method, path)
            wanted = "adminKey" if "admin_key" in keys else "apiKey"
            is_admin = any(tag.startswith("adapters") for tag in operation["tags"])
            expected = [] if path in OPEN_PATHS else [wanted] if keys and is_admin else None
            if expected is not None:
                assert [next(iter(one)) for one in operation["security"]] == expected


def test_fields_that_change_nothing_are_in_it() -> None:
    documented = DOCUMENT["components"]["schemas"]["CompletionRequest"]["properties"]
    for name, values in harmless_fields(CompletionRequest).items():
        assert (name in documented) == (values.schema != {"not": {}}), name


def test_every_field_of_a_body_says_what_it_is_for() -> None:
    for _, _, operation in OPERATIONS:
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {"schema": {}})
        for schema in content["schema"].get("anyOf", [content["schema"]] if content["schema"] else []):
            name = schema["$ref"].rpartition("/")[2]
            for field, found in DOCUMENT["components"]["schemas"][name]["properties"].items():
                assert found.get("description"), f"{name}.{field}: say it there, or in api/openapi/field_texts.py"


@pytest.mark.parametrize("schema", ["CompletionRequest", "ChatRequest"])
def test_what_may_be_left_out_may_be_null(client: TestClient, schema: str) -> None:
    """By the document, and by the server."""
    found = DOCUMENT["components"]["schemas"][schema]
    nulls = dict.fromkeys(name for name in found["properties"] if name not in found["required"])
    assert len(nulls) > 30
    if schema == "CompletionRequest":
        path, body = "/v1/completions", {"model": "base", "prompt": "Hi", **nulls}
    else:
        path, body = "/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "Hi"}], **nulls}
    check_schema({"$ref": f"#/components/schemas/{schema}"}, body, "all nulls")
    assert client.post(path, json=body).status_code == 200


def test_the_default_that_is_documented_is_the_one_that_applies(client: TestClient, engine: FakeEngine) -> None:
    properties = DOCUMENT["components"]["schemas"]["CompletionRequest"]["properties"]
    defaults = {name: one["default"] for name, one in properties.items() if "default" in one}
    assert {"temperature", "n", "top_p", "stream"} <= defaults.keys()
    for body in ({}, defaults):
        response = client.post("/v1/completions", json={"model": "base", "prompt": "Hi", "seed": 1, **body})
        assert response.status_code == 200, response.text
    first, second = (request.params for request in engine.requests)
    assert first == second


def answer(**changes: Any) -> dict[str, Any]:
    body = {"error": {"message": "m", "type": "NotFoundError", "param": None, "code": 404}}
    given: dict[str, Any] = {
        "method": "GET",
        "path": "/v1/models/org/bob",
        "sent": b"",
        "status": 404,
        "headers": {"content-type": "application/json", "x-request-id": "r"},
        "body": json.dumps(body).encode(),
    }
    return {**given, **changes}


class TestTheCheckItself:
    def test_what_is_as_documented_passes(self) -> None:
        check(**answer())
        check(**answer(method="POST", path="/no/such/path", status=404))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"status": 418}, "status is not documented"),
            ({"status": 200}, '"id" is a required property'),
            ({"body": b'{"error": {}}'}, '"message" is a required property'),
            ({"body": answer()["body"].replace(b"NotFoundError", b"Oops")}, "Oops"),
            ({"body": answer()["body"].replace(b'"m"', b'"m", "more": 1')}, "more"),
            ({"headers": {"content-type": "text/plain", "x-request-id": "r"}}, "content type"),
            ({"headers": {"content-type": "application/json"}}, "X-Request-Id is missing"),
            ({"headers": {"content-type": "application/json", "x-request-id": "two words"}}, "X-Request-Id"),
            ({"path": "/nowhere", "status": 200}, "no such operation"),
            ({"body": b"Not found"}, "not JSON"),
        ],
    )
    def test_what_is_not_is_found(self, changes: Any, said: str) -> None:
        with pytest.raises(NotDocumented, match=said):
            check(**answer(**changes))

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b"data: [DONE]\n\n", None),
            (b'data: {"error": {"message": "m", "type": "InternalServerError", "param": null, "code": 500}}\n\n', None),
            (b"data: [DONE]\n", "not framed"),
            (b"data: {}\n\ndata: [DONE]\n\n", "not valid"),
            (b"data: [DONE]\n\ndata: [DONE]\n\n", "not JSON"),
            (b'data: {"a": 1}\n\n', "ends with"),
        ],
    )
    def test_streams(self, body: bytes, said: str | None) -> None:
        stream = answer(
            method="POST",
            path="/v1/completions",
            status=200,
            headers={"content-type": "text/event-stream; charset=utf-8", "x-request-id": "r"},
            body=body,
        )
        if said is None:
            check(**stream)
        else:
            with pytest.raises(NotDocumented, match=said):
                check(**stream)

    def test_a_request_that_was_taken_must_be_documented(self) -> None:
        deleted = {"object": "adapter.deleted", "name": "a", "deleted": True}
        put = answer(method="DELETE", path="/v1/adapters/a", status=200, body=json.dumps(deleted).encode())
        check(**put)
        unloaded = answer(
            method="POST",
            path="/v1/unload_lora_adapter",
            status=200,
            headers={"content-type": "text/plain; charset=utf-8", "x-request-id": "r"},
            body=b"Success",
            sent=b'{"lora_name": "a", "unknown": null}',
        )
        check(**unloaded)
        with pytest.raises(NotDocumented, match="unknown"):
            check(**unloaded | {"sent": b'{"lora_name": "a", "unknown": 1}'})

    def test_the_most_literal_path_is_meant(self) -> None:
        found = {path: operation_at("POST", path) for path in ("/v1/adapters/a/b/merge", "/v1/adapters/unmerge")}
        assert [one and one["operationId"] for one in found.values()] == ["merge", "unmerge"]

    def test_tests_are_held_to_it(self, client: TestClient, engine: FakeEngine, as_documented: list[str]) -> None:
        """A reason that no client has ever heard of, from the engine to the end of the response."""
        engine.script = lambda request: [[token("a"), finish(request, "boredom")]]
        assert client.post("/v1/completions", json={"model": "base", "prompt": "Hi"}).status_code == 200
        [problem] = as_documented
        assert "boredom" in problem
        as_documented.clear()


def test_the_page_in_docs_is_current() -> None:
    written = Path(__file__).parents[2] / "docs" / "api.md"
    command = "make docs (or: python -P -m manylora.server.api.openapi.page > docs/api.md)"
    assert written.read_text() == page(document(routes(), version="")), f"docs/api.md is out of date: {command}"
