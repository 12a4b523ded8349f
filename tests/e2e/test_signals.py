"""How the process ends and comes back: a drained end, a crash, and starts that are refused."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import httpx
import pytest

from tests.e2e.adapters import write_adapter
from tests.e2e.server_process import (
    BASE,
    START_S,
    Server,
    adapters_by_name,
    command,
    complete,
    demo_flags,
    greedy,
    put_adapter,
    serving,
    wait_for,
)

pytestmark = pytest.mark.timeout(1200)

PROMPT = "The best way to cook an egg is"
LONG = 200
"""Tokens, some seconds of them: the signal comes long before the end."""


def stream_to_the_end(server: Server, model: str, begun: Barrier) -> tuple[int, str, int]:
    """Stream ``LONG`` tokens; the tokens that came, the reason of the end, and how often [DONE] came."""
    body = greedy(model, PROMPT, LONG, stream=True, stream_options={"include_usage": True})
    tokens, reason, n_done, is_first = 0, "", 0, True
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line:
                continue
            if is_first:
                begun.wait()
                is_first = False
            if line == "data: [DONE]":
                n_done += 1
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            reason = next((one["finish_reason"] for one in event["choices"] if one["finish_reason"]), reason)
            tokens = event["usage"]["completion_tokens"] if event["usage"] else tokens
    return tokens, reason, n_done


def status(client: httpx.Client, path: str) -> int:
    return client.get(path).status_code


def test_sigterm_lets_streams_finish_and_takes_nothing_new(tmp_path: Path, base_cache: Path) -> None:
    adapter = write_adapter(tmp_path / "ada", seed=1)
    flags = [*demo_flags(base_cache), "--port", "0", "--adapter", f"ada={adapter}", "--adapter-root", str(tmp_path)]
    models = (BASE, "ada", "ada")
    with serving(tmp_path / "server.log", *flags) as server, server.client() as client:
        begun = Barrier(len(models) + 1, timeout=120)
        with ThreadPoolExecutor(len(models)) as pool:
            streams = [pool.submit(stream_to_the_end, server, model, begun) for model in models]
            try:
                begun.wait()
            except BrokenBarrierError:
                for stream in streams:
                    stream.result()  # says why it did not begin
                raise
            server.send_signal(signal.SIGTERM)
            wait_for(lambda: status(client, "/ready") == 503, 60, "the server to take notice")
            refused = client.post("/v1/completions", json=greedy("ada", PROMPT, 1))
            streamed = complete(client, greedy(BASE, PROMPT, 1, stream=True))
            load = client.put("/v1/adapters/late", json={"source": str(adapter)})
            alive = status(client, "/health")
            n_running = sum(not stream.done() for stream in streams)
            ended = [stream.result() for stream in streams]
        assert n_running == len(models), "the streams ended too early for this test to say anything"
        assert (refused.status_code, streamed.status, load.status_code, alive) == (503, 503, 503, 200)
        assert refused.json()["error"]["code"] == 503
        assert int(refused.headers["retry-after"]) > 0
        assert ended == [(LONG, "length", 1)] * len(models)
        assert server.wait() == 0
        assert "integrity check passed" in server.log_text()
        assert "Traceback" not in server.log_text()
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")


def upload(client: httpx.Client, name: str, directory: Path) -> dict[str, Any]:
    files = [("files", (path.name, path.read_bytes())) for path in sorted(directory.iterdir())]
    response = client.put(f"/v1/adapters/{name}", files=files)
    assert response.status_code == 201, response.text
    loaded: dict[str, Any] = response.json()
    return loaded


def test_adapters_loaded_over_http_survive_sigkill(tmp_path: Path, base_cache: Path) -> None:
    """Loaded by each route, replaced, pinned, unloaded: what was acknowledged is there after a crash."""
    sources = [write_adapter(tmp_path / f"source-{seed}", seed) for seed in range(4)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # No --state-dir: the default place depends on model and port, so the same command line finds it again.
    flags = [*demo_flags(base_cache), "--port", str(port), "--adapter-root", str(tmp_path)]
    log = tmp_path / "server.log"

    def answers(client: httpx.Client) -> dict[str, tuple[str, str]]:
        bodies = {name: greedy(name, PROMPT, 8) for name in ("put", "vllm", "sglang", "uploaded", BASE)}
        given = {name: complete(client, body) for name, body in bodies.items()}
        assert all(answer.status == 200 for answer in given.values()), given
        return {name: (answer.text, answer.fingerprint) for name, answer in given.items()}

    with serving(log, *flags) as server, server.client() as client:
        put_adapter(client, "put", sources[1])
        put_adapter(client, "put", sources[0])
        loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "vllm", "lora_path": str(sources[1])})
        assert loaded.status_code == 200, loaded.text
        loaded = client.post(
            "/load_lora_adapter", json={"lora_name": "sglang", "lora_path": str(sources[2]), "pinned": True}
        )
        assert loaded.json()["success"], loaded.text
        upload(client, "uploaded", sources[3])
        put_adapter(client, "gone", sources[2])
        assert client.delete("/v1/adapters/gone").status_code == 200
        before, texts = adapters_by_name(client), answers(client)
        assert len({text for text, _ in texts.values()}) == 5, texts
        with client.stream("POST", "/v1/completions", json=greedy("put", PROMPT, LONG, stream=True)) as stream:
            next(stream.iter_lines())  # it dies in the middle of work
            server.send_signal(signal.SIGKILL)
            assert server.wait() == -signal.SIGKILL

    with serving(log, *flags) as server, server.client() as client:
        after = adapters_by_name(client)
        assert sorted(after) == ["put", "sglang", "uploaded", "vllm"]
        for field in ("version", "source", "pinned", "bytes", "ranks"):
            assert {n: one[field] for n, one in after.items()} == {n: one[field] for n, one in before.items()}, field
        assert [name for name, one in after.items() if one["pinned"]] == ["sglang"]
        assert answers(client) == texts
        server.send_signal(signal.SIGINT)
        assert server.wait() == 0


def refused(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*flags), capture_output=True, text=True, timeout=START_S)


def test_a_model_path_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    done = refused("--model", str(missing), "--port", "0")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("manylora: ")
    assert str(missing) in done.stderr


def test_an_adapter_that_cannot_be_served(tmp_path: Path, base_cache: Path) -> None:
    done = refused(*demo_flags(base_cache), "--port", "0", "--adapter", f"ada={tmp_path / 'nothing'}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    complaint = done.stderr[done.stderr.index("manylora: ") :]
    assert str(tmp_path / "nothing") in complaint
    assert "adapter `ada`, from the command line" in complaint


def test_a_port_that_is_taken(tmp_path: Path, base_cache: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = refused(*demo_flags(base_cache), "--port", str(port), "--state-dir", str(tmp_path / "state"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"manylora: --port: cannot listen on 127.0.0.1 port {port}: Address already in use"
    ]
