"""The fields that say what an output must match: what reaches the engine, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.constraint import Constraint, Grammar
from manylora.server.engine.errors import GrammarQueueFull
from manylora.server.engine.grammar.grammars import GrammarCompiler
from manylora.server.engine.grammar.sources import GrammarSpec
from manylora.server.engine.grammar.vocabulary import GrammarVocabulary
from manylora.server.engine.request import FinishEvent, Request, TokenEvent
from manylora.server.tenants_file import hashed
from tests.api.fakes import BOS, EOS, FakeEngine, make_serving

COMPLETION = {"model": "base", "prompt": "Hi"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "boolean"}},
          "required": ["b", "a"], "additionalProperties": False}  # fmt: skip
MATCH = '{"b": 7, "a": true}'
GBNF = 'root ::= "x" [0-9]+'
TRIE = GrammarVocabulary([bytes([byte]) for byte in range(256)] + [b"<s>", b"</s>"], [BOS, EOS], [EOS]).trie()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    grammars = GrammarCompiler(TRIE)
    yield replace(make_serving(tmp_path), grammars=grammars)
    grammars.close()


def takes(constraint: Constraint, text: str) -> bool:
    """Whether it lets the text through; what it allows was tested elsewhere."""
    try:
        for byte in text.encode():
            constraint.accept(byte)
    except ValueError:
        return False
    return True


FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, '{"x": [1]}', "[1]"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}}, MATCH, '{"a"'),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA, "strict": False, "description": "d"},
            }
        },
        MATCH,
        '{"c"',
    ),
    ({"guided_json": SCHEMA}, MATCH, '{"a"'),
    ({"guided_json": json.dumps(SCHEMA)}, MATCH, '{"a"'),
    ({"guided_regex": "[ab]{2}"}, "ab", "abc"),
    ({"guided_choice": ["red", "green"]}, "green", "gray"),
    ({"guided_grammar": GBNF}, "x12", "y"),
    ({"guided_grammar": 'start: "x" /[0-9]+/'}, "x12", "y"),
    ({"structured_outputs": {"json": SCHEMA}}, MATCH, '{"a"'),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, MATCH, '{"a"'),
    ({"structured_outputs": {"regex": "[ab]{2}"}}, "ab", "ac"),
    ({"structured_outputs": {"choice": ["red"]}}, "red", "blue"),
    ({"structured_outputs": {"grammar": GBNF}}, "x1", "1"),
    ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ({"json_schema": json.dumps(SCHEMA)}, MATCH, '{"a"'),
    ({"json_schema": SCHEMA}, MATCH, '{"a"'),
    ({"regex": "[ab]{2}"}, "ba", "x"),
    ({"ebnf": GBNF}, "x1", "1"),
    ({"guided_regex": "a", "response_format": {"type": "text"}, "guided_json": None}, "a", "b"),
]


@pytest.mark.parametrize(("fields", "good", "bad"), FIELDS)
def test_every_dialect_reaches_the_engine(
    client: TestClient, engine: FakeEngine, fields: dict[str, Any], good: str, bad: str
) -> None:
    for path, body in [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]:
        response = client.post(path, json={**body, **fields, "n": 2})
        assert response.status_code == 200, response.text
        first, second = (request.constraint for request in engine.requests[-2:])
        assert first is not None
        assert second is not None
        assert first is not second, "each choice has an output of its own"
        assert takes(first, good)
        assert not takes(second, bad)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"response_format": None}])
def test_a_request_that_asks_for_nothing_has_none(
    client: TestClient, engine: FakeEngine, fields: dict[str, Any]
) -> None:
    assert client.post("/v1/completions", json={**COMPLETION, **fields}).status_code == 200
    assert engine.requests[-1].constraint is None


def named(**json_schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


WRONG: list[tuple[dict[str, Any], str]] = [
    # What llguidance cannot keep.
    ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
    (named(name="s", schema={"not": {}}), "response_format.json_schema.schema"),
    ({"guided_regex": "(?=a)"}, "guided_regex"),
    ({"guided_grammar": "nonsense"}, "guided_grammar"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs.json"),
    ({"json_schema": "{"}, "json_schema"),
    ({"ebnf": "start: missing"}, "ebnf"),
    ({"guided_choice": ["a", ""]}, "guided_choice"),
    # Of a wrong form.
    ({"response_format": "json_object"}, "response_format"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "text", "json_schema": {"name": "s", "schema": {}}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    (named(schema={}), "response_format.json_schema.name"),
    (named(name="s"), "response_format.json_schema.schema"),
    (named(name="s", schema="{}"), "response_format.json_schema.schema"),
    (named(name="s", schema={}, strict="yes"), "response_format.json_schema.strict"),
    ({"guided_json": 7}, "guided_json"),
    ({"guided_json": [1]}, "guided_json"),
    ({"guided_choice": "red"}, "guided_choice"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [1]}, "guided_choice.0"),
    ({"guided_choice": ["x"] * 5000}, "guided_choice"),
    ({"regex": ["a"]}, "regex"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    # Two at a time.
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"guided_json": {}, "structured_outputs": {"json": {}}}, "structured_outputs.json"),
    # What cannot be kept besides.
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
    # Of other servers, without a meaning here.
    ({"guided_regex": "a", "guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
    ({"guided_json": {}, "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"structural_tag": "{}"}, "structural_tag"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
def test_what_is_wrong_is_named(client: TestClient, engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    for path, body in [("/v1/completions", COMPLETION), ("/v1/chat/completions", {**CHAT, "stream": True})]:
        response = client.post(path, json={**body, **fields})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["type"]) == (param, "BadRequestError")
        assert f"`{param.split('.')[0]}" in error["message"]
    assert engine.requests == []


def test_a_model_without_grammars_says_so(tmp_path: Path, config: ApiConfig) -> None:
    with TestClient(create_app(make_serving(tmp_path), config), base_url="http://127.0.0.1:8000") as client:
        response = client.post("/v1/completions", json={**COMPLETION, "guided_regex": "a"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "guided_regex"
        assert "tokenizer" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_cannot_be_followed_is_the_clients_error(
    client: TestClient, engine: FakeEngine, stream: bool
) -> None:
    def refused(request: Request) -> list[Any]:
        return [
            [TokenEvent("a", (97,))],
            [FinishEvent("error", None, 3, 0, "This output cannot go on: too hard.", is_refusal=True)],
        ]

    engine.script = refused
    response = client.post("/v1/completions", json={**COMPLETION, "guided_regex": "a", "stream": stream})
    if stream:
        *_, last = (line for line in response.text.split("\n") if line.startswith("data: {"))
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert response.status_code == 400
        error = response.json()["error"]
    assert (error["code"], error["type"]) == (400, "BadRequestError")
    assert error["message"] == "This output cannot go on: too hard."


class Slow:
    """Grammars that are compiled when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[GrammarSpec, str]] = []
        self.futures: list[Future[Grammar]] = []
        self.three = asyncio.Event()

    def submit(self, spec: GrammarSpec, tenant: str = "") -> Future[Grammar]:
        self.asked.append((spec, tenant))
        self.futures.append(Future())
        if len(self.asked) == 3:
            self.three.set()
        return self.futures[-1]


