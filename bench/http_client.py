"""A client that costs next to nothing: raw sockets, no event loop, no parsing but for counting. On a machine whose
cores the server needs itself, a comfortable client would be what is measured.

    python -P bench/http_client.py PORT

For each line on standard input, a JSON list of completion bodies, sends them all at once and prints a line
{"seconds": ..., "tokens": [completion tokens of each]}.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

_READ: Final = 1 << 16


def stream_all(port: int, requests: Sequence[bytes]) -> list[int]:
    """Send all requests at once, a connection each, and read each stream as it comes, to its end; completion tokens of
    each, as its usage says."""
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in requests]
    poll = select.epoll()
    waiting = {}
    for index, (sock, request) in enumerate(zip(sockets, requests, strict=True)):
        sock.sendall(request)
        waiting[sock.fileno()] = index
        poll.register(sock.fileno(), select.EPOLLIN)
    answers = [b""] * len(requests)
    while waiting:
        for number, _ in poll.poll():
            index = waiting[number]
            part = sockets[index].recv(_READ)
            answers[index] += part
            if not part:
                sockets[index].close()  # and it is polled no more
                del waiting[number]
    poll.close()
    return [_completion_tokens(answer) for answer in answers]


def _request(port: int, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data


def _completion_tokens(answer: bytes) -> int:
    status = answer.split(b"\r\n", 1)[0]
    if b" 200 " not in status or b"data: [DONE]" not in answer:
        raise RuntimeError(f"{status!r}: {answer[-400:]!r}")
    usage = answer[answer.rindex(b'"completion_tokens"') :]
    return int(usage.split(b":", 1)[1].split(b",")[0].split(b"}")[0])


def main() -> None:
    port = int(sys.argv[1])
    # It stands for clients on other machines: what it reads must not take a processor from a kernel halfway.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    for line in sys.stdin:
        requests = [_request(port, body) for body in json.loads(line)]
        start = time.perf_counter()
        tokens = stream_all(port, requests)
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
