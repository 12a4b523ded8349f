"""A real fleet: ``python -m manylora.deploy.ray_serve`` on the demo base, with a Ray cluster of its own on one machine.

One fleet for the whole file, as each start takes a while; the tests build on each other, and so come in this order. It
begins with one replica and may have two.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("ray", reason="the extra `ray` is not installed")

from tests.e2e import server_process
from tests.e2e.adapters import write_adapter
from tests.e2e.server_process import BASE, Server, demo_flags, greedy, put_adapter, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ADAPTERS = ("a", "b", "c", "uploaded")
REPLICA = "x-manylora-replica"


@dataclass
class Fleet:
    server: Server
    folder: Path
    """With the adapters' directories: a, b, c, a2."""

    @property
    def url(self) -> str:
        return self.server.url

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Of the fleet, the launcher's own not among them, those whose command line has ``title`` in it."""
        found = []
        for process in psutil.Process(self.server.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    for seed, name in enumerate(("a", "b", "c", "a2", "uploaded")):
        write_adapter(folder / name, seed)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        *(sys.executable, "-m", "manylora.deploy.ray_serve", *demo_flags(base_cache), "--port", str(port)),
        *("--adapter-root", str(folder), "--state-dir", str(folder / "state"), "--threads", "1", "--max-rows", "4"),
        *("--adapter", f"c={folder / 'c'}", "--max-device-adapters", "2", "--replicas", "1", "--max-replicas", "2"),
        *("--target-ongoing", "2"),
    ]
    log = folder / "log"
    # Ray's processes put what is in this one's environment into theirs; a proxy's settings would be in its way.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MANYLORA_", "RAY_"))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    server = Server(process, log)
    server_process.started.append(server)
    try:
        server.wait_until_ready()
        yield Fleet(server, folder)
    finally:
        processes = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


@pytest.fixture
def client(fleet: Fleet) -> Iterator[httpx.Client]:
    with fleet.server.client() as made:
        yield made


def ask(client: httpx.Client, model: str, max_tokens: int = 4, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json=greedy(model, "The capital of", max_tokens, **fields))


def answered_by(client: httpx.Client, replica: str, model: str, seconds: float = 60.0) -> dict[str, Any]:
    """An answer of that replica, whatever the router would rather do: others are kept busy until it answers."""
    found: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    deadline = time.monotonic() + seconds

    def until_found() -> None:
        while found.empty() and time.monotonic() < deadline:
            response = ask(client, model, 8)
            assert response.status_code == 200, response.text
            if response.headers[REPLICA] == replica:
                found.put(response.json())

    with ThreadPoolExecutor(12) as pool:
        for one in [pool.submit(until_found) for _ in range(12)]:
            one.result()
    assert not found.empty(), f"{replica} never answered for {model}"
    return found.get()


def replicas_of(client: httpx.Client) -> set[str]:
    """The ids of all replicas, by the label that each has in the metrics."""
    lines = client.get("/metrics").text.splitlines()
    return {line.split('replica="')[1].split('"')[0] for line in lines if line.startswith("manylora_slots{")}


