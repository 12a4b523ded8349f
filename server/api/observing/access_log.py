"""One line of log for each request."""

from __future__ import annotations

import logging
from typing import Any, Final

from manylora.server.api.observing.observation import PROBES, Observed
from manylora.server.logs import FIELDS

_log = logging.getLogger("manylora.access")

_MAX_MODEL: Final = 128
"""Characters of a model's name that are logged: what does not exist may have any name."""


def log_request(observed: Observed) -> None:
    """Log it: a bug as an error, what could not be served as a warning, probes only when debugging, the rest as
    information."""
    if observed.route in PROBES:
        level = logging.DEBUG
    elif observed.status == 500:
        level = logging.ERROR
    else:
        level = logging.WARNING if observed.status > 500 else logging.INFO
    if _log.isEnabledFor(level):
        _log.log(level, "request", extra={FIELDS: fields(observed)})


def fields(observed: Observed) -> dict[str, Any]:
    """The line's keys, in order; None for what the request did not come to."""
    context = observed.context
    model = context.model
    has_run = bool(context.finished)
    line: dict[str, Any] = {
        "method": observed.method,
        "route": observed.route,
        "status": observed.status,
        "seconds": _rounded(observed.seconds),
        "tenant": context.caller.tenant.name or None,
        "model": model if model is None or len(model) <= _MAX_MODEL else model[:_MAX_MODEL] + "…",
        "prompt_tokens": context.prompt_tokens,
        "completion_tokens": observed.completion_tokens if has_run else None,
        "queue_seconds": _rounded(observed.queue_seconds),
        "ttft_seconds": _rounded(observed.first_token_seconds),
        "finish_reasons": observed.finish_reasons if has_run else None,
        "error_type": context.error_type,
        "request_id": context.request_id,
    }
    if context.trace_id is not None:
        line["trace_id"] = context.trace_id
    return line


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
