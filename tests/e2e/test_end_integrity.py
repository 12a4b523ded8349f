"""What a server says of itself when it ends: that nothing was lost, or what was, by its log and its exit code."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from manylora.server import serve
from manylora.server.api.state import Serving
from manylora.server.config import AdapterSpec, ApiConfig, EngineConfig, ServeConfig
from manylora.server.engine.request import AdapterUse, Request, SamplingParams
from manylora.server.model.loader import load_base
from manylora.server.serving import Running, build
from tests.e2e.test_tools import write_adapter


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path) -> ServeConfig:
    """A tiny random base with one adapter."""
    adapter = write_adapter(tmp_path / "ada", None)
    return ServeConfig(
        model=str(checkpoints["llama"]),
        served_model_name="tiny",
        adapters=(AdapterSpec("ada", str(adapter)),),
        engine=EngineConfig(device="cpu", max_rows=4, max_context=96, max_device_adapters=2, kv_memory=4 << 20),
    )


@pytest.fixture
def running(config: ServeConfig, tmp_path: Path) -> Running:
    return build(config, base=load_base(config.model, cache_dir=tmp_path / "cache", progress=False))


async def one_answer(running: Running) -> None:
    """A request that ends as it should."""
    use = AdapterUse(running.registry.acquire("ada"))
    request = Request("r1", [5, 6, 7], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True), (use,))
    tokens, finish = await running.engine.submit(request).result()
    assert (finish.reason, len(tokens.token_ids)) == ("length", 3)


def served(
    running: Running,
    config: ServeConfig,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Running], object],
    code: int,
) -> int:
    """The exit code of a server that answered one request, then had ``fault`` done to it, and ends with ``code``."""

    async def until_signal(_serving: Serving, _config: ApiConfig, _sockets: Sequence[socket.socket]) -> int:
        await one_answer(running)
        fault(running)
        return code

    monkeypatch.setattr(serve, "build", lambda _config: running)
    monkeypatch.setattr(serve, "serve_until_signal", until_signal)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return serve.serve(config, [sock])


def lose_a_page(running: Running) -> None:
    """Between two steps; then the loop looks again, as it does after each request."""

    def lose() -> None:
        running.engine._scheduler.pool.allocate(1)
        running.engine._loop._is_checked = False

    running.engine.call(lose).result()


def lose_a_lease(running: Running) -> None:
    """The reference is given back, but not the lease on the copy."""
    ref = running.registry.acquire("ada")
    assert running.host.take(ref) is not None
    running.registry.release(ref)


FAULTS: dict[str, tuple[Callable[[Running], object], str]] = {
    "a reference": (lambda running: running.registry.acquire("ada"), "1 references are held"),
    "a page": (lose_a_page, "1 are in use, but requests hold 0"),
    "a page of the adapters' pool": (lambda running: running.pool._free["q"].pop(), "free pages are not the"),
    "a lease on a copy": (lose_a_lease, "leased while idle"),
}


def test_a_clean_end_says_so(
    running: Running, config: ServeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert served(running, config, monkeypatch, lambda _running: None, 0) == 0
    assert "integrity check passed" in caplog.text
    assert "integrity check failed" not in caplog.text


@pytest.mark.parametrize("what", FAULTS)
def test_what_leaked_is_named_and_fails_the_server(
    what: str,
    running: Running,
    config: ServeConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    fault, message = FAULTS[what]
    assert served(running, config, monkeypatch, fault, 0) == 1
    assert "integrity check failed" in caplog.text
    assert message in caplog.text
    assert "integrity check passed" not in caplog.text


def test_an_end_by_two_signals_is_not_looked_at(
    running: Running, config: ServeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was cut off may not have given back everything; the exit code is that of the second signal."""
    caplog.set_level("INFO")
    assert served(running, config, monkeypatch, lambda running: running.registry.acquire("ada"), 1) == 1
    assert "integrity check" not in caplog.text


def test_closing_alone_checks_nothing(running: Running) -> None:
    running.engine.start()
    asyncio.run(running.close())
    running.check_integrity()
