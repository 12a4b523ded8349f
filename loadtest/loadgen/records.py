"""What is kept of each request, in seconds of the run's clock (0: the first could be sent)."""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, field
from typing import Any

from loadgen.traces import TracedRequest

FAILURES = {
    "not_connected": "no connection could be made",
    "http_NNN": "the status was not 200",
    "error_event": "the stream held an error event",
    "malformed_event": "the stream held an event that is no JSON object",
    "broken_stream": "the connection broke before the stream's end",
    "no_done": "the stream ended without [DONE]",
    "no_tokens": "the answer had no token",
    "timeout": "it took longer than --timeout",
    "unfinished": "it still ran when the run, with its grace, was over",
    "wrong_version": "an answer right after a swap was not by the version just loaded",
}
"""Every kind, and what it means."""


@dataclass
class Record:
    """One request. ``tokens`` are its usage's, or, from a server that sends none, its events (``tokens_counted`` is
    then false). ``events`` are the times at which events that carry text came."""

    request: TracedRequest
    scheduled_s: float
    sent_s: float | None = None
    end_s: float | None = None
    events: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int | None = None
    tokens_counted: bool = False
    fingerprint: str = ""
    failure: str = ""
    message: str = ""

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def ok(self) -> bool:
        return self.end_s is not None and not self.failure

    def fail(self, kind: str, message: object) -> None:
        """The first reason stays."""
        if not self.failure:
            self.failure, self.message = kind, str(message)[:300]

    @property
    def ttft_s(self) -> float | None:
        """From the time it was due to its first token. A request that had to wait in the generator waited, too:
        measured from its sending, a stalled server would hide how long others could not even ask (coordinated
        omission)."""
        return self.events[0] - self.scheduled_s if self.events else None

    @property
    def itl_s(self) -> list[float]:
        """The gaps between its events, as a reader sees them. An event may carry several tokens."""
        return [later - earlier for earlier, later in itertools.pairwise(self.events)]

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first, on average."""
        return (self.events[-1] - self.events[0]) / (self.tokens - 1) if self.tokens > 1 and self.events else None

    @property
    def total_s(self) -> float | None:
        return self.end_s - self.scheduled_s if self.end_s is not None else None

    def tokens_between(self, start_s: float, end_s: float) -> float:
        """Of its tokens, those that came in [start, end): spread evenly over its events, as nothing says how many each
        carried."""
        if not self.events:
            return 0.0
        # Events are in order of time; half-open, so that windows side by side count each event once.
        inside = bisect.bisect_left(self.events, end_s) - bisect.bisect_left(self.events, start_s)
        return self.tokens * inside / len(self.events)

    def fields(self) -> dict[str, Any]:
        """For a JSON line."""
        return {
            "scheduled_s": round(self.scheduled_s, 6),
            "sent_s": _rounded(self.sent_s),
            "end_s": _rounded(self.end_s),
            "model": self.model,
            "kind": self.request.kind,
            "prompt_tokens": self.prompt_tokens,
            "max_tokens": self.request.max_tokens,
            "tokens": self.tokens,
            "failure": self.failure,
            "message": self.message,
            "fingerprint": self.fingerprint,
            "events_s": [round(at, 4) for at in self.events],
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
