"""vLLM's and SGLang's calls to load and unload adapters, byte for byte: status, content type, body."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.api.fakes import FakeEngine, write_adapter

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"


@pytest.fixture
def carol(tmp_path: Path) -> str:
    return str(write_adapter(tmp_path / "carol", '{"r": 4}'))


def error(message: str, type: str, param: str | None, code: int) -> bytes:
    return compact({"error": {"message": message, "type": type, "param": param, "code": code}})


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def answer(client: TestClient, path: str, **body: Any) -> tuple[int, str, bytes]:
    response = client.post(path, json=body)
    return response.status_code, response.headers["content-type"], response.content


class TestVllm:
    def test_load_and_unload(self, client: TestClient, carol: str) -> None:
        load = answer(client, "/v1/load_lora_adapter", lora_name="carol", lora_path=carol)
        assert load == (200, TEXT, b"Success: LoRA adapter 'carol' added successfully.")
        again = answer(client, "/v1/load_lora_adapter", lora_name="carol", lora_path=carol, load_inplace=True)
        assert again == load
        unload = answer(client, "/v1/unload_lora_adapter", lora_name="carol")
        assert unload == (200, TEXT, b"Success: LoRA adapter 'carol' removed successfully.")

    def test_a_name_that_is_taken(self, client: TestClient, carol: str) -> None:
        assert answer(client, "/v1/load_lora_adapter", lora_name="alice", lora_path=carol) == (
            400,
            JSON,
            error(
                "The lora adapter 'alice' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True.",
                "InvalidUserInput",
                "lora_name",
                400,
            ),
        )

    @pytest.mark.parametrize(
        ("body", "param"), [({}, "lora_name"), ({"lora_name": "x"}, "lora_path"), ({"lora_path": "x"}, "lora_name")]
    )
    def test_what_is_left_out(self, client: TestClient, body: dict[str, str], param: str) -> None:
        assert answer(client, "/v1/load_lora_adapter", **body) == (
            400,
            JSON,
            error("Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput", param, 400),
        )

    def test_a_path_that_is_not_there(self, client: TestClient, tmp_path: Path) -> None:
        missing = str(tmp_path / "nowhere")
        status, kind, body = answer(client, "/v1/load_lora_adapter", lora_name="x", lora_path=missing)
        assert (status, kind) == (404, JSON)
        found = json.loads(body)["error"]
        assert (found["type"], found["code"]) == ("NotFoundError", 404)
        assert missing in found["message"]

    def test_what_cannot_be_unloaded(self, client: TestClient) -> None:
        assert answer(client, "/v1/unload_lora_adapter", lora_name="nobody") == (
            404,
            JSON,
            error("The lora adapter 'nobody' cannot be found.", "NotFoundError", "lora_name", 404),
        )
        assert answer(client, "/v1/unload_lora_adapter") == (
            400,
            JSON,
            error("'lora_name' needs to be provided to unload a LoRA adapter.", "InvalidUserInput", "lora_name", 400),
        )


class TestSglang:
    def test_load_and_unload(self, client: TestClient, carol: str, tmp_path: Path) -> None:
        before = {"alice": str(tmp_path / "alice"), "org/bob": str(tmp_path / "bob")}
        load = answer(client, "/load_lora_adapter", lora_name="carol", lora_path=carol, pinned=False)
        with_carol = {"alice": before["alice"], "carol": carol, "org/bob": before["org/bob"]}
        assert load == (200, JSON, compact({"success": True, "error_message": "", "loaded_adapters": with_carol}))
        unload = answer(client, "/unload_lora_adapter", lora_name="carol")
        assert unload == (200, JSON, compact({"success": True, "error_message": "", "loaded_adapters": before}))

    def test_a_failure_says_what_is_loaded_as_well(self, client: TestClient, carol: str, tmp_path: Path) -> None:
        loaded = {"alice": str(tmp_path / "alice"), "org/bob": str(tmp_path / "bob")}
        for path, body in (
            ("/load_lora_adapter", {"lora_name": "alice", "lora_path": carol}),
            ("/load_lora_adapter", {"lora_name": "x", "lora_path": carol + "x"}),
            ("/unload_lora_adapter", {"lora_name": "nobody"}),
        ):
            status, kind, content = answer(client, path, **body)
            assert (status, kind) == (400, JSON)
            found = json.loads(content)
            assert list(found) == ["success", "error_message", "loaded_adapters"]
            assert found["success"] is False
            assert found["error_message"]
            assert found["loaded_adapters"] == loaded

    def test_a_draining_server(self, client: TestClient, engine: FakeEngine, carol: str) -> None:
        engine.is_draining = True
        status, kind, content = answer(client, "/load_lora_adapter", lora_name="carol", lora_path=carol)
        assert (status, kind) == (503, JSON)
        assert json.loads(content)["error"]["type"] == "ServiceUnavailableError"
