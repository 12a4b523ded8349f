"""A client that costs next to nothing: raw sockets, no parsing but for counting. On a machine whose cores the server
needs itself, a comfortable client would be what is measured.

    python -P bench/http_client.py PORT

For each line on standard input, a JSON list of completion bodies, sends them all at once and prints a line
{"seconds": ..., "tokens": [completion tokens of each]}.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any


async def _stream(port: int, body: dict[str, Any]) -> int:
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    status = answer.split(b"\r\n", 1)[0]
    if b" 200 " not in status or b"data: [DONE]" not in answer:
        raise RuntimeError(f"{status!r}: {answer[-400:]!r}")
    usage = answer[answer.rindex(b'"completion_tokens"') :]
    return int(usage.split(b":", 1)[1].split(b",")[0].split(b"}")[0])


async def stream_all(port: int, bodies: Sequence[dict[str, Any]]) -> list[int]:
    """Send all completions at once, read each stream to its end; completion tokens of each, as its usage says."""
    return await asyncio.gather(*(_stream(port, body) for body in bodies))


def main() -> None:
    port = int(sys.argv[1])
    for line in sys.stdin:
        bodies = json.loads(line)
        start = time.perf_counter()
        tokens = asyncio.run(stream_all(port, bodies))
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
