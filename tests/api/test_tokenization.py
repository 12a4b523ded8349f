"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.fakes import BOS


def test_a_prompt(client: TestClient) -> None:
    got = client.post("/tokenize", json={"model": "alice", "prompt": "ab"}).json()
    assert got == {"count": 3, "max_model_len": 512, "tokens": [BOS, 97, 98], "token_strs": None}
    got = client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False, "return_token_strs": True}).json()
    assert got["token_strs"] == ["a", "b"]


def test_a_conversation_uses_the_adapters_template(client: TestClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    plain = client.post("/tokenize", json={"model": "base", "messages": messages}).json()["tokens"]
    own = client.post("/tokenize", json={"model": "org/bob", "messages": messages}).json()["tokens"]
    assert bytes(plain[1:]) == b"user:Hi\nassistant:"
    assert bytes(own[1:]) == b"[own template]user:Hi\nassistant:"


def test_back_to_text(client: TestClient) -> None:
    assert client.post("/detokenize", json={"tokens": [BOS, 97]}).json() == {"prompt": "<s>a"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ("/detokenize", {"tokens": [258]}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, 404, "model"),
    ],
)
def test_bad_requests(client: TestClient, path: str, body: dict[str, Any], status: int, param: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
