"""The server's log, for people and for machines."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from manylora.server.logs import FIELDS, LogFormat, current_request, set_up_logging

Log = Callable[[LogFormat], io.StringIO]


@pytest.fixture
def log_to() -> Iterator[Log]:
    """Sets up the process's log and returns what it writes to; afterwards all is as it was."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    chatty = {name: logging.getLogger(name).level for name in ("uvicorn", "httpx", "huggingface_hub")}

    def make(format: LogFormat, level: str = "info") -> io.StringIO:
        stream = io.StringIO()
        root.handlers = []  # pytest's own, which `force` would close
        set_up_logging(level, format, stream)
        return stream

    yield make
    root.setLevel(level)
    root.handlers = handlers
    logging.captureWarnings(False)
    for name, before in chatty.items():
        logging.getLogger(name).setLevel(before)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_text(log_to: Log) -> None:
    stream = log_to("text")
    logging.getLogger("some.module").warning("%d things", 3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING some\.module: 3 things\n", stream.getvalue())


def test_json(log_to: Log) -> None:
    stream = log_to("json")
    logging.getLogger("some.module").warning("%d \u2028 thïngs\n", 3)
    [line] = lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("time"))
    assert line == {"level": "warning", "logger": "some.module", "message": "3 \u2028 thïngs\n"}


def test_fields_of_a_record(log_to: Log) -> None:
    fields = {"route": "/v1/models", "model": 'two "words"', "seconds": 0.25, "reasons": ["stop", "length"], "no": None}
    stream = log_to("text")
    logging.getLogger("x").info("request", extra={FIELDS: fields})
    assert stream.getvalue().partition(" x: ")[2] == (
        'request route=/v1/models model="two \\"words\\"" seconds=0.2500 reasons=stop,length\n'
    )
    stream = log_to("json")
    logging.getLogger("x").info("request", extra={FIELDS: fields})
    assert {name: lines(stream)[0][name] for name in fields} == fields


@pytest.mark.parametrize("forged", ["a\n2026-01-01 00:00:00,000 INFO x: b", "\x1b[2J\r\x00", "\u2028\ud800"], ids=repr)
def test_nobody_forges_a_line_or_speaks_to_the_terminal(log_to: Log, forged: str) -> None:
    for format in ("text", "json"):
        stream = log_to(format)
        try:
            raise ValueError(forged)
        except ValueError:
            logging.getLogger("x").exception("failed: %s", forged, extra={FIELDS: {"model": forged}})
        text = stream.getvalue()
        text.encode()  # whatever it was, it is UTF-8 now
        if format == "json":
            assert [line["model"] for line in lines(stream)] == [forged]
        else:
            assert all(c.isprintable() or c == "\n" for c in text)
            assert [line for line in text.splitlines()[1:] if not line.startswith("    ")] == []


def test_lines_of_a_request_carry_its_id(log_to: Log) -> None:
    async def one(request_id: str) -> None:
        current_request.set(request_id)
        await asyncio.sleep(0)
        logging.getLogger("x").info("hello from %s", request_id)

    async def main() -> None:
        await asyncio.gather(one("a"), one("b"))

    stream = log_to("json")
    asyncio.run(main())
    logging.getLogger("x").info("nobody's")
    assert [(line["message"], line.get("request_id")) for line in lines(stream)] == [
        ("hello from a", "a"),
        ("hello from b", "b"),
        ("nobody's", None),
    ]
    stream = log_to("text")
    asyncio.run(main())
    assert [line.partition(" x: ")[2] for line in stream.getvalue().splitlines()] == [
        "hello from a [a]",
        "hello from b [b]",
    ]


def test_an_exception_is_one_line_of_json(log_to: Log) -> None:
    stream = log_to("json")
    try:
        raise KeyError("lost")
    except KeyError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
    [line] = lines(stream)
    assert line["exception"].startswith("Traceback (most recent call last)")
    assert line["exception"].endswith("KeyError: 'lost'")


def test_what_python_warns_of_is_json_too(log_to: Log) -> None:
    stream = log_to("json")
    warnings.warn("old news", DeprecationWarning, stacklevel=1)
    [line] = lines(stream)
    assert (line["level"], line["logger"]) == ("warning", "py.warnings")
    assert "old news" in line["message"]


def test_libraries_that_talk_much_are_heard_when_debugging(log_to: Log) -> None:
    stream = log_to("text")
    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    assert [line.rpartition(": ")[2] for line in stream.getvalue().splitlines()] == ["Invalid HTTP request received."]
