"""A server of the load test's own: it is waited for, told where to keep things, and gone afterwards."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
from loadgen.errors import TargetError
from loadgen.fresh_server import fresh_server
from loadgen.target import answers, look_at, wait_for

SERVER = """#!{python}
import http.server, json, os, sys
json.dump([os.getpid(), sys.argv[1:]], open({told!r}, "w"))
if "--broken" in sys.argv:
    sys.exit("no such model")
state = sys.argv[sys.argv.index("--state-dir") + 1]
open(os.path.join(state, "upload"), "w").close()
asked = 0

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        self.send_response(503 if asked < 3 else 200)
        self.end_headers()

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(f"INFO serving base on http://127.0.0.1:{{server.server_port}}", flush=True)
server.serve_forever()
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command ``manylora`` beside the interpreter, which writes its process id and arguments there."""
    path = tmp_path / "told.json"
    command = tmp_path / "manylora"
    command.write_text(SERVER.format(python=sys.executable, told=str(path)))
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    return path


def test_it_is_ready_while_the_block_runs_and_gone_afterwards(told: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def fail_inside() -> None:
        with fresh_server(["--threads", "2"], tmp_path / "out" / "log") as url:
            assert answers(url)
            pid, arguments = json.loads(told.read_text())
            state = Path(arguments[arguments.index("--state-dir") + 1])
            seen.update(url=url, pid=pid, arguments=arguments, state=state, had_state=state.is_dir())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert seen["arguments"][:3] == ["serve", "--port", "0"]
    assert seen["arguments"][-2:] == ["--threads", "2"]
    assert seen["had_state"]
    assert not seen["state"].exists()
    with pytest.raises(ProcessLookupError):
        os.kill(seen["pid"], 0)
    assert not answers(seen["url"])
    assert "serving base" in (tmp_path / "out" / "log").read_text()


def test_what_does_not_start_shows_its_log(told: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(TargetError, match=r"(?s)exit code 1.*no such model"),
        fresh_server(["--broken"], tmp_path / "log"),
    ):
        pytest.fail("it did not start")


def test_what_never_gets_ready_is_ended(told: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="not ready after 0 s"), fresh_server([], tmp_path / "log", ready_s=0.0):
        pytest.fail("it was not ready")
    if told.exists():  # it may have been ended before it wrote anything
        with pytest.raises(ProcessLookupError):
            os.kill(json.loads(told.read_text())[0], 0)


def test_a_server_that_is_no_such_server(tmp_path: Path, told: Path) -> None:
    with fresh_server([], tmp_path / "log") as url:
        wait_for(url, 1.0)
        assert requests.get(url, timeout=5).status_code == 200
        with pytest.raises(TargetError, match="/v1/models"):
            look_at(url, {})
