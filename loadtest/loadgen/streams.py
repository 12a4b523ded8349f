"""Send one request, read its stream, and fill its record. By locust's FastHttp client, so that locust's own statistics
(its web page, its CSV) show the same requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gevent
from geventhttpclient.response import HTTPParseError
from locust.contrib.fasthttp import FastHttpSession

from loadgen.records import Record
from loadgen.traces import PATHS


class _TooLate(gevent.Timeout):
    """This request's own time-out, not one of the client's."""


def ask(
    client: FastHttpSession, record: Record, *, clock: Callable[[], float], headers: Mapping[str, str], timeout_s: float
) -> None:
    """Returns when the answer has ended, however it did: ``record`` says how. A kill leaves it "unfinished"."""
    request = record.request
    record.sent_s = clock()
    record.failure = "unfinished"  # until it has ended: a greenlet can be killed at any switch
    deadline = _TooLate(timeout_s)
    with deadline, client.post(
        PATHS[request.kind], json=request.body(), headers=dict(headers), stream=True, catch_response=True,
        name=request.model,
    ) as response:  # fmt: skip
        record.failure = ""
        try:
            _read(response, record, clock)
        except _TooLate:
            record.fail("timeout", f"more than {timeout_s:g} s")
        except (HTTPParseError, OSError) as error:
            record.fail("broken_stream", f"after {len(record.events)} events: {error!r}")
        except gevent.GreenletExit:
            record.fail("unfinished", "cut off")
            raise
        finally:
            deadline.close()
            record.end_s = clock()
            if response.status_code:
                response.release()  # closes the connection, unless its answer was read to the end
        # locust's own number ends with the response's head.
        response.request_meta["response_time"] = (record.end_s - record.sent_s) * 1e3
        if record.failure:
            response.failure(f"{record.failure}: {record.message}")
        else:
            response.success()
    for kind, seconds in (("TTFT", record.ttft_s), ("TPOT", record.tpot_s)):
        if seconds is not None:
            client.request_event.fire(
                request_type=kind, name=request.model, response_time=seconds * 1e3, response_length=0, exception=None,
                context={},
            )  # fmt: skip


def _read(response: Any, record: Record, clock: Callable[[], float]) -> None:
    if response.status_code == 0:
        error = getattr(response.error, "original", None) or response.error  # the client wraps what it might retry
        kind = "timeout" if isinstance(error, gevent.Timeout | TimeoutError) else "broken_stream"
        record.fail("not_connected" if isinstance(error, ConnectionRefusedError) else kind, repr(error))
        return
    if response.status_code != 200:
        record.fail(f"http_{response.status_code}", response.text or "")
        return
    done = False
    last_s = 0.0
    for event in sse_data(response.stream):
        last_s = clock()
        if event == b"[DONE]":
            done = True
            continue
        try:
            fields = json.loads(event)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            record.fail("malformed_event", event[:200])
            return
        if "error" in fields:
            record.fail("error_event", fields["error"])
            return
        try:
            _take(fields, record, last_s)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            record.fail("malformed_event", f"{error!r} in {event[:200]!r}")
            return
    if not done:
        record.fail("no_done", f"after {len(record.events)} events")
    elif record.tokens_counted and record.tokens and not record.events:
        record.events.append(last_s)  # tokens without a text, such as an end at once: its only sign of life
    elif not record.tokens_counted:
        record.tokens = len(record.events)
    if record.tokens == 0:
        record.fail("no_tokens", "the stream ended without a token")


def _take(fields: Mapping[str, Any], record: Record, at_s: float) -> None:
    """One event: its text, its usage."""
    record.fingerprint = record.fingerprint or str(fields.get("system_fingerprint") or "")
    if any(_has_text(choice) for choice in fields.get("choices") or ()):
        record.events.append(at_s)
    if usage := fields.get("usage"):
        record.tokens, record.tokens_counted = int(usage["completion_tokens"]), True
        record.prompt_tokens = int(usage["prompt_tokens"])


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text"))
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))


def sse_data(stream: Any) -> Iterator[bytes]:
    """The data of server-sent events as they come; ``stream`` is geventhttpclient's response.

    Line by line: locust's ``iter_content`` returns only when it has a whole block, so that the tokens of a second
    would seem to come at once.
    """
    while line := stream.readline(b"\n"):
        if line.startswith(b"data:"):
            yield line.removeprefix(b"data:").strip()
