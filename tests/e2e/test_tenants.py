"""Tenants of a real server: made on the command line, limited, reloaded; slow and vanished clients leave nothing."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.adapters import write_adapter
from tests.e2e.server_process import BASE, MANYLORA, Server, demo_flags, greedy, serving, wait_for

pytestmark = pytest.mark.timeout(600)

PROMPT = "The best way to cook an egg is"


def keys(*arguments: str) -> str:
    done = subprocess.run([str(MANYLORA), "keys", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Tenants:
    """A server with the tenants acme (adapters acme-*), solo (beta, and not the base) and few (three requests)."""

    def __init__(self, server: Server, file: Path, made: dict[str, str]) -> None:
        self.server, self.file, self.keys = server, file, made

    def ask(self, tenant: str, model: str, max_tokens: int = 2, **fields: Any) -> httpx.Response:
        body = greedy(model, PROMPT, max_tokens, **fields)
        return httpx.post(self.server.url + "/v1/completions", json=body, headers=self.bearer(tenant), timeout=120)

    def bearer(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}

    def metric(self, name: str) -> float:
        text = httpx.get(self.server.url + "/metrics", headers=self.bearer("admin")).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def is_idle(self) -> bool:
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") == 0 and (
            self.metric("vllm:kv_cache_usage_perc") == 0
        )


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Iterator[Tenants]:
    directory = tmp_path_factory.mktemp("tenants")
    file = directory / "keys.toml"
    made = {
        "acme": keys("add", str(file), "acme", "--adapters", "acme-*"),
        "solo": keys("add", str(file), "solo", "--adapters", "beta", "--no-base", "--share", "2"),
        "few": keys("add", str(file), "few", "--requests-per-second", "0.001", "--burst", "3"),
        "admin": "the-admin-key",
        "nobody": "mlk_wrong",
    }
    for seed, name in enumerate(("acme-1", "beta")):
        write_adapter(directory / "adapters" / name, seed)
    flags = ["--adapter-dir", str(directory / "adapters"), "--keys", str(file), "--admin-key", made["admin"]]
    limits = ["--protect-metrics", "--client-timeout", "1", "--request-timeout", "6", "--max-rows", "4"]
    # 16 waiting requests of this size are far more than six seconds' work on two cores.
    with serving(directory / "server.log", *demo_flags(base_cache), "--port", "0", *flags, *limits) as server:
        yield Tenants(server, file, made)


def test_each_gets_its_own(tenants: Tenants) -> None:
    allowed = {
        ("acme", BASE): 200,
        ("acme", "acme-1"): 200,
        ("acme", "beta"): 403,
        ("acme", "no-such"): 403,
        ("acme", "acme-none"): 404,
        ("solo", BASE): 403,
        ("solo", "beta"): 200,
        ("solo", "acme-1"): 403,
        ("nobody", BASE): 401,
        ("admin", "beta"): 200,
    }
    assert {pair: tenants.ask(*pair).status_code for pair in allowed} == allowed
    for tenant, names in (("acme", [BASE, "acme-1"]), ("solo", ["beta"])):
        listed = httpx.get(tenants.server.url + "/v1/models", headers=tenants.bearer(tenant)).json()["data"]
        assert [one["id"] for one in listed] == names
    for tenant, status in (("acme", 403), ("nobody", 401), ("admin", 200)):
        for path in ("/v1/adapters", "/metrics"):
            assert httpx.get(tenants.server.url + path, headers=tenants.bearer(tenant)).status_code == status
        # What the parser makes of the path is what the application sees.
        answer = httpx.get(tenants.server.url + "/v1/adapters%0A", headers=tenants.bearer(tenant))
        assert answer.status_code == (401 if tenant == "nobody" else 404)


def test_the_rate_and_a_new_file(tenants: Tenants) -> None:
    assert [tenants.ask("few", BASE).status_code for _ in range(4)] == [200, 200, 200, 429]
    second = keys("add", str(tenants.file), "acme", "--note", "the second")
    tenants.keys["second"] = second
    assert tenants.ask("second", "acme-1").status_code == 401
    tenants.server.send_signal(signal.SIGHUP)
    wait_for(lambda: tenants.ask("second", "acme-1").status_code == 200, 30)
    good = tenants.file.read_text()
    tenants.file.write_text(good + "\n[tenants.acme]\n")
    tenants.server.send_signal(signal.SIGHUP)
    wait_for(lambda: "the keys stay as they are" in tenants.server.log_text(), 30)
    assert tenants.ask("second", "acme-1").status_code == 200
    tenants.file.write_text(good)
    names = dict(line.split(": ") for line in keys("list", str(tenants.file)).splitlines())
    keys("revoke", str(tenants.file), names["acme"].split(", ")[1])
    tenants.server.send_signal(signal.SIGHUP)
    wait_for(lambda: tenants.ask("second", "acme-1").status_code == 401, 30)
    assert tenants.ask("acme", "acme-1").status_code == 200


def test_requests_that_take_too_long(tenants: Tenants) -> None:
    """Running and waiting ones, whole and streamed: all end at their deadline, and everything is free again."""
    with ThreadPoolExecutor(16) as pool:
        streams = [bool(i % 2) for i in range(16)]
        start = time.monotonic()
        asked = [pool.submit(tenants.ask, "acme", "acme-1", 480, stream=stream) for stream in streams]
        answers = [one.result() for one in asked]
        assert time.monotonic() - start < 6 + 30
    late = [answer for answer in answers if "TimeoutError" in answer.text]
    assert len(late) >= 4, [answer.status_code for answer in answers]
    for answer, is_stream in zip(answers, streams, strict=True):
        if answer in late:
            assert answer.status_code == (200 if is_stream and answer.text.startswith("data: ") else 504)
            last = [line for line in answer.text.splitlines() if line][-1].removeprefix("data: ")
            assert json.loads(last)["error"]["code"] == 504
    wait_for(tenants.is_idle, 60, "the pages to be given back")
    assert tenants.ask("acme", BASE).status_code == 200


def test_slow_and_vanished_clients_leave_nothing(tenants: Tenants) -> None:
    host, port = tenants.server.url.removeprefix("http://").split(":")
    bearer = tenants.bearer("acme")["Authorization"].encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Authorization: %s\r\n" % bearer
    body = json.dumps(greedy("acme-1", PROMPT, 400, stream=True)).encode()
    whole = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    sockets = []
    for sent in (head, head + b"Content-Length: 500\r\n\r\n{", whole, whole + whole, b"", b"GET / HT"):
        sock = socket.create_connection((host, int(port)))
        sock.sendall(sent)
        sockets.append(sock)
    wait_for(lambda: tenants.metric("vllm:num_requests_running") > 0, 30)
    for sock in sockets[2:4]:  # in the middle of their streams
        sock.close()
    for sock in (*sockets[:2], *sockets[4:]):
        sock.settimeout(20)
        answer = sock.recv(1 << 16)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408 "), answer
        sock.close()
    wait_for(tenants.is_idle, 60, "the pages to be given back")
    assert tenants.ask("acme", BASE).status_code == 200


def test_no_key_is_in_the_log_and_the_end_is_in_good_order(tenants: Tenants) -> None:
    """The last of this file: the server has checked, whenever it was idle, that nothing is lost."""
    tenants.server.send_signal(signal.SIGTERM)
    assert tenants.server.wait() == 0
    log = tenants.server.log_text()
    for key in tenants.keys.values():
        assert key not in log
    assert "Traceback" not in log
    assert "integrity check failed" not in log
    assert "integrity check passed" in log
