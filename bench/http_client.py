"""A client that costs next to nothing: raw sockets, no event loop, no parsing but for counting. On a machine whose
cores the server needs itself, a comfortable client would be what is measured.

    python -P bench/http_client.py PORT

For each line on standard input, a JSON list of completion bodies, sends them all at once and prints a line
{"seconds": ..., "tokens": [completion tokens of each]}.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

_READ: Final = 1 << 16


def stream_all(port: int, bodies: Sequence[dict[str, Any]]) -> list[int]:
    """Send all completions at once, read each stream to its end as it comes; completion tokens of each, as its usage
    says."""
    poll = select.epoll()
    connections: dict[int, tuple[int, socket.socket, list[bytes]]] = {}
    for index, body in enumerate(bodies):
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        connections[sock.fileno()] = index, sock, []
        poll.register(sock.fileno(), select.EPOLLIN)
    tokens = [0] * len(bodies)
    while connections:
        for number, _ in poll.poll():
            index, sock, parts = connections[number]
            part = sock.recv(_READ)
            if part:
                parts.append(part)
                continue
            poll.unregister(number)
            sock.close()
            del connections[number]
            tokens[index] = _completion_tokens(b"".join(parts))
    poll.close()
    return tokens


def _completion_tokens(answer: bytes) -> int:
    status = answer.split(b"\r\n", 1)[0]
    if b" 200 " not in status or b"data: [DONE]" not in answer:
        raise RuntimeError(f"{status!r}: {answer[-400:]!r}")
    usage = answer[answer.rindex(b'"completion_tokens"') :]
    return int(usage.split(b":", 1)[1].split(b",")[0].split(b"}")[0])


def main() -> None:
    port = int(sys.argv[1])
    for line in sys.stdin:
        bodies = json.loads(line)
        start = time.perf_counter()
        tokens = stream_all(port, bodies)
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
