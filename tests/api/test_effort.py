"""Bodies that would cost everybody time, because of what is in them and not of their size, are refused before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.api import body as bodies
from manylora.server.api.prompts import MAX_CHARACTERS_PER_TOKEN
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig

Connect = Callable[..., TestClient]


def test_text_that_cannot_fit_is_not_even_tokenised(
    connect: Connect, config: ApiConfig, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(replace(config, max_body_bytes=1 << 20))
    limit = serving.max_context * MAX_CHARACTERS_PER_TOKEN
    conversation = [{"role": "user", "content": "x" * (limit // 2 + 1)}] * 2
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/completions", {"model": "alice", "prompt": "x" * (limit + 1)}, "prompt"),
        ("/v1/completions", {"model": "alice", "prompt": ["x", "x" * (limit + 1)]}, "prompt"),
        ("/v1/completions", {"model": "base", "prompt": "x" * (limit + 1), "truncate_prompt_tokens": 5}, "prompt"),
        ("/v1/chat/completions", {"model": "base", "messages": conversation}, "messages"),
        ("/tokenize", {"prompt": "x" * (limit + 1)}, "prompt"),
        ("/tokenize", {"messages": conversation}, "messages"),
    ]
    longest: list[int] = []
    monkeypatch.setattr(
        type(serving.tokenizer), "encode", lambda _self, text, _special=True: longest.append(len(text)) or [65]
    )
    assert client.post("/v1/completions", json={"model": "base", "prompt": "x" * limit}).status_code == 200
    for path, body, param in wrong:
        answer = client.post(path, json=body)
        assert answer.status_code == 400, path
        assert answer.json()["error"]["param"] == param
        assert str(limit) in answer.json()["error"]["message"]
    assert max(longest) == limit


def test_bodies_that_would_take_seconds_to_check(
    connect: Connect, config: ApiConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one tenant's body is parsed, everybody waits."""
    client = connect(replace(config, max_body_bytes=1 << 20))
    monkeypatch.setattr(bodies, "MAX_VALUES", 1000)
    monkeypatch.setattr(bodies, "MAX_FIELDS", 100)
    post = client.post
    assert post("/detokenize", json={"tokens": [65] * 1000}).status_code == 200
    too_many = post("/detokenize", json={"tokens": [65] * 1002})
    assert too_many.status_code == 400
    assert "too many values: at most 1000" in too_many.json()["error"]["message"]
    fields = {f"k{i}": 1 for i in range(101)}
    assert "too many fields: at most 100" in post("/detokenize", json=fields).json()["error"]["message"]


def test_errors_that_are_too_far_to_be_looked_for(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_MANY", 128)
    answer = client.post("/detokenize", json={"tokens": [65] * 1000 + ["a"] * 1000})
    assert answer.status_code == 400
    assert "1000 values are wrong" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/detokenize", {"tokens": ["a"] * 5000}, "tokens.0"),
        ("/detokenize", {"tokens": [65] * 70 + ["a"] * 5000}, "tokens.70"),
        ("/detokenize", {"tokens": [65] * 3000 + ["a"] * 5000}, "tokens.3000"),
        ("/v1/chat/completions", {"model": "base", "messages": [1] * 5000}, "messages.0"),
        ("/v1/completions", {"model": "base", "prompt": "x"} | {f"k{i}": 1 for i in range(5000)}, "k0"),
        ("/v1/completions", {f"k{i}": 1 for i in range(5000)}, "model"),
        ("/v1/completions", {"model": "base", "prompt": "x", "adapters": [{f"k{i}": 1 for i in range(500)}]}, None),
    ],
)
def test_of_many_errors_the_first_is_named(client: TestClient, path: str, fields: Any, param: str | None) -> None:
    answer = client.post(path, json=fields)
    assert answer.status_code == 400, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param
