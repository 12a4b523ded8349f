"""What a socket may send that is not quite HTTP, or not what the server takes, by what is wrong with it."""

from __future__ import annotations

from typing import Final

BODY: Final = b'{"model": "tiny", "prompt": "Hi", "max_tokens": 1}'
JSON: Final = b"Content-Type: application/json"
LENGTH: Final = b"Content-Length: %d" % len(BODY)
CHUNKED: Final = b"Transfer-Encoding: chunked"
CLOSE: Final = b"Connection: close"


def post(*headers: bytes, body: bytes = BODY) -> bytes:
    """A completion with just these headers, besides its host."""
    return b"\r\n".join([b"POST /v1/completions HTTP/1.1", b"Host: 127.0.0.1", *headers, b"", body])


def start(line: bytes, *headers: bytes) -> bytes:
    """A request without a body, from its first line."""
    return b"\r\n".join([line, b"Host: 127.0.0.1", *(headers or (CLOSE,)), b"", b""])


_LENGTHS = (b"-1", b"abc", b"1e3", b"0x10", b"+5", b"5 5", b"5, 5", b"9" * 30, b"", b"\xb2")
_TYPES = (
    *(b"", b"text/plain", b"application/json; charset=utf-16", b"application/x-www-form-urlencoded", b"\xff/\xfe"),
    *(b"multipart/form-data", b"multipart/form-data; boundary=", b";;;", b"a" * 9000),
)
_ENCODINGS = (b"gzip", b"br", b"identity", b"x" * 500)
_KEYS = (
    *(b"", b"Bearer", b"Bearer ", b"Bearer \xff\xfe", b"Basic YTpi", b"bearer x", b"Bearer " + b"k" * 9000),
    *(b"Bearer a b", b"\x01", b"Bearer user\r\nAuthorization: Bearer admin"),
)
_STARTS = (
    *(b"FOO /health HTTP/1.1", b"get /health HTTP/1.1", b"GET  /health HTTP/1.1", b"GET /health", b"GET /h HTTP/9.9"),
    *(b"GET /health HTTP/1.0", b"PRI * HTTP/2.0", b"OPTIONS * HTTP/1.1", b"CONNECT 127.0.0.1:1 HTTP/1.1"),
    *(b"TRACE /health HTTP/1.1", b"GET http://example.org/v1/models HTTP/1.1", b"GET /v1/models/%00 HTTP/1.1"),
    *(b"GET /v1/models/%ff%fe HTTP/1.1", b"GET /v1/models/%zz HTTP/1.1", b"GET /v1/models/\xff HTTP/1.1"),
    *(b"GET /v1/models/%0d%0aX:%20y HTTP/1.1", b"GET //v1/models HTTP/1.1", b"GET /v1/../v1/adapters HTTP/1.1"),
    *(b"GET /v1/adapters/..%2f..%2fetc%2fpasswd HTTP/1.1", b"DELETE /v1/adapters/%2e%2e HTTP/1.1"),
    *(b"PATCH /v1/models HTTP/1.1", b"HEAD /v1/models HTTP/1.1", b"HEAD /health HTTP/1.1"),
    *(b"GET /" + b"a" * 70_000 + b" HTTP/1.1", b"GET /?" + b"a=b&" * 9000 + b" HTTP/1.1"),
    *(b"GET /v1/models# HTTP/1.1", b"\x16\x03\x01\x02\x00\x01", b"\x00" * 64, b""),
)

MALFORMED: Final[dict[str, bytes]] = {
    **{f"length {value!r}": post(JSON, b"Content-Length: " + value) for value in _LENGTHS},
    "too long a length": post(JSON, b"Content-Length: 500"),
    "too short a length": post(JSON, b"Content-Length: 5"),
    "two lengths": post(JSON, LENGTH, b"Content-Length: 5"),
    "the same length twice": post(JSON, LENGTH, LENGTH, CLOSE),
    "a length and chunks": post(JSON, LENGTH, CHUNKED, body=b"0\r\n\r\n"),
    "a smuggled request": post(JSON, b"Content-Length: 4", CHUNKED, body=b"0\r\n\r\n" + start(b"GET /x HTTP/1.1")),
    "an unknown transfer coding": post(JSON, b"Transfer-Encoding: gzip"),
    "chunked twice": post(JSON, b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"),
    "a chunk without a size": post(JSON, CHUNKED, body=b"xyz\r\n"),
    "a chunk of a huge size": post(JSON, CHUNKED, body=b"f" * 20 + b"\r\n"),
    "a chunk of a negative size": post(JSON, CHUNKED, body=b"-5\r\n"),
    "no body at all": post(JSON, body=b""),
    "a header without a colon": post(b"garbage"),
    "a header without a name": post(b": value"),
    "a space before the colon": post(b"X-Odd : value"),
    "a folded header": post(b"X-Odd: a\r\n b", CLOSE),
    "a NUL in a header": post(b"X-Odd: a\x00b"),
    "bytes in a header": post(JSON, LENGTH, b"X-Odd: \xff\xfe\x80"),
    "a bare carriage return": post(b"X-Odd: a\rb"),
    "line feeds alone": b"GET /health HTTP/1.1\nHost: 127.0.0.1\nConnection: close\n\n",
    "five thousand headers": post(*[b"X-Many: y"] * 5000),
    "a huge header": post(b"X-Huge: " + b"a" * 300_000),
    "no host": b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two hosts": start(b"GET /v1/adapters HTTP/1.1", b"Host: example.org", CLOSE),
    **{f"type {kind[:40]!r}": post(b"Content-Type: " + kind, LENGTH, CLOSE) for kind in _TYPES},
    **{f"encoding {kind[:40]!r}": post(JSON, b"Content-Encoding: " + kind, LENGTH, CLOSE) for kind in _ENCODINGS},
    **{f"key {key[:40]!r}": post(JSON, b"Authorization: " + key, LENGTH, CLOSE) for key in _KEYS},
    **{f"start {line[:40]!r}": start(line) for line in _STARTS},
    "an upgrade to websockets": start(
        *(b"GET /v1/models HTTP/1.1", b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13"),
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ),
    "an upgrade to HTTP/2": start(
        *(b"GET /health HTTP/1.1", b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAM")
    ),
    "an expectation": post(JSON, b"Expect: 100-continue", LENGTH, CLOSE),
    "an expectation of something else": post(JSON, b"Expect: tea", LENGTH, CLOSE),
    "odd ids": post(JSON, b"X-Request-Id: \xff", b"X-Request-Id: b", b"traceparent: 00-zz-zz-zz", LENGTH, CLOSE),
    "three requests at once": post(JSON, LENGTH) * 2 + start(b"GET /health HTTP/1.1"),
    "half a request line": b"POST /v1/comp",
    "half a head": post(b"Content-Le", body=b"").rstrip(),
    "half a body": post(JSON, LENGTH, body=BODY[:10]),
    "a body after a GET": start(b"GET /health HTTP/1.1", b"Content-Length: 5", CLOSE) + b"hello",
}
