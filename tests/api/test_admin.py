"""Managing adapters, in three dialects."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.adapters.registry import AdapterRegistry
from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from tests.api.fakes import FakeEngine, load_fake, write_adapter

UPLOAD = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def carol(tmp_path: Path) -> str:
    return str(write_adapter(tmp_path / "carol", '{"r": 4}'))


@pytest.fixture
def bad(tmp_path: Path) -> str:
    return str(write_adapter(tmp_path / "bad", "bad"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def connect_to(serving: Serving, config: ApiConfig) -> TestClient:
    return TestClient(create_app(serving, config), base_url="http://127.0.0.1:8000")


def names(client: TestClient) -> list[str]:
    return [model["id"] for model in client.get("/v1/models").json()["data"]][1:]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == status
    return error


class TestVllm:
    def test_load_and_unload(self, client: TestClient, carol: str) -> None:
        response = client.post("/v1/load_lora_adapter", json={"lora_name": "carol", "lora_path": carol})
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain")
        assert response.text == "Success: LoRA adapter 'carol' added successfully."
        assert "carol" in names(client)
        response = client.post("/v1/unload_lora_adapter", json={"lora_name": "carol"})
        assert response.text == "Success: LoRA adapter 'carol' removed successfully."
        assert "carol" not in names(client)

    def test_a_name_in_use(self, client: TestClient, serving: Serving, carol: str) -> None:
        body = {"lora_name": "alice", "lora_path": carol}
        before = serving.registry.info("alice").version
        assert error_of(client.post("/v1/load_lora_adapter", json=body), 400)["type"] == "InvalidUserInput"
        assert serving.registry.info("alice").version == before
        assert client.post("/v1/load_lora_adapter", json={**body, "load_inplace": True}).status_code == 200
        assert serving.registry.info("alice").version != before

    def test_errors(self, client: TestClient, tmp_path: Path, bad: str) -> None:
        load = "/v1/load_lora_adapter"
        missing = client.post(load, json={"lora_name": "x", "lora_path": str(tmp_path / "nowhere")})
        assert error_of(missing, 404)["type"] == "NotFoundError"
        outside = client.post(load, json={"lora_name": "x", "lora_path": "/etc"})
        assert error_of(outside, 400)["type"] == "BadRequestError"
        refused = error_of(client.post(load, json={"lora_name": "x", "lora_path": bad}), 400)
        assert "it is bad" in refused["message"]
        assert "and wrong" in refused["message"]
        assert error_of(client.post(load, json={"lora_name": "x"}), 400)["type"] == "InvalidUserInput"
        assert error_of(client.post(load, json={"lora_path": "x"}), 400)["param"] == "lora_name"
        unknown = client.post(load, json={"lora_name": "x", "lora_path": "y", "rank": 8})
        assert error_of(unknown, 400)["param"] == "rank"
        gone = error_of(client.post("/v1/unload_lora_adapter", json={"lora_name": "x"}), 404)
        assert gone["message"] == "The lora adapter 'x' cannot be found."
        error_of(client.post("/v1/unload_lora_adapter", json={}), 400)
        error_of(client.post(load, json={"lora_name": "a,b", "lora_path": bad}), 400)


class TestSglang:
    def test_load_and_unload(self, client: TestClient, serving: Serving, carol: str) -> None:
        body = {"lora_name": "carol", "lora_path": carol, "pinned": True}
        answer = client.post("/load_lora_adapter", json=body).json()
        assert answer["success"] is True
        assert answer["error_message"] == ""
        assert answer["loaded_adapters"]["carol"] == carol
        assert serving.registry.info("carol").pinned
        answer = client.post("/unload_lora_adapter", json={"lora_name": "carol"}).json()
        assert answer["success"] is True
        assert sorted(answer["loaded_adapters"]) == ["alice", "org/bob"]

    @pytest.mark.parametrize("what", ["bad", "nowhere", "taken"])
    def test_errors(self, client: TestClient, what: str, bad: str, carol: str) -> None:
        path = {"bad": bad, "nowhere": bad + "x", "taken": carol}[what]
        name = "alice" if what == "taken" else "x"
        response = client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": path})
        assert response.status_code == 400
        answer = response.json()
        assert answer["success"] is False
        assert answer["error_message"]
        assert sorted(answer["loaded_adapters"]) == ["alice", "org/bob"]

    def test_unloading_what_is_not_there(self, client: TestClient) -> None:
        response = client.post("/unload_lora_adapter", json={"lora_name": "x"})
        assert response.status_code == 400
        assert response.json()["success"] is False


class TestRest:
    def test_one_adapter(self, client: TestClient, engine: FakeEngine, serving: Serving) -> None:
        engine.resident = ("alice",)
        got = client.get("/v1/adapters/alice").json()
        info = serving.registry.info("alice")
        assert got == {
            "object": "adapter",
            "name": "alice",
            "version": info.version,
            "state": "ready",
            "tier": "device",
            "pinned": False,
            "source": info.source,
            "alias_of": None,
            "base_model": "base",
            "ranks": [8],
            "scales": [2.0],
            "modules": ["q", "v"],
            "n_modules": 4,
            "dtype": "bfloat16",
            "bytes": 1024,
            "warnings": ["careful"],
            "requests_in_flight": 0,
            "prompt_tokens": 30,
            "generation_tokens": 7,
            "loaded_at": info.loaded_at,
            "last_used": None,
            "merged": None,
            "merge": None,
        }
        assert client.get("/v1/adapters/org/bob").json()["tier"] == "host"
        error_of(client.get("/v1/adapters/nobody"), 404)

    def test_list(self, client: TestClient) -> None:
        got = client.get("/v1/adapters").json()
        assert [adapter["name"] for adapter in got["data"]] == ["alice", "org/bob"]

    def test_versions_that_finish_are_listed(self, client: TestClient, serving: Serving, carol: str) -> None:
        ref = serving.registry.acquire("alice")
        client.put("/v1/adapters/alice", json={"source": carol})
        states = [(one["name"], one["state"]) for one in client.get("/v1/adapters").json()["data"]]
        assert states == [("alice", "ready"), ("alice", "draining"), ("org/bob", "ready")]
        serving.registry.release(ref)

    def test_put_from_a_path(self, client: TestClient, carol: str, bad: str) -> None:
        created = client.put("/v1/adapters/team/carol", json={"source": carol})
        assert created.status_code == 201
        assert created.json()["name"] == "team/carol"
        assert client.put("/v1/adapters/team/carol", json={"source": carol}).status_code == 200
        error_of(client.put("/v1/adapters/team/carol", json={"source": carol, "replace": False}), 400)
        error_of(client.put("/v1/adapters/x", json={"source": bad}), 400)
        error_of(client.put("/v1/adapters/x", json={"source": "/nowhere"}), 400)
        error_of(client.put("/v1/adapters/base", json={"source": carol}), 400)
        assert error_of(client.put("/v1/adapters/x", json={}), 400)["param"] == "source"
        error_of(client.put("/v1/adapters/x", content=b"hello"), 415)

    @pytest.mark.parametrize("roots", [(), ("inside",)])
    def test_paths_are_confined_to_the_roots(
        self, connect: Callable[..., TestClient], config: ApiConfig, tmp_path: Path, carol: str, roots: tuple[str, ...]
    ) -> None:
        inside = write_adapter(tmp_path / "inside" / "a").parent
        (inside / "link").symlink_to(carol)
        client = connect(replace(config, adapter_roots=tuple(tmp_path / root for root in roots)))
        escapes = [carol, str(inside / "link"), str(inside / ".." / "carol"), "/etc", str(tmp_path / "not-there")]
        for source in escapes:
            message = error_of(client.put("/v1/adapters/x", json={"source": source}), 400)["message"]
            assert "outside" in message  # whether or not it exists
            body = {"lora_name": "x", "lora_path": source}
            error_of(client.post("/v1/load_lora_adapter", json=body), 400)
            assert client.post("/load_lora_adapter", json=body).status_code == 400
        status = client.put("/v1/adapters/x", json={"source": str(inside / "a")}).status_code
        assert status == (201 if roots else 400)

    def test_aliases(self, client: TestClient, serving: Serving, carol: str) -> None:
        created = client.put("/v1/adapters/prod", json={"alias_of": "alice"})
        assert created.status_code == 201
        alice = serving.registry.info("alice")
        described = created.json()
        assert (described["version"], described["alias_of"]) == (alice.version, "alice")
        client.put("/v1/adapters/alice", json={"source": carol})
        assert client.get("/v1/adapters/prod").json()["version"] == alice.version
        answer = client.post("/v1/completions", json={"model": "prod", "prompt": "x"}).json()
        assert answer["system_fingerprint"].endswith(alice.version[:12])
        moved = client.put("/v1/adapters/prod", json={"alias_of": "alice", "pinned": True})
        assert moved.status_code == 200
        assert moved.json()["version"] == serving.registry.info("alice").version
        assert moved.json()["pinned"]
        error_of(client.put("/v1/adapters/prod", json={"alias_of": "alice", "replace": False}), 400)
        error_of(client.put("/v1/adapters/prod", json={"alias_of": "nobody"}), 404)
        error_of(client.put("/v1/adapters/prod", json={"alias_of": "prod"}), 400)
        both = client.put("/v1/adapters/prod", json={"alias_of": "alice", "source": carol})
        assert error_of(both, 400)["param"] == "source"

    def test_tiers(self, client: TestClient, engine: FakeEngine, carol: str) -> None:
        client.put("/v1/adapters/carol", json={"source": carol})
        client.put("/v1/adapters/prod", json={"alias_of": "alice"})
        engine.resident = ("alice",)
        tiers = {one["name"]: one["tier"] for one in client.get("/v1/adapters").json()["data"]}
        assert tiers == {"alice": "device", "prod": "device", "org/bob": "host", "carol": "disk"}

    def test_pins(self, client: TestClient, carol: str) -> None:
        assert client.patch("/v1/adapters/alice", json={"pinned": True}).json()["pinned"] is True
        # A pin survives being replaced, unless it is taken off.
        assert client.put("/v1/adapters/alice", json={"source": carol}).json()["pinned"] is True
        assert client.put("/v1/adapters/alice", json={"source": carol, "pinned": False}).json()["pinned"] is False
        assert client.put("/v1/adapters/alice", json={"source": carol, "pinned": True}).json()["pinned"] is True
        assert client.patch("/v1/adapters/alice", json={"pinned": False}).json()["pinned"] is False
        error_of(client.patch("/v1/adapters/nobody", json={"pinned": True}), 404)
        assert error_of(client.patch("/v1/adapters/alice", json={}), 400)["param"] == "pinned"
        assert error_of(client.patch("/v1/adapters/alice", json={"pinned": 1}), 400)["param"] == "pinned"

    def test_delete(self, client: TestClient) -> None:
        assert client.delete("/v1/adapters/alice").json() == {
            "object": "adapter.deleted",
            "name": "alice",
            "deleted": True,
        }
        error_of(client.delete("/v1/adapters/alice"), 404)
        error_of(client.post("/v1/completions", json={"model": "alice", "prompt": "x"}), 404)

    def test_there_is_no_other_action(self, client: TestClient) -> None:
        error_of(client.post("/v1/adapters/alice/dance"), 405)

    def test_nothing_is_loaded_while_draining(self, client: TestClient, engine: FakeEngine, carol: str) -> None:
        engine.is_draining = True
        error_of(client.put("/v1/adapters/carol", json={"source": carol}), 503)
        assert client.delete("/v1/adapters/alice").status_code == 200

    def test_others_are_served_while_one_loads(
        self, client: TestClient, serving: Serving, carol: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry = serving.registry
        assert isinstance(registry, AdapterRegistry)
        loading, go_on, real = threading.Event(), threading.Event(), registry._load

        def slow(source: str) -> Any:
            loading.set()
            assert go_on.wait(5)
            return real(source)

        monkeypatch.setattr(registry, "_load", slow)
        done: list[int] = []
        thread = threading.Thread(
            target=lambda: done.append(client.put("/v1/adapters/carol", json={"source": carol}).status_code)
        )
        thread.start()
        assert loading.wait(5)
        assert client.post("/v1/completions", json={"model": "alice", "prompt": "x"}).status_code == 200
        error_of(client.post("/v1/completions", json={"model": "carol", "prompt": "x"}), 404)
        go_on.set()
        thread.join()
        assert done == [201]


def files(config: str = '{"r": 2}', weights: bytes = b"weights", **more: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    pairs = {"adapter_config.json": config.encode(), "adapter_model.safetensors": weights, **more}
    return [("files", (name, content)) for name, content in pairs.items()]


class TestUpload:
    @pytest.fixture
    def uploads(self, config: ApiConfig) -> Path:
        assert config.upload_dir is not None
        return config.upload_dir

    def stored(self, uploads: Path) -> list[str]:
        return sorted(path.name for path in uploads.iterdir()) if uploads.is_dir() else []

    def test_upload_and_delete(self, client: TestClient, serving: Serving, uploads: Path) -> None:
        response = client.put("/v1/adapters/dave", files=files(), data={"pinned": "true"})
        assert response.status_code == 201, response.text
        assert response.json()["pinned"] is True
        directory = Path(serving.registry.info("dave").source)
        assert directory.parent == uploads
        assert (directory / "adapter_model.safetensors").read_bytes() == b"weights"
        assert client.post("/v1/completions", json={"model": "dave", "prompt": "x"}).status_code == 200
        assert client.delete("/v1/adapters/dave").status_code == 200
        assert self.stored(uploads) == []

    def test_replacing_leaves_nothing_behind(self, client: TestClient, uploads: Path, carol: str) -> None:
        client.put("/v1/adapters/dave", files=files())
        first = self.stored(uploads)
        assert client.put("/v1/adapters/dave", files=files('{"r": 3}')).status_code == 200
        assert len(self.stored(uploads)) == 1
        assert self.stored(uploads) != first
        assert client.put("/v1/adapters/dave", json={"source": carol}).status_code == 200
        assert self.stored(uploads) == []

    def test_content_that_two_names_share_stays_for_the_other(self, client: TestClient, uploads: Path) -> None:
        client.put("/v1/adapters/dave", files=files())
        client.put("/v1/adapters/erin", files=files())
        assert len(self.stored(uploads)) == 1
        client.delete("/v1/adapters/dave")
        assert len(self.stored(uploads)) == 1
        # A refused upload of the same content under a name that is taken does not delete it either.
        error_of(client.put("/v1/adapters/alice", files=files(), data={"replace": "false"}), 400)
        assert len(self.stored(uploads)) == 1
        client.delete("/v1/adapters/erin")
        assert self.stored(uploads) == []

    def test_a_refused_upload_is_not_kept(self, client: TestClient, uploads: Path) -> None:
        assert "it is bad" in error_of(client.put("/v1/adapters/dave", files=files("bad")), 400)["message"]
        assert self.stored(uploads) == []

    def test_names_of_files(self, client: TestClient, uploads: Path) -> None:
        response = client.put(
            "/v1/adapters/dave",
            files={"a": ("dir/adapter_config.json", b"{}"), "b": ("..\\adapter_model.safetensors", b"x")},
        )
        assert response.status_code == 201, response.text
        for extra in ("adapter_model.bin", "evil.py", "x/.."):
            error_of(client.put("/v1/adapters/x", files=files(**{extra: b"x"})), 400)
        error_of(client.put("/v1/adapters/x", files=files()[:1]), 400)
        error_of(client.put("/v1/adapters/x", files=[*files(), *files()]), 400)
        error_of(client.put("/v1/adapters/x", files=files(), data={"scale": "2"}), 400)
        error_of(client.put("/v1/adapters/x", files=files(), data={"pinned": "maybe"}), 400)
        assert len(self.stored(uploads)) == 1

    def test_limits(self, client: TestClient, uploads: Path) -> None:
        error_of(client.put("/v1/adapters/x", files=files(weights=b"x" * 200_000)), 413)
        # Within multipart's allowance, but not as the sum of the files.
        error_of(client.put("/v1/adapters/x", files=files(weights=b"x" * 40_000)), 400)
        error_of(client.put("/v1/adapters/x", files=[("f", (f"{i}", b"")) for i in range(20)]), 400)
        assert self.stored(uploads) == []

    def test_a_body_without_a_length_is_limited_too(self, client: TestClient) -> None:
        def chunks() -> Any:
            yield b'--b\r\ncontent-disposition: form-data; name="f"; filename="adapter_model.safetensors"\r\n\r\n'
            for _ in range(200):
                yield b"x" * 1024

        headers = {"content-type": "multipart/form-data; boundary=b"}
        error_of(client.put("/v1/adapters/x", content=chunks(), headers=headers), 413)

    def test_nothing_is_unpacked(self, client: TestClient, uploads: Path) -> None:
        for encoding in ("gzip", "deflate", "br", "zstd", "gzip, identity"):
            error = error_of(client.put("/v1/adapters/x", files=files(), headers={"content-encoding": encoding}), 415)
            assert "must not be compressed" in error["message"]
        plain = client.put("/v1/adapters/plain", files=files(), headers={"content-encoding": "identity"})
        assert plain.status_code == 201
        archive = client.put("/v1/adapters/x", content=b"PK", headers={"content-type": "application/zip"})
        assert "not unpacked" in error_of(archive, 415)["message"]
        archive = client.put("/v1/adapters/x", files=[("f", ("adapter.zip", b"PK"))])
        assert "archives are not unpacked" in error_of(archive, 400)["message"]
        assert len(self.stored(uploads)) == 1

    def test_the_files_stay_while_a_request_may_need_them(
        self, client: TestClient, serving: Serving, uploads: Path
    ) -> None:
        """Its version may have left the device and host memory, and be read again."""
        client.put("/v1/adapters/dave", files=files())
        first = self.stored(uploads)
        ref = serving.registry.acquire("dave")
        client.put("/v1/adapters/dave", files=files('{"r": 3}'))
        client.delete("/v1/adapters/dave")
        assert self.stored(uploads) == first
        serving.registry.release(ref)
        wait_until(lambda: self.stored(uploads) == [])

    def test_an_alias_keeps_them_too(self, client: TestClient, uploads: Path) -> None:
        client.put("/v1/adapters/dave", files=files())
        assert client.put("/v1/adapters/prod", json={"alias_of": "dave"}).status_code == 201
        client.delete("/v1/adapters/dave")
        assert len(self.stored(uploads)) == 1
        client.delete("/v1/adapters/prod")
        assert self.stored(uploads) == []

    def test_after_a_restart(
        self, connect: Callable[..., TestClient], config: ApiConfig, serving: Serving, tmp_path: Path, uploads: Path
    ) -> None:
        """What failed to be restored keeps its files until it is forgotten; what was cut off has none to keep."""
        for name, content in (("f" * 64, "bad"), ("e" * 64, "{}"), (".upload-x", "{}")):
            write_adapter(uploads / name, content)
        state = tmp_path / "state.json"
        entry = {"name": "dave", "source": str(uploads / ("f" * 64)), "pinned": False, "version": "v"}
        state.write_text(json.dumps({"format": 1, "adapters": [entry]}))
        registry = AdapterRegistry(load_fake, state_path=state)
        assert len(registry.restore()) == 1
        client = connect_to(replace(serving, registry=registry, engine=FakeEngine(registry)), config)
        with client:
            assert self.stored(uploads) == ["e" * 64, "f" * 64], "no state file speaks of e: another one may"
            assert client.delete("/v1/adapters/dave").status_code == 200
            assert self.stored(uploads) == ["e" * 64]

    @pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=b"])
    def test_malformed_multipart(self, client: TestClient, kind: str) -> None:
        error_of(client.put("/v1/adapters/x", content=b"nonsense", headers={"content-type": kind}), 400)

    def test_uploads_can_be_off(self, connect: Callable[..., TestClient], config: ApiConfig) -> None:
        client = connect(replace(config, upload_dir=None))
        assert "--state-dir" in error_of(client.put("/v1/adapters/x", files=files()), 403)["message"]
