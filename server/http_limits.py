"""uvicorn's HTTP protocol with a limit on what a client may send without it coming to anything.

The parser (llhttp, by way of httptools) collects a header, a URL, a trailer or a chunk's extension of any length,
before any handler, key or limit on bodies is looked at: a hundred megabytes of one header would be a hundred megabytes
of memory, for each connection.
"""

from __future__ import annotations

import json
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD: Final = 1 << 18
"""Bytes; a quarter of a megabyte is some thirty times what proxies let through."""

_BODY: Final = json.dumps(
    {
        "error": {
            "message": f"The request's head is larger than the {MAX_HEAD} bytes accepted here.",
            "type": "BadRequestError",
            "param": None,
            "code": 431,
        }
    }
).encode()

_RESPONSE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class LimitedHttp(HttpToolsProtocol):
    """Answers 431 and closes when more than ``MAX_HEAD`` bytes have come since the last that got anywhere: that ended a
    head, were part of a body, or ended a message. What comes in one read of the socket is not looked into further.
    """

    _pending = 0

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        super().data_received(data)
        if self._pending > MAX_HEAD and not self.transport.is_closing():
            self.transport.write(_RESPONSE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._pending = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._pending = 0
        super().on_message_complete()
