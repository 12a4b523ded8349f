"""What is there when a server has loaded is left out of later collections."""

from __future__ import annotations

import gc
import socket
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from manylora.server import serve as serve_module
from manylora.server.collector import set_aside
from manylora.server.config import ServeConfig


@pytest.fixture
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


class Node:
    other: Node


@pytest.mark.usefixtures("unfrozen")
def test_what_stays_is_not_looked_through_and_garbage_does_not_stay() -> None:
    node, kept = Node(), [Node()]
    node.other = node
    gone = weakref.ref(node)
    del node
    set_aside()
    assert gone() is None
    assert gc.is_tracked(kept)
    assert not any(one is kept for one in gc.get_objects())
    held = weakref.ref(kept[0])
    kept.clear()
    assert held() is None


def test_a_server_does_it_when_everything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    async def close() -> None:
        did.append("close")

    async def serve_until_signal(*_: Any) -> int:
        did.append("serve")
        return 0

    engine = SimpleNamespace(start=lambda: did.append("start"))
    running = SimpleNamespace(engine=engine, serving=None, close=close, check_integrity=lambda: None)
    monkeypatch.setattr(serve_module, "build", lambda _config: running)
    monkeypatch.setattr(serve_module, "load_adapters", lambda *_: did.append("load"))
    monkeypatch.setattr(serve_module, "set_aside", lambda: did.append("set aside"))
    monkeypatch.setattr(serve_module, "_say_what_to_try", lambda *_: None)
    monkeypatch.setattr(serve_module, "serve_until_signal", serve_until_signal)
    with socket.socket() as one:
        assert serve_module.serve(ServeConfig(model="m"), [one]) == 0
    assert did == ["start", "load", "set aside", "serve", "close"]
