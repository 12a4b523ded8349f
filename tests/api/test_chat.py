"""/v1/chat/completions without streaming, and what becomes of the messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from tests.api.fakes import FakeEngine, FakeTokenizer

USER = {"role": "user", "content": "Hi"}


def chat(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"model": "base", "messages": [USER], **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refused(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"model": "base", "messages": [USER], **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.fixture
def templates(serving: Serving) -> list[dict[str, Any]]:
    assert isinstance(serving.tokenizer, FakeTokenizer)
    return serving.tokenizer.templates


def test_the_answer_has_openais_shape(client: TestClient, engine: FakeEngine) -> None:
    answer = chat(client)
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_600_000_000
    prompt = b"user:Hi\nassistant:"
    assert answer == {
        "object": "chat.completion",
        "model": "base",
        "system_fingerprint": "fp_ba5eba5e_base",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": len(prompt) + 1, "completion_tokens": 12, "total_tokens": len(prompt) + 13},
    }
    [request] = engine.requests
    # By default a chat may use the rest of the context.
    assert request.params.max_tokens == 512 - len(prompt) - 1


@pytest.mark.parametrize("fields", [{"max_tokens": 9}, {"max_completion_tokens": 9}])
def test_either_name_of_the_length_is_honoured(client: TestClient, engine: FakeEngine, fields: dict[str, int]) -> None:
    chat(client, **fields)
    assert engine.requests[0].params.max_tokens == 9
    chat(client, max_tokens=9, max_completion_tokens=9)
    assert refused(client, max_tokens=9, max_completion_tokens=8)["param"] == "max_tokens"


def test_n_choices(client: TestClient, engine: FakeEngine) -> None:
    answer = chat(client, n=3, seed=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [request.params.seed for request in engine.requests] == [1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 36


def test_logprobs_have_the_chat_shape(client: TestClient) -> None:
    [choice] = chat(client, logprobs=True, top_logprobs=2)["choices"]
    assert choice["logprobs"]["content"][1] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
        ],
    }
    [choice] = chat(client, logprobs=True)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    assert refused(client, top_logprobs=2)["param"] == "top_logprobs"


def test_messages_are_put_into_the_templates_form(client: TestClient, templates: list[dict[str, Any]]) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": None, "refusal": "I will not.", "annotations": []},
        USER,
    ]
    chat(client, messages=messages)
    parsed = {**call, "function": {"name": "f", "arguments": {"x": 1}}}
    assert templates[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [parsed]},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "I will not."},
        USER,
    ]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "x"}, "messages.0.role"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": 7}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content.0"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages.0.content.0"),
        ({"role": "user", "content": ["x"]}, "messages.0.content.0"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages.0.content.0.text"),
        ({"role": "user", "content": [{"type": "text", "text": "", "cache_control": {}}]}, None),
        ({"role": "user", "content": "x", "mood": "sad"}, "messages.0.mood"),
        ({"role": "user", "content": "x", "name": 1}, "messages.0.name"),
        ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, "messages.0.audio"),
        ({"role": "assistant", "tool_calls": "f()"}, "messages.0.tool_calls"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages.0.tool_calls.0.function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
def test_a_bad_message_is_named(client: TestClient, message: dict[str, Any], param: str | None) -> None:
    error = refused(client, messages=[message])
    assert param is None or error["param"] == param
    assert error["param"] in error["message"]


def test_messages_must_be_a_list_of_objects(client: TestClient) -> None:
    assert refused(client, messages=[])["param"] == "messages"
    assert refused(client, messages="Hi")["param"] == "messages"
    assert refused(client, messages=["Hi"])["param"] == "messages.0"


def test_the_template_refusing_is_the_clients_error(client: TestClient) -> None:
    error = refused(client, messages=[{"role": "user", "content": "refuse me"}])
    assert error["param"] == "messages"
    assert "template" in error["message"]


def test_generation_prompt_and_continuation(client: TestClient, templates: list[dict[str, Any]]) -> None:
    chat(client)
    chat(client, add_generation_prompt=False)
    chat(client, continue_final_message=True)  # implies no generation prompt
    seen = [(call["add_generation_prompt"], call["continue_final_message"]) for call in templates]
    assert seen == [(True, False), (False, False), (False, True)]
    assert refused(client, add_generation_prompt=True, continue_final_message=True)["param"] == "add_generation_prompt"


def test_template_variables(client: TestClient, templates: list[dict[str, Any]]) -> None:
    chat(client, chat_template_kwargs={"enable_thinking": False})
    assert templates[0]["enable_thinking"] is False
    for name in ("messages", "tokenize", "chat_template", "return_dict"):
        assert refused(client, chat_template_kwargs={name: 1})["param"] == "chat_template_kwargs"


def test_a_requests_own_template_is_off_unless_allowed(
    client: TestClient, connect: Callable[..., TestClient], config: ApiConfig, templates: list[dict[str, Any]]
) -> None:
    error = refused(client, chat_template="mine ")
    assert error["param"] == "chat_template"
    assert "--allow-request-chat-template" in error["message"]
    allowing = connect(replace(config, allow_request_chat_template=True))
    chat(allowing, chat_template="mine ")
    assert templates[0]["chat_template"] == "mine "


def test_an_adapters_own_template_is_used_for_it(client: TestClient, templates: list[dict[str, Any]]) -> None:
    chat(client, model="org/bob")
    chat(client, model="alice")
    chat(client)
    assert [call["chat_template"] for call in templates] == ["[own template]", None, None]


def test_a_tools_answer_has_the_name_of_what_was_called(client: TestClient, templates: list[dict[str, Any]]) -> None:
    """Clients do not send it, and Hermes' templates refuse a conversation without it."""
    calls = [{"id": str(i), "function": {"name": f"f{i}"}, "index": i} for i in range(2)]
    answers = [
        {"role": "tool", "tool_call_id": "1", "content": "b"},
        {"role": "tool", "tool_call_id": "0", "content": "a"},
    ]
    chat(client, messages=[USER, {"role": "assistant", "tool_calls": calls}, *answers, answers[0] | {"name": "own"}])
    seen = templates[0]["messages"]
    assert [message["name"] for message in seen[2:]] == ["f1", "f0", "own"]
    assert seen[1]["tool_calls"] == [
        {"id": str(i), "type": "function", "function": {"name": f"f{i}", "arguments": {}}} for i in range(2)
    ]
    chat(client, messages=[USER, {"role": "assistant", "content": "Yes", "tool_calls": [], "parsed": {}}, USER])
    assert "tool_calls" not in templates[1]["messages"][1]


