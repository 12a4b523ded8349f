"""A real server over a tiny random base, under everything that a client should not send: it refuses what is wrong with
a 4xx, never fails, never hangs, holds nothing afterwards, and answers the next good request as it did before.

What is sent follows from ``SEED`` alone; when it comes to meet what else is going on does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from manylora.server.config import AdapterSpec, ApiConfig, EngineConfig, ServeConfig
from manylora.server.http_server import bind, serve_until_signal
from manylora.server.model.loader import load_base
from manylora.server.serving import Running, build, load_adapters
from tests.api.conformance import check
from tests.e2e.fuzzing import RAW, Bodies, paths_with_bodies
from tests.e2e.malformed_http import CLOSE, JSON, LENGTH, MALFORMED, post
from tests.e2e.server_process import wait_for
from tests.e2e.test_tools import write_adapter

SEED: Final = 20261122
BODIES: Final = 3000
DISCONNECTS: Final = 200
CLIENTS: Final = 8
CLIENT_TIMEOUT: Final = 1.0
"""Seconds after which the server gives up on a client that does not go on."""
ANSWER_S: Final = 30.0
"""Far more than any answer here takes, on however busy a machine; it is what a hang is told by."""
GOOD: Final = {"model": "ada", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


@dataclass
class FuzzedServer:
    """A server in a thread, with its parts at hand."""

    running: Running
    port: int
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """One request on a connection of its own, held against the document."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
            response = connection.getresponse()
            answer = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()
        self.statuses[response.status] += 1
        try:
            check(method, path, body, response.status, found, answer)
        except AssertionError as problem:
            self.problems.append(str(problem))
        if response.status >= 500:
            self.problems.append(f"{method} {path} {body[:500]!r} -> {response.status}: {answer[:500]!r}")
        return response.status, answer

    def good(self) -> str:
        """The text of a request that has nothing wrong."""
        status, answer = self.ask("POST", "/v1/completions", json.dumps(GOOD).encode())
        assert status == 200, answer
        text: str = json.loads(answer)["choices"][0]["text"]
        return text

    def n_aborted(self) -> int:
        """Choices that were aborted so far."""
        text = self.running.serving.metrics.render().decode()
        found = re.findall(r'^vllm:request_success_total\{.*finished_reason="abort".*\} (\S+)$', text, re.MULTILINE)
        return int(sum(map(float, found)))

    def check_idle(self) -> None:
        """Nothing lives any more, and nothing is lost."""
        engine = self.running.engine
        wait_for(lambda: engine.stats().running == engine.stats().waiting == 0, 30, "the last requests to end")
        assert self.running.registry.counts().requests_in_flight == 0
        engine.call(engine._scheduler.check_integrity).result(30)
        self.running.registry.check_integrity()
        self.running.merges.check_integrity(idle=True)


@contextlib.contextmanager
def serving_in_a_thread(running: Running, config: ApiConfig) -> Iterator[FuzzedServer]:
    """What ``manylora serve`` runs, with signals that are called instead of sent."""
    [sock] = bind("127.0.0.1", 0)
    loop = asyncio.new_event_loop()
    on_signal: dict[int, Callable[[], None]] = {}
    # Signals reach the main thread only, which is pytest's.
    loop.add_signal_handler = lambda number, callback, *args: on_signal.update({number: lambda: callback(*args)})  # type: ignore[method-assign, assignment]
    loop.remove_signal_handler = lambda number: on_signal.pop(number, None) is not None  # type: ignore[method-assign]
    codes: list[int] = []
    running.engine.start()
    serve = serve_until_signal(running.serving, config, [sock])
    thread = threading.Thread(target=lambda: codes.append(loop.run_until_complete(serve)), name="fuzzed-server")
    port = sock.getsockname()[1]
    thread.start()
    try:
        wait_for(lambda: _is_listening(port), 30, "the server to listen")
        yield FuzzedServer(running, port)
    finally:
        loop.call_soon_threadsafe(lambda: on_signal[signal.SIGTERM]())
        thread.join(60)
        assert not thread.is_alive()
        loop.close()
    assert codes == [0]