def test_nobody_waits_for_a_grammar_but_its_own_requests(tmp_path: Path, config: ApiConfig) -> None:
    slow = Slow()
    serving = replace(make_serving(tmp_path), grammars=slow)

    async def main() -> None:
        transport = httpx.ASGITransport(create_app(serving, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            asking = [
                asyncio.create_task(client.post("/v1/completions", json={**COMPLETION, "guided_regex": "ab"}))
                for _ in range(3)
            ]
            await asyncio.wait_for(slow.three.wait(), 30)
            assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200
            asking[0].cancel()  # its client is gone; the others' grammar is not
            await asyncio.sleep(0.01)
            assert [future.cancelled() for future in slow.futures] == [True, False, False]
            compiler = GrammarCompiler(TRIE)
            for (spec, _), future in zip(slow.asked[1:], slow.futures[1:], strict=True):
                future.set_result(compiler.compile(spec))
            assert [(await task).status_code for task in asking[1:]] == [200, 200]
            compiler.close()

    asyncio.run(main())


def test_an_error_of_the_server_is_no_bad_request(
    tmp_path: Path, connect: Callable[..., TestClient], config: ApiConfig, serving: Serving
) -> None:
    class Broken:
        def submit(self, spec: GrammarSpec, tenant: str = "") -> Future[Grammar]:
            future: Future[Grammar] = Future()
            future.set_exception(RuntimeError("the process that compiles grammars did not start"))
            return future

    app = create_app(replace(serving, grammars=Broken()), config)
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        response = client.post("/v1/completions", json={**COMPLETION, "guided_regex": "ab"})
    assert response.status_code == 500
    assert "did not start" not in response.text


def test_grammars_wait_in_the_queue_of_their_tenant(tmp_path: Path, config: ApiConfig) -> None:
    keys = "".join(
        f'[tenants.{name}]\nadapters = ["*"]\nbase = true\n[[tenants.{name}.keys]]\nsha256 = "{hashed(name).hex()}"\n'
        for name in ("acme", "other")
    )
    (tmp_path / "keys.toml").write_text(keys)
    slow = Slow()
    app = create_app(
        replace(make_serving(tmp_path), grammars=slow), replace(config, keys_file=tmp_path / "keys.toml", admin_key="r")
    )

    def full(spec: GrammarSpec, tenant: str = "") -> Future[Grammar]:
        slow.asked.append((spec, tenant))
        raise GrammarQueueFull(32, 32, 3, tenant)

    slow.submit = full  # type: ignore[method-assign]
    tool = {"type": "function", "function": {"name": "now", "strict": True}}
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        for tenant, path, body in (
            ("acme", "/v1/completions", {**COMPLETION, "guided_regex": "ab"}),
            ("other", "/v1/chat/completions", {**CHAT, "guided_regex": "ab"}),
            ("acme", "/v1/chat/completions", {**CHAT, "tools": [tool], "tool_choice": "required"}),
        ):
            answer = client.post(path, json=body, headers={"Authorization": f"Bearer {tenant}"})
            assert (answer.status_code, answer.headers["Retry-After"]) == (429, "3")
            error = answer.json()["error"]
            assert error["type"] == "RateLimitError"
            assert f"compilation queue of {tenant} is full" in error["message"]
    assert [tenant for _, tenant in slow.asked] == ["acme", "other", "acme"]
