"""The front before the server's real application, several times over: what a client sees is what one server answers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from manylora.adapters.registry import AdapterRegistry
from manylora.deploy.ray_serve.calls import call, whole
from manylora.deploy.ray_serve.fleet import Changed, Fleet, NotChanged, Status
from manylora.deploy.ray_serve.fleet_state import FleetFiles, FleetState
from manylora.deploy.ray_serve.following import follow, state_of
from manylora.deploy.ray_serve.front import Front, Page
from manylora.deploy.ray_serve.member import FleetLost, Member
from manylora.deploy.ray_serve.relay import Elsewhere, Overcrowded, Part, Patience, ReplicaLost, Taken
from manylora.deploy.ray_serve.routes import Body, Message, Route, Scope
from manylora.server.api.app import create_app
from manylora.server.api.managing.stored_uploads import StoredUploads
from manylora.server.config import ApiConfig
from tests.api.fakes import make_serving, write_adapter
from tests.deploy.members import LEASE_S, WAIT_S

pytestmark = pytest.mark.timeout(60)


class NoMerges:
    current = None

    def merge(self, name: str, mode: str) -> None:
        raise AssertionError

    def unmerge(self) -> None:
        raise AssertionError


class KeptUploads(StoredUploads):
    def sweep(self) -> None:
        pass


class Server:
    """``local.LocalServer`` over the scripted engine."""

    def __init__(self, folder: Path, config: ApiConfig) -> None:
        self.serving = replace(make_serving(folder), merges=None)
        assert isinstance(self.serving.registry, AdapterRegistry)
        self.registry = self.serving.registry
        self.app: FastAPI = create_app(self.serving, replace(config, upload_dir=None))
        if config.upload_dir is not None:
            uploads = KeptUploads(config.upload_dir, self.registry, config.max_upload_bytes)
            self.app.state.manylora = replace(self.app.state.manylora, uploads=uploads)

    def state(self) -> FleetState:
        return state_of(self.registry, NoMerges())

    def follow(self, state: FleetState) -> Mapping[str, str]:
        return follow(state, self.registry, NoMerges())

    def seed(self, state: FleetState, *, restore: bool) -> FleetState:
        return self.state()

    async def perform(self, scope: Scope, body: Body) -> list[Message]:
        return await whole(self.app, scope, body)


class Line:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.is_cut = False

    async def change(self, scope: Scope, body: Body) -> Changed:
        if self.is_cut:
            raise FleetLost("cut")
        return await self._fleet.change(scope, body)

    async def status(self) -> Status:
        if self.is_cut:
            raise FleetLost("cut")
        return self._fleet.status()


class Replicas:
    """Requests go to the first server that they have not been at, unless a test says otherwise."""

    def __init__(self, servers: dict[str, Server], members: dict[str, Member]) -> None:
        self.servers, self.members = servers, members
        self.routes: list[Route] = []
        self.dies_after: dict[str, int] = {}
        """Of a replica, the batches of messages after which it dies; once."""
        self.is_full = False

    async def ask(self, route: Route, scope: Scope, body: Body) -> AsyncGenerator[Part, None]:
        if self.is_full:
            raise Overcrowded("So many requests wait for a replica already that this one may not.")
        self.routes.append(route)
        name = next((name for name in self.servers if name not in route.avoid), next(iter(self.servers)))
        lack = self.members[name].lacks(route.adapters)
        if lack is not None:
            yield Elsewhere(name, lack, is_passing=self.members[name].term < 0)
            return
        n, left = 0, self.dies_after.pop(name, None)
        async with contextlib.aclosing(call(self.servers[name].app, scope, body)) as answer:
            async for messages in answer:
                if n == left:
                    self.servers = {other: server for other, server in self.servers.items() if other != name}
                    raise ReplicaLost("died")
                if n == 0:
                    yield Taken(name)
                yield messages
                n += 1

    async def ask_all(self, scope: Scope) -> Mapping[str, Page]:
        pages = {}
        for name, server in self.servers.items():
            messages = await whole(server.app, scope, Body())
            body = b"".join(message.get("body", b"") for message in messages[1:])
            pages[name] = Page(messages[0]["status"], list(messages[0]["headers"]), body)
        return pages


@contextlib.asynccontextmanager
async def fleet_of(
    tmp_path: Path, config: ApiConfig, n: int = 2
) -> AsyncIterator[tuple[httpx.AsyncClient, Replicas, Line]]:
    """A client of a front before ``n`` servers, and what stands behind it."""
    fleet = Fleet(FleetFiles(tmp_path / "state"), "session", lease_s=LEASE_S, wait_s=WAIT_S)
    servers = {f"r{i}": Server(tmp_path, config) for i in range(n)}
    members = {name: Member(name, "flags", server, fleet) for name, server in servers.items()}
    running = [asyncio.ensure_future(member.run()) for member in members.values()]
    replicas, line = Replicas(servers, members), Line(fleet)
    front = Front(config, replicas, line, tmp_path / "spool", Patience(lost=3, wait_s=1.0))
    try:
        for member in members.values():
            await asyncio.wait_for(member.wait_until_serving(), 10)
        transport = httpx.ASGITransport(front)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=20) as client:
            yield client, replicas, line
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)


@pytest.fixture
def config(tmp_path: Path) -> ApiConfig:
    return ApiConfig(
        adapter_roots=(tmp_path,), upload_dir=tmp_path / "state" / "uploads", max_body_bytes=4096, max_upload_bytes=4096
    )


BODY = {"model": "alice", "prompt": "hi", "max_tokens": 8}
ASKED: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/completions", {"json": BODY}),
    ("POST", "/v1/completions", {"json": BODY | {"stream": True, "stream_options": {"include_usage": True}}}),
    ("POST", "/v1/chat/completions", {"json": {"model": "base", "messages": [{"role": "user", "content": "hi"}]}}),
    ("POST", "/v1/completions", {"json": BODY | {"model": "nobody"}}),
    ("POST", "/v1/completions", {"json": BODY | {"best_off": 3}}),
    ("POST", "/v1/completions", {"json": BODY | {"prompt": "x" * 600}}),
    ("POST", "/v1/completions", {"json": BODY | {"prompt": "x" * 5000}}),
    ("POST", "/v1/completions", {"content": b"{", "headers": {"content-type": "application/json"}}),
    ("POST", "/v1/completions", {"content": b"{}"}),
    ("GET", "/v1/completions", {}),
    ("GET", "/v1/models", {}),
    ("GET", "/v1/models/org/bob", {}),
    ("GET", "/v1/adapters/alice", {}),
    ("GET", "/nowhere", {}),
    ("GET", "/", {}),
    ("GET", "/openapi.json", {}),
    ("GET", "/health", {}),
    ("GET", "/ready", {}),
    ("POST", "/health", {}),
    ("POST", "/tokenize", {"json": {"model": "base", "prompt": "hi"}}),
    ("PUT", "/v1/adapters/new", {"json": {"source": "/elsewhere"}}),
    ("PUT", "/v1/adapters/new", {"json": {"sauce": "x"}}),
    ("PUT", "/v1/adapters/alice", {"json": {"source": "/elsewhere"}, "headers": {"host": "evil.example"}}),
    ("DELETE", "/v1/adapters/nobody", {}),
    ("POST", "/v1/load_lora_adapter", {"json": {"lora_name": "alice"}}),
    ("POST", "/unload_lora_adapter", {"json": {"lora_name": "nobody"}}),
    ("PUT", "/v1/adapters/new", {"files": {"f": ("adapter_config.json", b"x" * 100_000)}}),
    ("PUT", "/v1/adapters/new", {"files": {"f": ("weights.pt", b"x")}}),
]
OWN = {"x-manylora-replica", "x-manylora-fleet", "x-request-id"}
CHANGING = ("id", "created", "loaded_at")


def comparable(response: httpx.Response) -> Any:
    text = response.text
    headers = {name: value for name, value in response.headers.items() if name not in OWN | {"content-length"}}
    if "json" in response.headers.get("content-type", "") and "openapi" not in text:
        text = without(json.loads(text))
    elif "event-stream" in response.headers.get("content-type", ""):
        events = [line.removeprefix("data: ") for line in text.split("\n\n")]
        text = [without(json.loads(event)) if event.startswith("{") else event for event in events]
    return response.status_code, headers, text


def without(value: Any) -> Any:
    """Without what is another in each answer."""
    if isinstance(value, dict):
        return {key: without(of) for key, of in value.items() if key not in CHANGING}
    return [without(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("method", "path", "settings"), ASKED, ids=lambda value: str(value)[:40])
def test_every_answer_is_one_server_s(
    tmp_path: Path, config: ApiConfig, method: str, path: str, settings: dict[str, Any]
) -> None:
    headers = {"x-request-id": "the-id", **settings.pop("headers", {})}

    async def main() -> None:
        app = create_app(make_serving(tmp_path), config)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as one:
            expected = await one.request(method, path, headers=headers, **settings)
        async with fleet_of(tmp_path, config) as (client, _, _):
            answer = await client.request(method, path, headers=headers, **settings)
        assert comparable(answer) == comparable(expected)
        assert "x-request-id" not in answer.headers, "Ray's proxy adds it, once"

    asyncio.run(main())


def test_a_body_that_does_not_say_how_long_it_is_is_refused_by_a_replica(tmp_path: Path, config: ApiConfig) -> None:
    async def too_long() -> AsyncIterator[bytes]:
        yield json.dumps(BODY | {"prompt": "x" * 5000}).encode()

    async def main() -> None:
        async with fleet_of(tmp_path, config) as (client, _, _):
            headers = {"content-type": "application/json"}
            answer = await client.post("/v1/completions", content=too_long(), headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "ContentTooLargeError")

    asyncio.run(main())


def test_a_name_goes_to_the_router_as_the_body_has_it(tmp_path: Path, config: ApiConfig) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, config) as (client, replicas, _):
            await client.post("/v1/completions", json=BODY)
            await client.post("/v1/completions", json=BODY | {"model": "base", "adapters": [{"name": "alice"}]})
            await client.get("/v1/models")
            assert [route.adapters for route in replicas.routes] == [("alice",), ("alice",), ()]

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_dies_before_it_answers_is_not_seen(tmp_path: Path, config: ApiConfig, stream: bool) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, config) as (client, replicas, _):
            replicas.dies_after["r0"] = 0
            answer = await client.post("/v1/completions", json=BODY | {"stream": stream})
            assert answer.status_code == 200
            assert answer.headers["x-manylora-replica"] == "r1"
            assert "error" not in answer.text

    asyncio.run(main())


def test_a_stream_whose_replica_dies_ends_with_an_error_event(tmp_path: Path, config: ApiConfig) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, config) as (client, replicas, _):
            replicas.dies_after["r0"] = 1
            answer = await client.post("/v1/completions", json=BODY | {"stream": True})
            events = answer.text.removesuffix("\n\n").split("\n\n")
            assert answer.status_code == 200
            assert " Hello" in events[0]
            assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == 503
            assert "[DONE]" not in answer.text

    asyncio.run(main())


def test_a_change_is_everywhere_and_says_so(tmp_path: Path, config: ApiConfig) -> None:
    source = write_adapter(tmp_path / "carol", '{"r": 4}')

    async def main() -> None:
        async with fleet_of(tmp_path, config, 3) as (client, replicas, _):
            answer = await client.put("/v1/adapters/carol", json={"source": str(source), "pinned": True})
            assert answer.status_code == 201
            assert answer.headers["x-manylora-fleet"] == "replicas=3 incomplete=0"
            version = answer.json()["version"]
            infos = [server.registry.info("carol") for server in replicas.servers.values()]
            assert [(info.version, info.pinned) for info in infos] == [(version, True)] * 3
            assert (await client.delete("/v1/adapters/carol")).status_code == 200
            for server in replicas.servers.values():
                assert "carol" not in [info.name for info in server.registry.list()]

    asyncio.run(main())


def test_an_upload_is_everywhere_and_its_way_is_cleaned(tmp_path: Path, config: ApiConfig) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, config) as (client, replicas, _):
            files = {"f": ("adapter_config.json", io.BytesIO(b'{"r": 2}')),
                     "g": ("adapter_model.safetensors", io.BytesIO(b"x"))}  # fmt: skip
            answer = await client.put("/v1/adapters/dora", files=files)
            assert answer.status_code == 201, answer.text
            assert answer.headers["x-manylora-fleet"] == "replicas=2 incomplete=0"
            versions = {server.registry.info("dora").version for server in replicas.servers.values()}
            assert versions == {answer.json()["version"]}
            assert list((tmp_path / "spool").iterdir()) == []
            await client.delete("/v1/adapters/dora")
            assert list((tmp_path / "state" / "uploads").iterdir()) == []

    asyncio.run(main())


def test_who_has_no_admin_key_uploads_nothing(tmp_path: Path, config: ApiConfig) -> None:
    config = replace(config, admin_key="admin", api_keys=("user",))

    async def main() -> None:
        async with fleet_of(tmp_path, config) as (client, replicas, _):
            read = False

            async def endless() -> AsyncIterator[bytes]:
                nonlocal read
                yield b"--x\r\n"
                read = True
                yield b"--x--"

            headers = {"content-type": "multipart/form-data; boundary=x"}
            for key, status in ((None, 401), ("wrong", 401), ("user", 403)):
                bearer = {} if key is None else {"authorization": f"Bearer {key}"}
                answer = await client.put("/v1/adapters/new", content=endless(), headers=headers | bearer)
                assert answer.status_code == status
                assert answer.json()["error"]["code"] == status
            assert not read
            assert not (tmp_path / "spool").exists()
            assert replicas.routes == []

    asyncio.run(main())


def test_keys_are_looked_at_before_a_body_is_read(
    tmp_path: Path, config: ApiConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, api_keys=("user",))

    async def main() -> None:
        async with fleet_of(tmp_path, config) as (client, _, _):
            read = False

            async def body() -> AsyncIterator[bytes]:
                nonlocal read
                read = True
                yield b"{}"

            with caplog.at_level("INFO", logger="manylora.access"):
                answer = await client.post("/v1/completions", content=body())
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert not read
            assert [one.manylora_fields["route"] for one in caplog.records] == ["/v1/completions"]
            caplog.clear()
            bearer = {"authorization": "Bearer user"}
            with caplog.at_level("INFO", logger="manylora.access"):
                assert (await client.post("/v1/completions", json=BODY, headers=bearer)).status_code == 200
            assert len(caplog.records) == 1, "it is logged where it is answered"
            assert (await client.get("/")).status_code == 200

    asyncio.run(main())


def test_a_request_that_waits_too_long_for_a_replica_is_a_504(tmp_path: Path, config: ApiConfig) -> None:
    class Never(Replicas):
        async def ask(self, route: Route, scope: Scope, body: Body) -> AsyncGenerator[Part, None]:
            await asyncio.sleep(60)
            yield Taken("r0")

    async def main() -> None:
        async with fleet_of(tmp_path, config) as (_, replicas, line):
            front = Front(config, Never(replicas.servers, replicas.members), line, tmp_path, Patience(begin_s=0.05))
            transport = httpx.ASGITransport(front)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                answer = await client.post("/v1/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "TimeoutError")

    asyncio.run(main())


def test_what_the_front_has_to_say_itself_has_the_server_s_shape(tmp_path: Path, config: ApiConfig) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, config) as (client, replicas, line):
            replicas.is_full = True
            crowded = await client.post("/v1/completions", json=BODY)
            replicas.is_full = False
            line.is_cut = True
            change = await client.delete("/v1/adapters/alice")
            ready = await client.get("/ready")
            for member in replicas.members.values():
                member.missing = {"alice": "its files are gone"}
            missing = await client.post("/v1/completions", json=BODY)
            other = await client.post("/v1/completions", json=BODY | {"model": "base"})
            assert other.status_code == 200
            found = [(one.status_code, one.json()["error"]["type"]) for one in (crowded, change, ready, missing)]
            assert found == [(429, "RateLimitError"), *[(503, "ServiceUnavailableError")] * 3]
            for one in (crowded, change, ready, missing):
                assert set(one.json()["error"]) == {"message", "type", "param", "code"}
                assert int(one.headers["retry-after"]) > 0
            assert "its files are gone" in missing.json()["error"]["message"]

    asyncio.run(main())


def test_a_change_that_could_not_be_made_is_told(tmp_path: Path, config: ApiConfig) -> None:
    class Refusing(Line):
        async def change(self, scope: Scope, body: Body) -> Changed:
            raise NotChanged(500, "No space left on device. Every replica goes back to what it had.")

    async def main() -> None:
        async with fleet_of(tmp_path, config) as (_, replicas, line):
            front = Front(config, replicas, Refusing(line._fleet), tmp_path / "spool")
            transport = httpx.ASGITransport(front)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                answer = await client.delete("/v1/adapters/alice")
        assert answer.status_code == 500
        assert answer.json()["error"]["message"].startswith("No space left on device.")

    asyncio.run(main())


def test_metrics_are_of_all_replicas_or_refused_as_one_server_refuses_them(tmp_path: Path, config: ApiConfig) -> None:
    async def main() -> None:
        async with fleet_of(tmp_path, config) as (client, _, _):
            page = await client.get("/metrics")
            assert 'up{replica="r0"} 1.0' in page.text
            assert 'up{replica="r1"} 1.0' in page.text
            assert page.headers["content-type"].startswith("text/plain")
        closed = replace(config, admin_key="admin", protect_metrics=True)
        async with fleet_of(tmp_path / "other", closed) as (client, _, _):
            assert (await client.get("/metrics")).status_code == 401
            admin = {"authorization": "Bearer admin"}
            assert (await client.get("/metrics", headers=admin)).status_code == 200

    asyncio.run(main())


def test_a_client_that_leaves_aborts_its_request(tmp_path: Path, config: ApiConfig) -> None:
    from tests.api.fakes import FakeEngine, endless

    async def main() -> None:
        async with fleet_of(tmp_path, config, 1) as (_, replicas, line):
            engine = replicas.servers["r0"].serving.engine
            assert isinstance(engine, FakeEngine)
            engine.script = endless
            front = Front(config, replicas, line, tmp_path / "spool")
            asked, answered = asyncio.Event(), asyncio.Event()
            sent: list[Message] = []

            async def receive() -> Message:
                if not asked.is_set():
                    asked.set()
                    data = json.dumps(BODY | {"stream": True}).encode()
                    return {"type": "http.request", "body": data, "more_body": False}
                await answered.wait()
                return {"type": "http.disconnect"}

            async def send(message: Message) -> None:
                sent.append(message)
                answered.set()

            headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
            scope = {
                "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/completions", "raw_path": b"",
                "query_string": b"", "headers": headers, "scheme": "http", "server": ("127.0.0.1", 1),
                "client": ("127.0.0.1", 2), "root_path": "", "asgi": {"version": "3.0"},
            }  # fmt: skip
            await asyncio.wait_for(front(scope, receive, send), 10)
            assert engine.aborted
            assert engine.n_live == 0

    asyncio.run(main())