def _is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def server(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FuzzedServer]:
    root = tmp_path_factory.mktemp("fuzz")
    adapter = write_adapter(root / "ada", None)
    config = ServeConfig(
        model=str(checkpoints["llama"]),
        served_model_name="tiny",
        adapters=(AdapterSpec("ada", str(adapter)),),
        engine=EngineConfig(device="cpu", max_rows=16, max_context=96, max_device_adapters=2, kv_memory=8 << 20),
        api=ApiConfig(
            adapter_roots=(root,),
            upload_dir=root / "uploads",
            client_timeout=CLIENT_TIMEOUT,
            max_body_bytes=1 << 18,
            max_upload_bytes=1 << 18,
            max_choices=8,
            shutdown_grace=30,
        ),
    )
    running = build(config, base=load_base(config.model, cache_dir=root / "cache", progress=False))
    load_adapters(running, config)
    with serving_in_a_thread(running, config.api) as server:
        yield server
    asyncio.run(running.close())


@pytest.fixture(autouse=True)
def as_before(server: FuzzedServer) -> Iterator[None]:
    """Whatever was sent: no 5xx, nothing that is not documented, nothing left, and the same answer as before."""
    before = server.good()
    server.statuses.clear()
    yield
    server.check_idle()
    assert server.problems == []
    assert server.good() == before
    assert not [status for status in server.statuses if status >= 500]


def in_parallel(jobs: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(CLIENTS) as clients:
        for job in [clients.submit(job) for job in jobs]:
            job.result(ANSWER_S * 4)


def test_bodies(server: FuzzedServer) -> None:
    """Bodies made from the document, most of them with something odd in them, for every operation that takes one."""
    rng = random.Random(SEED)
    bodies = Bodies(
        rng,
        {
            "model": ("tiny", "ada", "tiny:ada", "nobody"),
            "name": ("ada", "f", "nobody"),
            "max_tokens": (1, 2, 3),
            "max_completion_tokens": (1, 2, 3),
            "n": (1, 2),
            "best_of": (1, 2),
            # What would change the set of adapters under the others' feet.
            "lora_name": ("nobody", "", "tiny"),
            "source": ("/nowhere", "../x", "\x00", "org/name@x"),
            "lora_path": ("ada", "nobody"),
        },
    )
    inference = [one for one in paths_with_bodies() if "lora_adapter" not in one[1] and "adapters" not in one[1]]
    other = [one for one in paths_with_bodies() if one not in inference]
    jobs: list[Callable[[], None]] = []
    for number in range(BODIES):
        method, path, schema = rng.choice(inference if number % 4 else other)
        body = bodies.valid(schema)
        sent = bodies.raw(bodies.mutated(body) if number % 3 else body)
        path = re.sub(r"\{\w+\}", rng.choice(["nobody", "a%00b", "%2e%2e", "x" * 300]), path)
        jobs.append(lambda method=method, path=path, sent=sent: server.ask(method, path, sent) and None)  # type: ignore[misc]
    in_parallel(jobs)
    assert server.statuses[200] > BODIES / 20, server.statuses
    assert server.statuses[400] > BODIES / 4, server.statuses


def test_bodies_that_are_no_objects(server: FuzzedServer) -> None:
    for method, path, _ in paths_with_bodies():
        path = re.sub(r"\{\w+\}", "nobody", path)
        for raw in RAW:
            status, answer = server.ask(method, path, raw)
            assert 400 <= status < 500, (path, raw[:60], answer)


def test_uploads(server: FuzzedServer) -> None:
    """Forms with files and fields that are damaged at random."""
    rng = random.Random(SEED)
    part = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    files = b'; filename="adapter_config.json"', b'; filename="../../etc/passwd"', b'; filename=""', b""
    for _ in range(150):
        contents = (b"{}", b"\x00" * 50, b"true", b"x" * 3000)
        form = b"".join(
            part
            % (rng.choice([b"config", b"pinned", b"replace", b"\xff", b""]), rng.choice(files), rng.choice(contents))
            for _ in range(rng.choice([0, 1, 2, 12]))
        )
        sent = bytearray(form + rng.choice([b"--b--\r\n", b"--b", b"", b"--c--\r\n"]))
        for _ in range(rng.choice([0, 0, 1, 5])):
            if sent:
                sent[rng.randrange(len(sent))] = rng.randrange(256)
        status, answer = server.ask(
            "PUT", "/v1/adapters/upload", bytes(sent), {"Content-Type": "multipart/form-data; boundary=b"}
        )
        assert 400 <= status < 500, (sent[:300], answer)


def exchange(port: int, sent: bytes) -> bytes:
    """Send bytes, and read until the server closes the connection, has given the one answer that is due, or falls
    silent for longer than it may."""
    received = b""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=4 * CLIENT_TIMEOUT + 2) as connection,
        contextlib.suppress(ConnectionError, TimeoutError),
    ):
        connection.sendall(sent)
        while data := connection.recv(1 << 16):
            received += data
            if _is_whole(received) and CLOSE not in sent:
                break
    return received


