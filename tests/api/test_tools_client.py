"""Tools through the official client, unchanged: sync, async, streamed; and conversations that go on after a call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from tests.api.fakes import FakeEngine, FakeTokenizer
from tests.api.test_tools import CALL, NAMED, PARIS, TOOLS, USER, grammars, says, serving

__all__ = ["grammars", "serving"]  # fixtures

MESSAGES: Any = [USER]
FIELDS: Any = {"model": "base", "tools": TOOLS}


@pytest.fixture
def client(connect: Callable[..., TestClient], config: ApiConfig) -> Iterator[openai.OpenAI]:
    # The test client is an httpx client: a synchronous one over the application.
    http = connect(config)
    with openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=http, max_retries=0) as client:
        yield client


def test_a_conversation_goes_on_after_a_call(client: openai.OpenAI, engine: FakeEngine, serving: Serving) -> None:
    engine.script = says("Let me see.\n", CALL)
    first = client.chat.completions.create(messages=MESSAGES, **FIELDS)
    [choice] = first.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})

    engine.script = says("It is sunny.")
    answered = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    # The message goes back as the client's own object, which it may.
    second = client.chat.completions.create(messages=[*MESSAGES, choice.message, answered], **FIELDS)
    assert second.choices[0].message.content == "It is sunny."
    assert second.choices[0].message.tool_calls is None
    assert isinstance(serving.tokenizer, FakeTokenizer)
    assert serving.tokenizer.templates[-1]["messages"][1:] == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {"id": call.id, "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "sunny", "name": "get_weather"},
    ]


def test_forced_calls(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = says(CALL)
    for tool_choice, reason in (("required", "tool_calls"), (NAMED, "stop")):
        answer = client.chat.completions.create(messages=MESSAGES, tool_choice=tool_choice, **FIELDS)  # type: ignore[call-overload]
        assert answer.choices[0].message.content is None
        assert answer.choices[0].message.tool_calls[0].function.arguments == PARIS
        assert answer.choices[0].finish_reason == reason


def test_a_stream_put_together_by_the_client(client: openai.OpenAI, engine: FakeEngine) -> None:
    """``chat.completions.stream`` accumulates the deltas itself, and parses the arguments of strict functions."""

    class Weather(pydantic.BaseModel):
        city: str

    engine.script = says("Hm. ", *CALL)
    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    seen: list[str] = []
    with client.chat.completions.stream(model="base", messages=MESSAGES, tools=[tool]) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                seen.append(event.arguments_delta)
        final = stream.get_final_completion().choices[0]
    assert engine.requests[-1].constraint is not None  # the client's tools are strict
    assert "".join(seen) == PARIS
    assert len(seen) > 5
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "Hm."
    [call] = final.message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Paris")
    answered: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    client.chat.completions.create(messages=[*MESSAGES, final.message, answered], **FIELDS)


def test_an_asynchronous_stream(serving: Serving, engine: FakeEngine) -> None:
    engine.script = says(*CALL)

    async def calls() -> AsyncIterator[Any]:
        transport = httpx.ASGITransport(app=create_app(serving, ApiConfig()))
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", http_client=http) as client,
        ):
            async for chunk in await client.chat.completions.create(messages=MESSAGES, stream=True, **FIELDS):
                for call in chunk.choices[0].delta.tool_calls or []:
                    yield call

    async def main() -> list[Any]:
        return [call async for call in calls()]

    first, *rest = asyncio.run(main())
    assert (first.index, first.type, first.function.name, first.function.arguments) == (
        0,
        "function",
        "get_weather",
        "",
    )
    assert first.id.startswith("call_")
    assert "".join(call.function.arguments for call in rest) == PARIS
    assert all((call.index, call.id, call.function.name) == (0, None, None) for call in rest)


def test_a_refusal_is_the_clients_error_class(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(messages=MESSAGES, model="org/bob", tools=FIELDS["tools"])
    assert refused.value.param == "tools"
