"""``docs/metrics.md``: every family of ``/metrics``, written from what the server really exposes.

``python -P -m manylora.server.api.observing.metrics_page`` prints the page; a test keeps the file in step with it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from manylora.adapters.versions import AdapterRef
from manylora.server.api.access.callers import Caller
from manylora.server.api.context import RequestContext
from manylora.server.api.observing.http_metrics import HttpMetrics
from manylora.server.api.observing.observation import Observed
from manylora.server.engine.metrics import EngineStats, Metrics
from manylora.server.engine.request import RequestTimes
from manylora.server.engine.tenant import Tenant

_HEAD: Final = """# Metrics

`GET /metrics`, in Prometheus's text format. Written by `python -P -m manylora.server.api.observing.metrics_page`;
`deploy/prometheus.yml` scrapes it, `deploy/grafana/manylora.json` shows it.

The families that are called `vllm:*` have vLLM's names, labels and buckets, so that dashboards made for vLLM and the
Kubernetes gateway's routing by adapter work unchanged. A counter's samples end in `_total`; a histogram's in `_bucket`,
`_sum` and `_count`; a summary's, which has no quantiles, in `_sum` and `_count`.

**Labels are bounded.** An adapter's series appear with its first request and go when its last version is freed; a
tenant's go when the file of keys no longer has it. Beyond 1,000 of either, the rest share `_other`. Requests without a
tenant are `_anybody`'s. Routes are templates (`/v1/models/{model:path}`); paths that have none, and unusual methods,
share `_other`. Status 499 is a client that left before it was answered. What the parser of HTTP refuses (400, 408 and
431, of a head or a body that did not come to its end) is no request yet, and is not counted.

**A request** of the engine is one choice: `n = 3` on two prompts is six. An HTTP request is one. `queue`, `prefill` and
`decode` times add up to the end-to-end latency of a request that has produced a token.
"""

_SECTIONS: Final[dict[str, tuple[str, ...]]] = {
    "vLLM's names": ("vllm:",),
    "Steps of the engine": ("manylora_step_",),
    "Prefix cache": ("manylora_prefix_",),
    "By adapter": ("manylora_adapter_",),
    "By tenant": ("manylora_tenant_",),
    "HTTP": ("manylora_http_", "manylora_rejected"),
    "Where adapters are": ("manylora_slots", "manylora_host_", "manylora_adapter_lo"),
}
"""By the longest prefix that fits."""


@dataclass(frozen=True)
class Family:
    """One row of the page."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def specimen() -> str:
    """``/metrics`` of a server that everything has happened to once."""
    metrics = Metrics("base")
    metrics.bind(lambda: EngineStats(1, 1, 1, 2, 1, 1, 1, 4, ("alice",), ("bob",)))
    metrics.step(0.01, rows=1, prefill_rows=0, tokens=1, adapters=1, generated=1)
    metrics.first_token(0.1, 3)
    metrics.inter_token(0.01)
    metrics.adapter_loaded(0.5)
    times = RequestTimes(0.0, 1.0, 2.0, 3.0)
    adapter = AdapterRef("alice", "0" * 64)
    metrics.request_ended([adapter], "stop", times, prompt_tokens=3, generation_tokens=2, tenant="acme")
    http = HttpMetrics(metrics.tenant_label)
    context = RequestContext("id", Caller(Tenant("acme")), arrived=0.0)
    context.failed("RateLimitError", "rate")
    http.record(Observed({}, context, "POST", "/v1/completions", 429, ended=0.1))
    return (metrics.render() + http.render()).decode()


def families(text: str) -> list[Family]:
    """What ``text``, an answer of ``/metrics``, has, in its order; a histogram's ``le`` is left out of the labels."""
    return [
        Family(family.name, family.type, _labels(family), family.documentation)
        for family in text_string_to_metric_families(text)
    ]


def _labels(family: Metric) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le"))


def page() -> str:
    """The text of docs/metrics.md."""
    sections: dict[str, list[Family]] = {}
    for family in families(specimen()):
        sections.setdefault(_section_of(family.name), []).append(family)
    parts = [_HEAD.rstrip()]
    for title in _SECTIONS:
        rows = [
            f"| `{_sample_name(one)}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels) or '-'} "
            f"| {one.text} |"
            for one in sections[title]
        ]
        parts += [f"\n## {title}\n", "| name | type | labels | what |", "| --- | --- | --- | --- |", *rows]
    return "\n".join(parts) + "\n"


def _section_of(name: str) -> str:
    _, title = max((len(p), title) for title, prefixes in _SECTIONS.items() for p in prefixes if name.startswith(p))
    return title


def _sample_name(family: Family) -> str:
    return f"{family.name}_total" if family.kind == "counter" else family.name


if __name__ == "__main__":
    sys.stdout.write(page())