def _is_whole(received: bytes) -> bool:
    """Whether one response is there that keeps the connection open, as it may."""
    head, separator, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return bool(separator and length and len(body) >= int(length[1]))


def test_what_is_not_http(server: FuzzedServer) -> None:
    """Answered with a 4xx, or with what a request that is right after all gets, or cut off in time."""
    outcomes: dict[str, bytes] = {}

    def send(what: str, sent: bytes) -> None:
        outcomes[what] = exchange(server.port, sent)

    in_parallel([lambda what=what, sent=sent: send(what, sent) for what, sent in MALFORMED.items()])  # type: ignore[misc]
    first = {what: answer.split(b"\r\n")[0] for what, answer in outcomes.items()}
    assert not {what: line for what, line in first.items() if b" 5" in line[:12]}
    for what, answer in outcomes.items():
        # An answer at all, unless what was sent came to nothing that could be answered.
        assert answer.startswith(b"HTTP/1.1 ") or what in {"start b''", "a smuggled request"}, (
            what,
            answer[:200],
        )
    assert first["two lengths"].split()[1] == b"400"
    assert first["a length and chunks"].split()[1] == b"400"
    assert outcomes["three requests at once"].count(b"HTTP/1.1 200") == 3
    assert first["half a head"].split()[1] == first["half a body"].split()[1] == b"408"


def test_random_bytes(server: FuzzedServer) -> None:
    """Requests that are right but for some of their bytes, and noise."""
    rng = random.Random(SEED)
    right = post(JSON, LENGTH, CLOSE)
    sent: list[bytes] = []
    for number in range(200):
        damaged = bytearray(right if number % 4 else rng.randbytes(200))
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        sent.append(bytes(damaged))
    answers: list[bytes] = []
    in_parallel([lambda one=one: answers.append(exchange(server.port, one)) for one in sent])  # type: ignore[misc]
    assert not [answer[:300] for answer in answers if answer.startswith(b"HTTP/1.1 5")]
    assert sum(answer.startswith(b"HTTP/1.1 ") for answer in answers) > len(answers) / 2


def test_clients_that_leave(server: FuzzedServer) -> None:
    """Streams and whole answers, left at every moment, politely and with a reset: they are aborted, not computed."""
    rng = random.Random(SEED)
    aborted = server.n_aborted()

    def leave(model: str, n: int, stream: bool, chat: bool, after: float, n_bytes: int, resets: bool) -> None:
        what: dict[str, Any] = {"model": model, "max_tokens": 64, "n": n, "stream": stream, "ignore_eos": True}
        what |= {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": ["Hi", "there"]}
        body = json.dumps(what).encode()
        path = "/v1/chat/completions" if chat else "/v1/completions"
        with socket.create_connection(("127.0.0.1", server.port), timeout=ANSWER_S) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            sent = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
            connection.sendall(sent[: n_bytes if n_bytes < 0 else len(sent)])
            if stream and n_bytes > 0:
                received = b""
                while len(received) < n_bytes and (data := connection.recv(512)):
                    received += data
                    assert received.startswith(b"HTTP/1.1 200"[: len(received)]), received
            else:
                time.sleep(after)
            if resets:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    in_parallel(
        [
            lambda arguments=arguments: leave(*arguments)  # type: ignore[misc]
            for arguments in (
                (
                    rng.choice(["tiny", "ada"]),
                    rng.choice([1, 2, 4]),
                    rng.random() < 0.7,
                    rng.random() < 0.5,
                    rng.choice([0.0, 0.001, 0.01, 0.05]),
                    rng.choice([-20, 0, 1, 100, 700, 3000]),
                    rng.random() < 0.5,
                )
                for _ in range(DISCONNECTS)
            )
        ]
    )
    server.check_idle()
    # Some had their answer before they were found to be gone, and some had not even sent their request.
    assert server.n_aborted() - aborted > DISCONNECTS
