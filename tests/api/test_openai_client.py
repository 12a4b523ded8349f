"""The official client, unchanged, sync and async: completions, chats, streams, models, parsed answers, its typed
errors, and the bytes that its streams are made of. Tools are in test_tools_client.py."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.errors import EngineDraining, EngineRefusal, QueueFull
from manylora.server.engine.grammar.grammars import GrammarCompiler
from manylora.server.engine.grammar.vocabulary import GrammarVocabulary
from tests.api.fakes import BOS, EOS, FakeEngine, finish, make_serving, token

KEY = "key-1"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCompiler]:
    tokens = [bytes([byte]) for byte in range(256)] + [b"<s>", b"</s>"]
    compiler = GrammarCompiler(GrammarVocabulary(tokens, [BOS, EOS], [EOS]).trie())
    yield compiler
    compiler.close()


@pytest.fixture
def serving(tmp_path: Path, grammars: GrammarCompiler) -> Serving:
    return replace(make_serving(tmp_path), grammars=grammars)


def ask(serving: Serving, act: Callable[[openai.AsyncOpenAI], Awaitable[Any]], key: str = KEY) -> Any:
    async def main() -> Any:
        app = create_app(serving, ApiConfig(api_keys=(KEY,)))
        transport = httpx.ASGITransport(app=app)
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(
                base_url="http://127.0.0.1:8000/v1", api_key=key, http_client=http, max_retries=0
            ) as client,
        ):
            return await act(client)

    return asyncio.run(main())


@pytest.fixture
def sync_client(connect: Callable[..., TestClient], config: ApiConfig) -> Iterator[openai.OpenAI]:
    http: Any = connect(config)  # a client of the kind that the official one builds on
    with openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=http, max_retries=0) as client:
        yield client


def test_completion(serving: Serving) -> None:
    answer = ask(serving, lambda client: client.completions.create(model="alice", prompt=["a", "b"], logprobs=1))
    assert [choice.text for choice in answer.choices] == [" Hello world"] * 2
    assert answer.choices[0].logprobs.text_offset[:3] == [0, 1, 2]
    assert answer.system_fingerprint.startswith("fp_ba5eba5e_")
    assert answer.usage.total_tokens == 28


def test_chat(serving: Serving) -> None:
    answer = ask(
        serving,
        lambda client: client.chat.completions.create(
            model="base",
            messages=MESSAGES,
            logprobs=True,
            top_logprobs=2,
            n=2,
            user="me",
            extra_body={"top_k": 5, "adapters": [{"name": "alice", "scale": 0.5}]},
        ),
    )
    assert [choice.message.content for choice in answer.choices] == [" Hello world"] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[1].top_logprobs[1].token == "I"


def test_a_message_can_be_sent_back_as_it_came(serving: Serving) -> None:
    async def converse(client: openai.AsyncOpenAI) -> Any:
        first = await client.chat.completions.create(model="base", messages=MESSAGES)
        messages = [*MESSAGES, first.choices[0].message.model_dump(), *MESSAGES]
        return await client.chat.completions.create(model="base", messages=messages)

    assert ask(serving, converse).choices[0].message.content == " Hello world"


def test_streams(serving: Serving) -> None:
    async def stream(client: openai.AsyncOpenAI) -> tuple[str, str, Any]:
        text, said, usage = "", "", None
        async for chunk in await client.completions.create(model="alice", prompt="Hi", stream=True):
            text += chunk.choices[0].text
        async for part in await client.chat.completions.create(
            model="alice", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        ):
            if part.choices:
                said += part.choices[0].delta.content or ""
            usage = part.usage
        return text, said, usage

    text, said, usage = ask(serving, stream)
    assert text == said == " Hello world"
    assert usage.completion_tokens == 12


def test_the_synchronous_client(sync_client: openai.OpenAI) -> None:
    assert sync_client.completions.create(model="alice", prompt="Hi").choices[0].text == " Hello world"
    answer = sync_client.chat.completions.create(model="base:alice", messages=MESSAGES)
    assert answer.choices[0].message.content == " Hello world"
    chunks = list(sync_client.completions.create(model="alice", prompt="Hi", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == " Hello world"
    assert len({chunk.id for chunk in chunks}) == 1
    with sync_client.chat.completions.stream(model="alice", messages=MESSAGES) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.content == " Hello world"
    assert "content.delta" in kinds
    assert sync_client.completions.with_raw_response.create(model="base", prompt="Hi").request_id


def test_models(serving: Serving, sync_client: openai.OpenAI) -> None:
    async def models(client: openai.AsyncOpenAI) -> list[str]:
        assert (await client.models.retrieve("alice")).id == "alice"
        return [model.id async for model in client.models.list()]

    assert ask(serving, models) == ["base", "alice", "org/bob"] == [model.id for model in sync_client.models.list()]
    bob = sync_client.models.retrieve("org/bob")  # which the client sends as %2F
    assert (bob.id, bob.object, bob.owned_by) == ("org/bob", "model", "manylora")


class Egg(pydantic.BaseModel):
    minutes: int
    kind: Literal["soft", "hard"]


class Menu(pydantic.BaseModel):
    eggs: list[Egg]
    note: str | None


MENU = '{"eggs": [{"minutes": 7, "kind": "hard"}], "note": null}'


def test_answers_are_parsed(serving: Serving, engine: FakeEngine, sync_client: openai.OpenAI) -> None:
    """A pydantic model becomes a schema that the output must match, and the output becomes the model."""
    engine.script = lambda request: [[token(MENU)], [finish(request, n=len(MENU))]]
    expected = Menu(eggs=[Egg(minutes=7, kind="hard")], note=None)
    parse: Any = {"model": "base", "messages": MESSAGES, "response_format": Menu}
    assert sync_client.chat.completions.parse(**parse).choices[0].message.parsed == expected
    assert ask(serving, lambda client: client.chat.completions.parse(**parse)).choices[0].message.parsed == expected
    with sync_client.chat.completions.stream(**parse) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == expected
    assert len(engine.requests) == 3
    for request in engine.requests:
        constraint = request.constraint
        assert constraint is not None
        for byte in MENU.encode():
            constraint.accept(byte)
        assert constraint.is_complete


def create(**fields: Any) -> Callable[[openai.AsyncOpenAI], Awaitable[Any]]:
    return lambda client: client.completions.create(**{"model": "base", "prompt": "Hi", **fields})


def test_typed_errors(serving: Serving, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(serving, create(model="nobody"))
    assert missing.value.param == "model"
    assert missing.value.body == {
        "message": "The model `nobody` does not exist.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    with pytest.raises(openai.BadRequestError) as bad:
        ask(serving, create(temperature=-1))
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        ask(serving, create(extra_body={"tempurature": 1}))
    assert unknown.value.param == "tempurature"
    with pytest.raises(openai.AuthenticationError):
        ask(serving, create(), key="wrong")
    engine.refuse = lambda _request: QueueFull(9, 8, 3)
    with pytest.raises(openai.RateLimitError) as full:
        ask(serving, create())
    assert full.value.response.headers["retry-after"] == "3"
    engine.refuse = lambda _request: None
    engine.script = lambda request: [[token("a")], [finish(request, "error", error="broken")]]

    async def stream(client: openai.AsyncOpenAI) -> None:
        async for _ in await client.completions.create(model="base", prompt="Hi", stream=True):
            pass

    with pytest.raises(openai.APIError, match="broken"):
        ask(serving, stream)


REFUSALS: list[tuple[EngineRefusal | None, str | None, dict[str, Any], int, type[openai.APIStatusError]]] = [
    (None, None, {"n": 0}, 400, openai.BadRequestError),
    (None, None, {"model": "nobody"}, 404, openai.NotFoundError),
    (None, None, {"prompt": "x" * (1 << 17)}, 413, openai.APIStatusError),
    (None, None, {"extra_headers": {"content-type": "text/plain"}}, 415, openai.APIStatusError),
    (QueueFull(9, 8, 3), None, {}, 429, openai.RateLimitError),
    (EngineDraining(), None, {}, 503, openai.InternalServerError),
    (None, "broken", {}, 500, openai.InternalServerError),
]


@pytest.mark.parametrize(
    ("refusal", "failure", "fields", "status", "kind"), REFUSALS, ids=[str(status) for *_, status, _ in REFUSALS]
)
@pytest.mark.parametrize("stream", [False, True])
def test_each_status_is_its_exception(
    sync_client: openai.OpenAI,
    engine: FakeEngine,
    refusal: EngineRefusal | None,
    failure: str | None,
    fields: dict[str, Any],
    status: int,
    kind: type[openai.APIStatusError],
    stream: bool,
) -> None:
    """The same whether the answer was to be streamed: what fails before the first token has its status."""
    engine.refuse = lambda _request: refusal
    if failure is not None:
        engine.script = lambda request: [[finish(request, "error", error=failure)]]
    with pytest.raises(kind) as caught:
        sync_client.completions.create(**{"model": "base", "prompt": "Hi", "stream": stream, **fields})
    error = caught.value
    assert error.status_code == status
    assert isinstance(error.body, dict)
    assert error.body.keys() == {"message", "type", "param", "code"}
    assert error.body["code"] == status
    assert error.request_id


def test_a_key_that_may_not(connect: Callable[..., TestClient], config: ApiConfig) -> None:
    guarded: Any = connect(replace(config, api_keys=("user",), admin_key="admin"))
    with (
        openai.OpenAI(base_url="http://127.0.0.1:8000", api_key="user", http_client=guarded, max_retries=0) as client,
        pytest.raises(openai.PermissionDeniedError, match="admin key"),
    ):
        client.delete("/v1/adapters/alice", cast_to=httpx.Response)


def test_a_stream_byte_for_byte(client: TestClient, serving: Serving, engine: FakeEngine) -> None:
    """Everything but the id and the time, for each kind of event."""
    engine.script = lambda request: [[token("é\n")], [token('"'), finish(request, "length", n=3)]]
    fields = {"model": "alice", "stream": True, "stream_options": {"include_usage": True}}
    version = serving.registry.info("alice").version[:12]

    def events(path: str, **prompt: Any) -> list[str]:
        raw = client.post(path, json={**fields, **prompt}).content
        assert raw.endswith(b"\n\n")
        text = re.sub(r'cmpl-[0-9a-f]{32}"', 'cmpl-ID"', raw.decode("ascii"))
        return re.sub(r'"created":\d+', '"created":0', text).split("\n\n")[:-1]

    head = (
        'data: {"id":"cmpl-ID","object":"text_completion","created":0,"model":"alice",'
        f'"system_fingerprint":"fp_ba5eba5e_{version}","choices":['
    )
    assert events("/v1/completions", prompt="Hi") == [
        head + '{"index":0,"text":"\\u00e9\\n","logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":null}',
        head + '{"index":0,"text":"\\"","logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":null}',
        head + '{"index":0,"text":"","logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":null}',
        head + '],"usage":{"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}}',
        "data: [DONE]",
    ]
    head = head.replace("cmpl-ID", "chatcmpl-ID").replace("text_completion", "chat.completion.chunk")
    null = '"logprobs":null,"finish_reason":null}],"usage":null}'
    assert events("/v1/chat/completions", messages=MESSAGES) == [
        head + '{"index":0,"delta":{"role":"assistant","content":""},' + null,
        head + '{"index":0,"delta":{"content":"\\u00e9\\n"},' + null,
        head + '{"index":0,"delta":{"content":"\\""},' + null,
        head + '{"index":0,"delta":{},"logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":null}',
        head + '],"usage":{"prompt_tokens": 19, "completion_tokens": 3, "total_tokens": 22}}',
        "data: [DONE]",
    ]


def test_an_error_in_a_stream_byte_for_byte(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [[token("a")], [finish(request, "error", error="broken")]]
    raw = client.post("/v1/completions", json={"model": "alice", "prompt": "Hi", "stream": True}).content
    error = {"message": "broken", "type": "InternalServerError", "param": None, "code": 500}
    assert raw.endswith(f"\n\ndata: {json.dumps({'error': error})}\n\n".encode())
