"""What was used, by whom: tokens, requests and waiting time by adapter and by tenant, each with a bounded number of
series.

Recorded on the step loop's thread and read at scrapes; no lock is needed, as each table is copied in one operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

from prometheus_client.core import Metric, SummaryMetricFamily

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.metric_families import OTHER, counter
from manylora.server.engine.request import FinishReason

ANYBODY: Final = "_anybody"
"""Label value of requests without a tenant, as all are where there is no file of keys."""


@dataclass
class Usage:
    prompt_tokens: int = 0
    generation_tokens: int = 0
    queue_seconds: float = 0.0
    queued: int = 0
    requests: Counter[str] = field(default_factory=Counter)

    def add(self, reason: FinishReason, queued: float, prompt_tokens: int, generation_tokens: int) -> None:
        """A request has ended, after it waited ``queued`` seconds."""
        self.requests[reason] += 1
        self.prompt_tokens += prompt_tokens
        self.generation_tokens += generation_tokens
        self.queue_seconds += queued
        self.queued += 1


def families(label: str, series: list[tuple[str, Usage]]) -> Iterator[Metric]:
    """``manylora_<label>_*`` with the label ``label``."""
    prefix, by = f"manylora_{label}", (label,)
    yield counter(
        f"{prefix}_prompt_tokens",
        f"Prompt tokens, by {label}, of the requests that ended.",
        by,
        [((name,), one.prompt_tokens) for name, one in series],
    )
    yield counter(
        f"{prefix}_generation_tokens",
        f"Tokens generated, by {label}, for the requests that ended.",
        by,
        [((name,), one.generation_tokens) for name, one in series],
    )
    yield counter(
        f"{prefix}_requests",
        f"Requests that ended, one for each choice, by {label} and reason.",
        (label, "finished_reason"),
        [((name, reason), count) for name, one in series for reason, count in one.requests.copy().items()],
    )
    queue = SummaryMetricFamily(
        f"{prefix}_queue_seconds", f"Seconds from arrival to the first step, by {label}.", labels=by
    )
    for name, one in series:
        queue.add_metric((name,), one.queued, one.queue_seconds)
    yield queue


class AdapterUsage:
    """By an adapter's name; its series go with the last version that has had it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_name: dict[str, Usage] = {}
        self._versions: dict[str, set[str]] = {}

    def of(self, adapter: AdapterRef) -> Usage:
        """To be added to."""
        usage = self._by_name.get(adapter.name)
        if usage is None:
            if len(self._by_name) >= self._limit:
                return self._by_name.setdefault(OTHER, Usage())
            usage = self._by_name[adapter.name] = Usage()
        self._versions.setdefault(adapter.name, set()).add(adapter.version)
        return usage

    def tokens(self, name: str) -> tuple[int, int]:
        """Prompt and generated tokens; zeros before the first. Any thread."""
        usage = self._by_name.get(name)
        return (0, 0) if usage is None else (usage.prompt_tokens, usage.generation_tokens)

    def forget(self, adapter: AdapterRef) -> None:
        """A version is gone for good."""
        versions = self._versions.get(adapter.name)
        if versions is not None:
            versions.discard(adapter.version)
            if not versions:
                del self._versions[adapter.name], self._by_name[adapter.name]

    def collect(self) -> Iterator[Metric]:
        return families("adapter", sorted(self._by_name.copy().items()))


class TenantUsage:
    """By a tenant's name. Until ``retain`` says which names have series of their own, the first ``limit`` do."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_label: dict[str, Usage] = {}
        self._known: frozenset[str] | None = None
        """The names that may have series; None: any."""

    def label(self, name: str) -> str:
        """The label of a tenant's series. Any thread."""
        if not name:
            return ANYBODY
        known = self._known
        if known is not None:
            return name if name in known else OTHER
        if name not in self._by_label:
            if len(self._by_label) >= self._limit:
                return OTHER
            self._by_label.setdefault(name, Usage())
        return name

    def of(self, name: str) -> Usage:
        """To be added to."""
        return self._by_label.setdefault(self.label(name), Usage())

    def retain(self, names: Collection[str]) -> None:
        """From now on these tenants have series, and no others. Any thread."""
        self._known = frozenset(sorted(names)[: self._limit])
        # What the step loop adds to at this moment may come back once: `collect` shows it to nobody.
        for label in self._by_label.copy():
            if not self._is_shown(label):
                self._by_label.pop(label, None)

    def collect(self) -> Iterator[Metric]:
        series = sorted(self._by_label.copy().items())
        return families("tenant", [(label, usage) for label, usage in series if self._is_shown(label)])

    def _is_shown(self, label: str) -> bool:
        return self._known is None or label in self._known or label in (ANYBODY, OTHER)
