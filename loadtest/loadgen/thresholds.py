"""Pass or fail: ``--fail-if 'ttft_p95_ms>500'``.

A condition is NAME, one of > >= < <=, and a number; it says what is *not* wanted. A figure without a value, since
nothing was answered, fails: silence is no success."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from loadgen.errors import ThresholdError

PERCENTILES: Final = (50, 90, 95, 99)
_LATENCIES: Final = {"ttft": "ttft_ms", "itl": "itl_ms", "tpot": "tpot_ms", "request": "request_ms"}
_STATISTICS: Final = (*(f"p{p}" for p in PERCENTILES), "mean", "max")

OF_ADAPTER: Final[dict[str, tuple[str, ...]]] = {
    **{f"{name}_{s}_ms": (block, s) for name, block in _LATENCIES.items() for s in _STATISTICS},
    "requests": ("requests", "due"),
    "failures": ("requests", "failed"),
    "failure_share": ("requests", "failed_share"),
    "requests_per_s": ("requests_per_s",),
    "tokens_per_s": ("tokens_per_s",),
    "goodput_requests_per_s": ("goodput", "requests_per_s"),
    "goodput_share": ("goodput", "share"),
}
"""Figures of all requests, or, as NAME:FIGURE, of one model: where they are in its block of the summary."""

OF_RUN: Final[dict[str, tuple[str, ...]]] = {
    "swap_failures": ("swaps", "failures"),
    "swap_ttft_p95_ms": ("swaps", "first_request", "ttft_ms", "p95"),
    "send_delay_p95_ms": ("generator", "send_delay_ms", "p95"),
    "send_delay_max_ms": ("generator", "send_delay_ms", "max"),
    "generator_cpu_share": ("generator", "cpu_share"),
    "generator_lag_p99_ms": ("generator", "loop_lag_ms", "p99"),
    "generator_bottleneck": ("generator", "bottleneck"),
}
"""Figures that there is one of."""

_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip
_CONDITION = re.compile(r"\s*(?:(?P<model>.+):)?(?P<name>\w+)\s*(?P<compare>[<>]=?)\s*(?P<limit>[-+.\de]+)\s*")


@dataclass(frozen=True)
class Threshold:
    """Fails where ``compare(figure, limit)`` holds. ``model`` is empty for all requests."""

    name: str
    compare: str
    limit: float
    model: str = ""

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """ThresholdError for what is no condition on a figure that there is."""
        found = _CONDITION.fullmatch(text)
        if found is None:
            raise ThresholdError(f"--fail-if: expected e.g. 'ttft_p95_ms>500' or 'sql:itl_p99_ms>100', got {text!r}")
        name, model = found["name"], found["model"] or ""
        known = OF_ADAPTER if model else {**OF_ADAPTER, **OF_RUN}
        if name not in known:
            raise ThresholdError(f"--fail-if: no figure {name!r}; there are {', '.join(known)}")
        try:
            limit = float(found["limit"])
        except ValueError:
            raise ThresholdError(f"--fail-if: {found['limit']!r} in {text!r} is no number") from None
        return cls(name, found["compare"], limit, model)

    def __str__(self) -> str:
        return f"{self.model + ':' if self.model else ''}{self.name}{self.compare}{self.limit:g}"

    def check(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """``{"fail_if", "value", "passed"}``; the value is null where there is none, which does not pass."""
        value = self._value(summary)
        passed = value is not None and not _COMPARE[self.compare](value, self.limit)
        return {"fail_if": str(self), "value": value, "passed": passed}

    def _value(self, summary: Mapping[str, Any]) -> float | None:
        at: Any = summary
        if self.name in OF_ADAPTER:
            at = summary["adapters"].get(self.model) if self.model else summary["total"]
            path = OF_ADAPTER[self.name]
        else:
            path = OF_RUN[self.name]
        for key in path:
            if at is None:
                return None
            at = at.get(key)
        return None if at is None else float(at)


DEFAULTS: Final = (Threshold("failures", ">", 0),)
"""Without any --fail-if."""
WITH_SWAPS: Final = (*DEFAULTS, Threshold("swap_failures", ">", 0))
