"""The server's log: lines for people, or one JSON object a line, on stderr; everybody's, uvicorn's included.

What a client sent never makes a line of its own: in text, what a terminal would obey is escaped and further lines of a
message are indented; in JSON all of it is inside of strings.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final, Literal, TextIO

LogFormat = Literal["text", "json"]

current_request: ContextVar[str] = ContextVar("current_request", default="")
"""The id of the HTTP request that the running task serves; its log lines carry it."""

FIELDS: Final = "manylora_fields"
"""Attribute of a record (by ``extra=``) with fields of its own: keys of the JSON object, ``key=value`` in text."""

_CHATTY: Final = ("uvicorn", "httpx", "huggingface_hub")
"""Libraries that tell at ``info`` what is nobody's business but their own."""


def set_up_logging(level: str, format: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Send the process's log to ``stream`` (stderr). ``level``: debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # A warning printed by Python itself would be a line that is not JSON.
    logging.captureWarnings(format == "json")
    if level != "debug":
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """``2026-01-31 12:00:00,123 INFO logger: message key=value [request id]``."""

    def format(self, record: logging.LogRecord) -> str:
        at = f"{self.formatTime(record)} {record.levelname} {record.name}:"
        fields: Mapping[str, Any] = getattr(record, FIELDS, {})
        words = [_printable(record.getMessage())]
        words += [f"{name}={_word(value)}" for name, value in fields.items() if value is not None]
        request_id = fields.get("request_id") or current_request.get()
        if request_id and "request_id" not in fields:
            words.append(f"[{request_id}]")
        text = " ".join((at, *words))
        for trace in _traces(self, record):
            text += "\n    " + _printable(trace)
        return text


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message"}``, the request's id and the record's own fields, and the traceback as
    ``exception``. Times are UTC, with microseconds."""

    def format(self, record: logging.LogRecord) -> str:
        whole, part = divmod(record.created, 1)
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{int(part * 1e6):06d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request.get():
            line["request_id"] = request_id
        line.update(getattr(record, FIELDS, {}))
        if traces := _traces(self, record):
            line["exception"] = "\n".join(traces)
        # ensure_ascii: a surrogate out of a file name would be no UTF-8.
        return json.dumps(line, default=str)


def _traces(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    traces = []
    if record.exc_info:
        traces.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        traces.append(formatter.formatStack(record.stack_info))
    return traces


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\n    " if c == "\n" else ascii(c)[1:-1] for c in text.rstrip("\n"))


def _word(value: Any) -> str:
    """A field's value as one word, or in quotes."""
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    text = str(value)
    return text if text and text.isprintable() and not set(text) & set(' "\\=') else json.dumps(text)
