"""The official client, unchanged: completions, chats, streams, models and its typed errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.errors import QueueFull
from tests.api.fakes import FakeEngine, finish, token

KEY = "key-1"


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


MESSAGES: Any = [{"role": "user", "content": "Hi"}]


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


def test_models(serving: Serving) -> None:
    async def models(client: openai.AsyncOpenAI) -> list[str]:
        assert (await client.models.retrieve("alice")).id == "alice"
        return [model.id async for model in client.models.list()]

    assert ask(serving, models) == ["base", "alice", "org/bob"]


def test_typed_errors(serving: Serving, engine: FakeEngine) -> None:
    def create(**fields: Any) -> Callable[[openai.AsyncOpenAI], Awaitable[Any]]:
        return lambda client: client.completions.create(**{"model": "base", "prompt": "Hi", **fields})

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
