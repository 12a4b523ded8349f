"""Writing more of a streamed answer without asking for it: what every streamed token costs.

ASGI's ``send`` is a coroutine, within one of each middleware, that only a task can wait for; so a token that goes out
by it costs waking the response's task as well. All that is needed once an answer has begun and its client keeps up is
the frame around a chunk. A response finds the writer in its scope, where the server has one, and uses ``send`` for all
else: the beginning, the end, and whenever the client must be waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_EXTENSION: Final = "manylora.body"


class BodyWriter:
    """Of one answer; for the event loop's thread."""

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write

    def write(self, data: bytes) -> None:
        """Write this now: some more of the body, not nothing. To be called if ``is_free`` only."""
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def is_free(self) -> bool:
        """Whether ``send`` would write more of the body at once: it is one in chunks that has begun and has not
        ended, and the client is there and keeps up."""
        cycle = self._cycle
        return bool(
            cycle.chunked_encoding
            and not self._flow.write_paused
            and not cycle.disconnected
            and not cycle.response_complete
        )


def provide_writer(cycle: RequestResponseCycle) -> None:
    """Put a writer of its answer into the request's scope."""
    extensions: MutableMapping[str, Any] = cycle.scope.setdefault("extensions", {})
    extensions[_EXTENSION] = BodyWriter(cycle)


def writer_in(scope: Mapping[str, Any]) -> BodyWriter | None:
    """None where another server than ours runs the application."""
    writer: BodyWriter | None = scope.get("extensions", {}).get(_EXTENSION)
    return writer
