"""A real ``manylora serve`` process on the demo base, and what the tests ask it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

MANYLORA = Path(sys.executable).parent / "manylora"
BASE = "smollm2"

START_S = 600
"""Long enough for a busy machine that must compile the kernels and quantise the base first."""
ANSWER_S = 300.0
STOP_S = 120

started: list[Server] = []
"""Whose logs a failing test shows; conftest.py does."""

_SERVING = re.compile(r"serving \S+ on (http://[^\s\"]+)")


@dataclass
class Server:
    """A process and where it listens (``url`` is empty until it is ready)."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    api_key: str | None = None

    def client(self) -> httpx.Client:
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.url, timeout=ANSWER_S, headers=headers)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        """Until ``/ready`` answers 200; RuntimeError, with the log, if the process ends or takes too long."""
        wait_for(self._is_ready, START_S, "the server to be ready", pause=0.1)

    def _is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {self.process.returncode}:\n{self.log_text()}")
        found = _SERVING.search(self.log_text())
        if found is None:
            return False
        try:
            answer = httpx.get(found[1] + "/ready", timeout=10)
        except httpx.TransportError:
            return False
        self.url = found[1]
        return answer.status_code == 200

    def send_signal(self, which: signal.Signals) -> None:
        self.process.send_signal(which)

    def wait(self) -> int:
        """The exit code, when it has ended."""
        return self.process.wait(STOP_S)

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_S)

    def rss(self) -> int:
        """Bytes of it in memory."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def command(*flags: str) -> list[str]:
    return [str(MANYLORA), "serve", *flags]


def demo_flags(cache: Path) -> list[str]:
    """Small and on the CPU, where a row's text does not depend on its batch down to the last bit."""
    return [
        *("--served-model-name", BASE, "--cache-dir", str(cache), "--device", "cpu"),
        *("--max-context", "512", "--kv-memory", "128MiB", "--shutdown-grace", str(STOP_S)),
    ]


@contextlib.contextmanager
def launched(
    log: Path, *flags: str, environment: Mapping[str, str] | None = None, api_key: str | None = None
) -> Iterator[Server]:
    """Start ``manylora serve`` with its output in ``log``; whatever happens, it is gone at the end of the block."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MANYLORA_")}
    # A state directory of its own, should a test not name one.
    surroundings = clean | {"XDG_STATE_HOME": str(log.parent / "state-home")} | dict(environment or {})
    with log.open("ab") as output:
        process = subprocess.Popen(
            command(*flags), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=surroundings
        )
    server = Server(process, log, api_key=api_key)
    started.append(server)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def serving(
    log: Path, *flags: str, environment: Mapping[str, str] | None = None, api_key: str | None = None
) -> Iterator[Server]:
    """``launched``, and ready."""
    with launched(log, *flags, environment=environment, api_key=api_key) as server:
        server.wait_until_ready()
        yield server


def wait_for(
    condition: Callable[[], bool], seconds: float = ANSWER_S, what: str = "it", *, pause: float = 0.01
) -> None:
    """Poll until ``condition``; RuntimeError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {seconds:.0f} s for {what}")
        time.sleep(pause)


@dataclass(frozen=True)
class Answer:
    """A completion, however it came. ``text`` and the rest are empty unless ``status`` is 200."""

    status: int
    text: str = ""
    fingerprint: str = ""
    finish_reason: str = ""
    body: str = ""
    """The error's."""

    @property
    def version(self) -> str:
        """The part of the fingerprint that names the adapter version, or "base"."""
        return self.fingerprint.rpartition("_")[2]


def greedy(model: str, prompt: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """The body of a request whose answer is always the same."""
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}


def complete(client: httpx.Client, body: Mapping[str, Any]) -> Answer:
    """One completion, whole or streamed as ``body`` says. A stream must end with [DONE]."""
    if body.get("stream"):
        with client.stream("POST", "/v1/completions", json=body) as response:
            return _read_stream(response)
    response = client.post("/v1/completions", json=body)
    if response.status_code != 200:
        return Answer(response.status_code, body=response.text)
    answer = response.json()
    choice = answer["choices"][0]
    return Answer(200, choice["text"], answer["system_fingerprint"], choice["finish_reason"])


def _read_stream(response: httpx.Response) -> Answer:
    if response.status_code != 200:
        return Answer(response.status_code, body=response.read().decode())
    text, reason = "", ""
    fingerprints: set[str] = set()
    for line in response.iter_lines():
        if not line:
            continue
        assert line.startswith("data: "), line
        if line == "data: [DONE]":
            assert len(fingerprints) == 1, f"one stream, several versions: {fingerprints}"
            return Answer(200, text, fingerprints.pop(), reason)
        event = json.loads(line.removeprefix("data: "))
        assert "error" not in event, event
        fingerprints.add(event["system_fingerprint"])
        for choice in event["choices"]:
            text += choice["text"]
            reason = choice["finish_reason"] or reason
    raise AssertionError(f"the stream ended without [DONE], after {text!r}")


def put_adapter(client: httpx.Client, name: str, source: Path, **fields: Any) -> dict[str, Any]:
    """Load or replace an adapter by this server's own route; what it says about it."""
    response = client.put(f"/v1/adapters/{name}", json={"source": str(source), **fields})
    assert response.status_code in (200, 201), response.text
    loaded: dict[str, Any] = response.json()
    return loaded


def adapters_by_name(client: httpx.Client) -> dict[str, dict[str, Any]]:
    """Of ``GET /v1/adapters``, the adapters that have a name; AssertionError if any version is draining."""
    listed = client.get("/v1/adapters").json()["data"]
    assert all(one["state"] == "ready" for one in listed), listed
    return {one["name"]: one for one in listed}
