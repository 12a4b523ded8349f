"""What is not honoured is refused, and the refusal names the field: types, ranges, unknown and unserved fields."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.api.body import _NO_EFFECT
from tests.api.fakes import FakeEngine

COMPLETION = {"model": "base", "prompt": "Hi"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}

BAD: list[tuple[str, Any]] = [
    *[("prompt", value) for value in (7, [], True, [True], [1, "a"], ["a", 1], [[1], "a"], [[True]], [1.5], {})],
    *[("prompt", value) for value in ([258], [-1], [[1], [10**12]], [[]])],
    *[("max_tokens", value) for value in (0, -1, 1.5, "7", True)],
    *[("temperature", value) for value in (-0.1, "1", True, 1e308)],
    *[("top_p", value) for value in (0, 1.01, -1)],
    *[("top_k", value) for value in (-2, 1.5, True)],
    *[("min_p", value) for value in (-0.1, 1.1)],
    *[("n", value) for value in (0, 129, True, "2")],
    *[("best_of", value) for value in (0, 129, True)],
    *[("seed", value) for value in (1.5, 2**63, -(2**63) - 1, "x", False)],
    *[("presence_penalty", value) for value in (-2.1, 2.1, True)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1)],
    *[("repetition_penalty", value) for value in (0, -1, 1000)],
    *[("logit_bias", value) for value in ({"a": 1}, {"-1": 1}, {"258": 1}, {"1": 101}, {"1": True}, {"1": "x"}, [1])],
    *[("logit_bias", value) for value in ({"²": 1}, {"12345678901234567890": 1})],
    *[(name, value) for name in ("logprobs", "prompt_logprobs") for value in (-1, 21, 1.5, True)],
    *[("cache_salt", value) for value in ("", "x" * 1025, 7)],
    *[("speculative_config", value) for value in (True, 4, "ngram", [], {"method": "eagle"}, {"model": "small"})],
    *[("speculative_config", {"num_speculative_tokens": value}) for value in (0, 9, 65, 1.5, True)],
    *[("speculative_config", {"prompt_lookup_min": value}) for value in (0, 9, 65)],
    *[("allowed_token_ids", value) for value in ([], [258], [-1], [True], 7)],
    *[("bad_words", value) for value in ([""], ["x" * 257], ["x"] * 129, "x", [7])],
    *[(name, 1) for name in ("return_token_ids", "return_tokens_as_token_ids", "spaces_between_special_tokens")],
    *[("stop", value) for value in ("", [""], ["x"] * 17, 7, [7])],
    *[("stop_token_ids", value) for value in ([258], [-1], [True], ["1"], 7)],
    *[("min_tokens", value) for value in (-1, 17, True)],
    *[("priority", value) for value in (1.5, 2**63, True)],
    *[("truncate_prompt_tokens", value) for value in (-2, 0, True)],
    *[("stream", value) for value in (1, "true")],
    *[("stream_options", value) for value in ({}, {"include_usage": True}, 7)],
    *[(flag, 1) for flag in ("echo", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens")],
    *[("add_special_tokens", "yes"), ("lora_path", 7), ("lora_path", ["alice"])],
    *[("adapters", value) for value in ([], "alice", {"name": "alice"}, [{"name": str(i)} for i in range(9)])],
    *[("adapters", value) for value in ([{"name": "alice"}] * 2, [{"name": "a"}, {"name": "b"}, {"name": "a"}])],
    *[("model", value) for value in (7, True)],
    # Served by others, not here yet.
    *[("suffix", "x")],
    *[("response_format", {"type": "json_object"}), ("guided_json", {}), ("guided_regex", "a"), ("guided_choice", [])],
    *[("guided_grammar", "g"), ("use_beam_search", True), ("length_penalty", 2)],
    *[("store", True), ("service_tier", "flex"), ("user", 7)],
    *[("store", 0), ("length_penalty", True), ("metadata", "x")],
    # Unknown, or another route's.
    *[("messages", []), ("top_logprobs", 1), ("max_completion_tokens", 1), ("tempurature", 1), ("regexp", "x")],
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: json.dumps(value)[:30])
def test_a_bad_field_of_a_completion_is_named(client: TestClient, engine: FakeEngine, field: str, value: Any) -> None:
    response = client.post(
        "/v1/completions",
        content=json.dumps({**COMPLETION, field: value}),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == 400
    assert error["type"] == "BadRequestError"
    assert error["param"].partition(".")[0] == field
    assert field in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", 3),
        ("top_logprobs", 21),
        ("max_completion_tokens", 0),
        ("prompt", "x"),
        ("best_of", 1),
        ("echo", True),
        ("add_special_tokens", True),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("modalities", ["text", "audio"]),
        ("audio", {}),
        ("prediction", {}),
        ("reasoning_effort", "low"),
        ("web_search_options", {}),
        ("documents", [{}]),
        ("chat_template_kwargs", []),
        ("add_generation_prompt", "yes"),
        ("foo", 1),
    ],
)
def test_a_bad_field_of_a_chat_is_named(client: TestClient, field: str, value: Any) -> None:
    response = client.post("/v1/chat/completions", json={**CHAT, field: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].partition(".")[0] == field


@pytest.mark.parametrize("options", [{"include_usage": 1}, {"extra": True}, {"continuous_usage_stats": True}])
def test_bad_stream_options_are_named(client: TestClient, options: dict[str, Any]) -> None:
    response = client.post("/v1/completions", json={**COMPLETION, "stream": True, "stream_options": options})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("stream_options.")


@pytest.mark.parametrize("use", [{}, {"name": ""}, {"name": "alice", "scale": 101}, {"name": "alice", "weight": 1}])
def test_a_bad_adapter_use_is_named(client: TestClient, use: dict[str, Any]) -> None:
    response = client.post("/v1/completions", json={**COMPLETION, "adapters": [use]})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("adapters.0.")


@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty", "logit_bias"])
def test_numbers_beyond_double_precision_are_refused(client: TestClient, field: str) -> None:
    value = '{"1": 1e999}' if field == "logit_bias" else "1e999"
    raw = f'{{"model": "base", "prompt": "x", "{field}": {value}}}'
    response = client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_a_prompt_without_tokens_is_refused(client: TestClient) -> None:
    """An empty text is a prompt where the tokeniser begins it with a token, and none where it does not."""
    body = {**COMPLETION, "prompt": ""}
    assert client.post("/v1/completions", json=body).status_code == 200
    response = client.post("/v1/completions", json={**body, "add_special_tokens": False})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_required_fields(client: TestClient, missing: str) -> None:
    for absent in ({}, {missing: None}):
        body = {key: value for key, value in COMPLETION.items() if key != missing} | absent
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"] == {
            "message": f"`{missing}` is required.",
            "type": "BadRequestError",
            "param": missing,
            "code": 400,
        }


def test_null_means_not_given(client: TestClient) -> None:
    nulls = dict.fromkeys(["temperature", "stop", "logit_bias", "seed", "suffix", "never_heard_of", "stream_options"])
    assert client.post("/v1/completions", json={**COMPLETION, **nulls}).status_code == 200
    nulls = dict.fromkeys(["tools", "tool_choice", "response_format", "audio", "chat_template"])
    assert client.post("/v1/chat/completions", json={**CHAT, **nulls}).status_code == 200


NEUTRAL = {
    "user": "u",
    "safety_identifier": "s",
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "store": False,
    "service_tier": "auto",
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "suffix": "",
    "use_beam_search": False,
    "length_penalty": 1.0,
    "logits_processors": [],
    "return_token_ids": False,
    "return_hidden_states": False,
    "no_stop_trim": False,
    "documents": [],
}


def test_what_changes_nothing_is_taken(client: TestClient) -> None:
    assert client.post("/v1/completions", json={**COMPLETION, **NEUTRAL, "best_of": 1}).status_code == 200
    assert client.post("/v1/chat/completions", json={**CHAT, **NEUTRAL, "echo": False}).status_code == 200


def test_the_tables_agree() -> None:
    """Every field that may be neutral has a neutral value here, and every other is refused whatever its value."""
    for name, harmless in _NO_EFFECT.items():
        if name in NEUTRAL:
            assert harmless(NEUTRAL[name])
        else:
            assert not any(harmless(value) for value in (True, False, 0, 1, "", "x", [], {}, 1.0))


def test_too_many_choices(client: TestClient) -> None:
    response = client.post("/v1/completions", json={**COMPLETION, "prompt": ["x"] * 10, "n": 100})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"
    assert "1000" in response.json()["error"]["message"]