def test_answers_and_errors_pass_as_they_are(fleet: Fleet, client: httpx.Client) -> None:
    with client.stream(
        "POST", "/v1/completions", json=greedy("c", "The", 5, stream=True), headers={"x-request-id": "mine-1"}
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    assert len(lines) >= 6
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["model"] == "c"

    unknown = ask(client, "nobody")
    assert unknown.status_code == 404
    assert unknown.json()["error"] == {
        "message": "The model `nobody` does not exist.", "type": "NotFoundError", "param": "model", "code": 404,
    }  # fmt: skip
    assert len(unknown.headers.get_list("x-request-id")) == 1
    refused = client.post("/v1/completions", json={"model": BASE, "prompt": "x", "temprature": 1})
    assert refused.status_code == 400
    assert "temprature" in refused.json()["error"]["message"]
    assert client.get("/ready").json() == {"status": "ready"}


def test_it_listens_on_this_machine_alone(fleet: Fleet) -> None:
    addresses = set()
    for process in [psutil.Process(fleet.server.process.pid), *fleet.processes()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = process.net_connections("tcp")
            addresses |= {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert addresses


def test_adapters_loaded_before_a_scale_up_answer_on_the_new_replica(fleet: Fleet, client: httpx.Client) -> None:
    versions = {name: put_adapter(client, name, fleet.folder / name)["version"] for name in ("a", "b")}
    versions["c"] = client.get("/v1/adapters/c").json()["version"]
    with contextlib.ExitStack() as stack:
        names = ("adapter_config.json", "adapter_model.safetensors")
        files = {name: stack.enter_context((fleet.folder / "uploaded" / name).open("rb")) for name in names}
        uploaded = client.put("/v1/adapters/uploaded", files=files)
    assert uploaded.status_code == 201, uploaded.text
    versions["uploaded"] = uploaded.json()["version"]
    assert client.patch("/v1/adapters/b", json={"pinned": True}).status_code == 200
    # Gone again: what is unloaded must not be there on the new one either.
    put_adapter(client, "gone", fleet.folder / "a2")
    assert client.delete("/v1/adapters/gone").status_code == 200
    expected = {name: ask(client, name, 8).json() for name in ADAPTERS}
    assert len({one["choices"][0]["text"] for one in expected.values()}) == len(ADAPTERS)

    first = replicas_of(client)
    assert len(first) == 1
    stop = threading.Event()

    def keep_busy(model: str) -> None:
        while not stop.is_set():
            assert ask(client, model, 48).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(keep_busy, ADAPTERS[i % 4]) for i in range(8)]
        try:
            wait_for(lambda: len(replicas_of(client)) == 2, 180, "a second replica, as the queue is long", pause=0.5)
        finally:
            stop.set()
        for one in busy:
            one.result()
    (new,) = replicas_of(client) - first
    for name in ADAPTERS:
        answer = answered_by(client, new, name)
        assert answer["system_fingerprint"] == expected[name]["system_fingerprint"]
        assert answer["system_fingerprint"].endswith(versions[name][:12])
        assert answer["choices"][0]["text"] == expected[name]["choices"][0]["text"]
    assert ask(client, "gone").status_code == 404


def test_an_adapter_stays_where_it_is_held(client: httpx.Client) -> None:
    homes: dict[str, set[str]] = {}
    for name in ("a", "b"):
        ask(client, name)
    time.sleep(2.5)  # until the replicas have told what they hold
    for _ in range(5):
        for name in ("a", "b"):
            homes.setdefault(name, set()).add(ask(client, name).headers[REPLICA])
    assert all(len(home) == 1 for home in homes.values()), homes


def test_a_client_that_leaves_is_noticed_by_the_replica(fleet: Fleet, client: httpx.Client) -> None:
    def running() -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:num_requests_running{"))

    with fleet.server.client() as own:
        body = greedy("a", "The capital of", 480, stream=True)
        with own.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # kept: without it the response would be closed
            next(lines)
            wait_for(lambda: running() == 1, 5, "the request to be counted")
    began = time.monotonic()
    wait_for(lambda: running() == 0, 30, "the end of its request")
    assert time.monotonic() - began < 2.0, "it was aborted, rather than computed to its end"


def test_once_a_change_has_returned_nobody_answers_by_what_was_before(fleet: Fleet, client: httpx.Client) -> None:
    old = ask(client, "a").json()["system_fingerprint"]
    changed_at: list[float] = []
    stale: list[str] = []
    replicas: set[str] = set()
    stop = threading.Event()

    def go_on_asking() -> None:
        with fleet.server.client() as own:
            while not stop.is_set():
                began = time.monotonic()
                response = ask(own, "a", 2)
                assert response.status_code == 200, response.text
                if changed_at and began > changed_at[0]:
                    replicas.add(response.headers[REPLICA])
                    if response.json()["system_fingerprint"] == old:
                        stale.append(response.headers[REPLICA])

    with ThreadPoolExecutor(10) as pool:
        asking = [pool.submit(go_on_asking) for _ in range(10)]
        try:
            time.sleep(1.0)
            response = client.put("/v1/adapters/a", json={"source": str(fleet.folder / "a2")})
            changed_at.append(time.monotonic())
            time.sleep(2.0)
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert response.status_code == 200
    assert response.headers["x-manylora-fleet"] == "replicas=2 incomplete=0"
    assert stale == []
    assert len(replicas) == 2, "ten clients at four rows need both"


def test_a_refused_change_is_refused_as_by_one_server_and_changes_nothing(fleet: Fleet, client: httpx.Client) -> None:
    before = client.get("/v1/models").json()
    bad = shutil.copytree(fleet.folder / "a", fleet.folder / "bad") / "adapter_config.json"
    bad.write_text(json.dumps(json.loads(bad.read_text()) | {"bias": "sometimes"}))
    response = client.put("/v1/adapters/bad", json={"source": str(fleet.folder / "bad")})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "BadRequestError"
    outside = client.put("/v1/adapters/x", json={"source": "/etc"})
    assert outside.status_code in (400, 403)
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == [one["id"] for one in before["data"]]


@dataclass
class Ended:
    """What became of a request."""

    is_stream: bool
    status: int
    replica: str
    last: str


def _one(fleet: Fleet, model: str, *, stream: bool, began: Callable[[str], None]) -> Ended:
    with fleet.server.client() as client:
        if not stream:
            response = ask(client, model, 24)
            return Ended(False, response.status_code, response.headers.get(REPLICA, ""), response.text)
        body = greedy(model, "The capital of", 300, stream=True)
        last = ""
        with client.stream("POST", "/v1/completions", json=body) as response:
            replica = response.headers.get(REPLICA, "")
            for line in response.iter_lines():
                if line:
                    last = line
                    began(replica)
        return Ended(True, response.status_code, replica, last)


def test_a_replica_that_is_killed_loses_no_request_and_ends_every_stream(fleet: Fleet, client: httpx.Client) -> None:
    before = replicas_of(client)
    assert len(before) == 2
    seen: set[str] = set()
    with ThreadPoolExecutor(40) as pool:
        models = [*ADAPTERS, BASE]
        # More than the rows of both: some run, some wait at a replica, some wait for one.
        streams = [pool.submit(_one, fleet, models[i % 5], stream=True, began=seen.add) for i in range(16)]
        wait_for(lambda: seen >= before, 60, "streams on both replicas")
        plain = [pool.submit(_one, fleet, models[i % 5], stream=False, began=seen.add) for i in range(24)]
        time.sleep(0.3)
        victim = fleet.processes("ray::ServeReplica:manylora:Server")[0]
        os.kill(victim.pid, signal.SIGKILL)
        ended = [one.result() for one in [*streams, *plain]]
    assert [one.status for one in ended] == [200] * 40
    cut = [one for one in ended if one.is_stream and one.last != "data: [DONE]"]
    assert cut, "the replica had streams"
    assert len({one.replica for one in cut}) == 1, "only its own"
    for one in cut:
        error = json.loads(one.last.removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
    # Ray starts another one in its place, which has all that was loaded over HTTP.
    dead = cut[0].replica
    wait_for(lambda: len(replicas_of(client) - {dead}) == 2, 120, "another replica", pause=0.5)
    (new,) = replicas_of(client) - before
    for name in ("a", "uploaded"):
        expected = client.get(f"/v1/adapters/{name}").json()["version"]
        assert answered_by(client, new, name)["system_fingerprint"].endswith(expected[:12])


def test_a_rolling_restart_is_not_noticed(fleet: Fleet, client: httpx.Client) -> None:
    before = replicas_of(client)
    n_before = fleet.server.log_text().count("the replicas are restarted")
    stop = threading.Event()
    ended: list[Ended] = []

    def go_on(i: int) -> None:
        while not stop.is_set():
            ended.append(_one(fleet, ADAPTERS[i % 4], stream=i % 2 == 0, began=lambda _replica: None))

    with ThreadPoolExecutor(4) as pool:
        going = [pool.submit(go_on, i) for i in range(4)]
        try:
            time.sleep(1.0)
            fleet.server.send_signal(signal.SIGHUP)
            wait_for(
                lambda: fleet.server.log_text().count("the replicas are restarted") > n_before, 240, "it", pause=0.5
            )
        finally:
            stop.set()
        for one in going:
            one.result()
    assert not (replicas_of(client) & before)
    assert {one.status for one in ended} == {200}
    assert {one.last for one in ended if one.is_stream} == {"data: [DONE]"}
    assert len({one.replica for one in ended}) >= 3
    assert {name: ask(client, name).status_code for name in ADAPTERS} == dict.fromkeys(ADAPTERS, 200)


def test_it_ends_in_good_order(fleet: Fleet) -> None:
    processes = fleet.processes()
    assert processes
    fleet.server.send_signal(signal.SIGTERM)
    assert fleet.server.wait() == 0
    assert fleet.server.log_text().count("ended; nothing that requests held is missing") >= 2
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []
    state = json.loads((fleet.folder / "state" / "adapters.json").read_text())
    remembered = {one["name"]: (one["source"], one["pinned"]) for one in state["adapters"]}
    assert set(remembered) == set(ADAPTERS)
    assert remembered["a"] == (str(fleet.folder / "a2"), False)
    assert remembered["b"] == (str(fleet.folder / "b"), True)
    assert remembered["uploaded"][0].startswith(str(fleet.folder / "state" / "uploads"))