def called(**fields: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return {"role": "assistant", "tool_calls": [call | fields]}


ANSWER = {"role": "tool", "content": "2", "tool_call_id": "1"}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([ANSWER], "messages.0.tool_call_id"),
        ([called(), {**ANSWER, "tool_call_id": "2"}], "messages.1.tool_call_id"),
        ([called(id=None), ANSWER], "messages.1.tool_call_id"),
        ([called(), {"role": "tool", "content": "2"}], "messages.1.tool_call_id"),
        ([called(), {**ANSWER, "content": None}], "messages.1.content"),
        ([called(), {**ANSWER, "role": "user"}], "messages.1.tool_call_id"),
        ([{**called(), "role": "user", "content": ""}], "messages.0.tool_calls"),
        ([called(type="custom")], "messages.0.tool_calls.0.type"),
        ([called(id=1)], "messages.0.tool_calls.0.id"),
        ([called(mood=1)], "messages.0.tool_calls.0.mood"),
        ([called(function={"name": "f", "mood": 1})], "messages.0.tool_calls.0.function.mood"),
        ([called(function={"name": "f", "arguments": "[1]"})], "messages.0.tool_calls.0.function.arguments"),
        ([called(function={"name": "f", "arguments": 1})], "messages.0.tool_calls.0.function.arguments"),
        ([called(function={"name": "f", "arguments": '{"x": '})], "messages.0.tool_calls.0.function.arguments"),
    ],
)
def test_a_conversation_with_tools_must_be_whole(
    client: TestClient, messages: list[dict[str, Any]], param: str
) -> None:
    error = refused(client, messages=messages)
    assert error["param"] == param
    assert param in error["message"]


def test_a_long_conversation_is_refused_with_both_numbers(client: TestClient) -> None:
    error = refused(client, messages=[{"role": "user", "content": "x" * 6000}])
    assert error["param"] == "messages"
    assert "512" in error["message"]
    assert "6017" in error["message"]
