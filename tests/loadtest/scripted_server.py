"""A server that answers by the model's name: each name is one way in which a stream can go."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = (
    "base",
    "good",
    "double",
    "busy",
    "error_event",
    "broken",
    "no_done",
    "empty",
    "slow",
    "no_usage",
    "not_json",
    "long",
)
GAP_S = 0.01
SLOW_S = 0.4


@dataclass
class Seen:
    """What the server was asked, in order."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    swaps: list[tuple[str, str]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    connections: int = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: Seen

    def setup(self) -> None:
        super().setup()
        self.seen.connections += 1

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            data = [{"id": name, "parent": None if name == "base" else "base", "root": f"/{name}"} for name in MODELS]
            self._json(200, {"object": "list", "data": data})
        else:
            self._json(200, {"status": "ready"})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.swaps.append(("put", self.headers.get("Authorization", "")))
        self._json(200, {"version": ("feed" if len(self.seen.swaps) < 5 else "beef") * 16})

    def do_DELETE(self) -> None:
        self.seen.swaps.append(("delete", self.headers.get("Authorization", "")))
        self._json(200, {"deleted": True})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with suppress(BrokenPipeError, ConnectionResetError):  # a client may leave
            self._answer(body)

    def _answer(self, body: dict[str, Any]) -> None:
        self.seen.bodies.append({"path": self.path, **body})
        self.seen.times.append(time.perf_counter())
        self.seen.keys.add(self.headers.get("Authorization", ""))
        model, count = body["model"], body["max_tokens"]
        if model == "busy":
            return self._json(429, {"error": {"message": "try later"}})
        if model == "slow":
            time.sleep(SLOW_S)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chat = "chat" in self.path
        per_event = 2 if model == "double" else 1
        for i in range(0 if model == "empty" else count // per_event):
            if i == 2 and model == "broken":
                self.close_connection = True
                return None
            if i == 2 and model == "error_event":
                self._event({"error": {"message": "it failed"}})
                return self._chunk(b"")
            if i == 2 and model == "not_json":
                self._chunk(b"data: {]\n\n")
                return self._chunk(b"")
            text = "ab" * per_event
            choice = {"index": 0, "finish_reason": None} | ({"delta": {"content": text}} if chat else {"text": text})
            self._event({"choices": [choice], "system_fingerprint": "fp_base_feedfeed"})
            time.sleep(GAP_S)
        if model != "no_usage":
            tokens = 0 if model == "empty" else count
            self._event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})
        if model != "no_done":
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")
        return None

    def _event(self, fields: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(fields).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _json(self, status: int, fields: dict[str, Any]) -> None:
        data = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def scripted_server() -> Iterator[tuple[str, Seen]]:
    """Its URL and what it sees, while the block runs."""
    seen = Seen()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"seen": seen}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
