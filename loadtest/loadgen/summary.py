"""From records to figures. README.md, "What the figures mean", says the same in words; change both together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loadgen.generator_health import bottlenecks
from loadgen.records import Record
from loadgen.settings import Targets
from loadgen.thresholds import PERCENTILES

if TYPE_CHECKING:  # locust, which they need, patches the standard library of whoever imports it
    from loadgen.adapter_swaps import Swapper
    from loadgen.session import LoadTest

_DIGITS = 3


def percentile(values: Sequence[float], p: float) -> float:
    """Of sorted, not empty ``values``: linear between the two nearest, numpy's default (Hyndman & Fan 1996, type 7)."""
    place = (len(values) - 1) * p / 100
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def distribution(seconds: Iterable[float]) -> dict[str, float | int] | None:
    """Count, mean, percentiles and largest in milliseconds; None of nothing."""
    values = sorted(seconds)
    if not values:
        return None
    found = {"mean": sum(values) / len(values), **{f"p{p}": percentile(values, p) for p in PERCENTILES}}
    found["max"] = values[-1]
    return {"n": len(values), **{name: round(value * 1e3, _DIGITS) for name, value in found.items()}}


def is_good(record: Record, targets: Targets) -> bool:
    """Answered in full, its first token within ``ttft_ms`` of when it was due, and the 95th percentile of the gaps
    between its own events within ``itl_ms``."""
    if not record.ok or record.ttft_s is None or record.ttft_s * 1e3 > targets.ttft_ms:
        return False
    gaps = sorted(record.itl_s)
    return not gaps or percentile(gaps, 95) * 1e3 <= targets.itl_ms


def block(records: Sequence[Record], window: tuple[float, float], targets: Targets) -> dict[str, Any]:
    """The figures of some requests. Latencies, counts and shares are of those that were due at or after the window's
    start; rates are of what came within the window, whenever it was due."""
    start, end = window
    length = end - start
    measured = [record for record in records if record.scheduled_s >= start]
    answered = [record for record in measured if record.ok]
    good = [record for record in records if is_good(record, targets)]
    n_good = sum(1 for record in good if record.scheduled_s >= start)

    def rate(amount: float) -> float | None:
        return round(amount / length, _DIGITS) if length > 0 else None

    def ended_inside(some: Sequence[Record]) -> int:
        return sum(1 for record in some if record.ok and record.end_s is not None and start <= record.end_s <= end)

    events = sum(len(record.events) for record in answered)
    tokens = sum(record.tokens for record in answered)
    failed = len(measured) - len(answered)
    return {
        "requests": {
            "due": len(measured),
            "answered": len(answered),
            "failed": failed,
            "failed_share": round(failed / len(measured), 6) if measured else None,
        },
        "requests_per_s": rate(ended_inside(records)),
        "tokens_per_s": rate(sum(record.tokens_between(start, end) for record in records)),
        "goodput": {
            "requests_per_s": rate(ended_inside(good)),
            "share": round(n_good / len(measured), 6) if measured else None,
        },
        "ttft_ms": distribution(r.ttft_s for r in answered if r.ttft_s is not None),
        "itl_ms": distribution(gap for record in answered for gap in record.itl_s),
        "tpot_ms": distribution(r.tpot_s for r in answered if r.tpot_s is not None),
        "request_ms": distribution(r.total_s for r in answered if r.total_s is not None),
        "prompt_tokens": sum(record.prompt_tokens or 0 for record in answered),
        "output_tokens": tokens,
        "tokens_per_event": round(tokens / events, _DIGITS) if events else None,
        "tokens_counted_by_server": all(record.tokens_counted for record in answered) if answered else None,
    }


def failures(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """By kind, the most frequent first: how many, of which models, and one message."""
    failed = [record for record in records if not record.ok]
    found: dict[str, dict[str, Any]] = {}
    for kind, count in Counter(record.failure for record in failed).most_common():
        of_kind = [record for record in failed if record.failure == kind]
        models = Counter(record.model for record in of_kind)
        found[kind] = {"count": count, "models": dict(models), "example": of_kind[0].message}
    return found


def swaps_block(swapper: Swapper) -> dict[str, Any]:
    """What became of the swaps: per action the server's time for it, and the first request for what was loaded."""
    failed = [swap for swap in swapper.swaps if swap.failure]
    probes = swapper.probes
    actions = {}
    for action in dict.fromkeys(swap.action for swap in swapper.swaps):
        of_action = [swap for swap in swapper.swaps if swap.action == action]
        done = [swap.took_s for swap in of_action if not swap.failure]
        actions[action] = {"n": len(of_action), "failed": len(of_action) - len(done), "took_ms": distribution(done)}
    return {
        "every_s": swapper.plan.every_s,
        "failures": len(failed) + sum(1 for probe in probes if not probe.ok),
        "actions": actions,
        "delay_ms": distribution(swap.sent_s - swap.due_s for swap in swapper.swaps),
        "first_request": {
            "n": len(probes),
            "failures": failures(probes),
            "ttft_ms": distribution(p.ttft_s for p in probes if p.ok and p.ttft_s is not None),
        },
        "example": f"{failed[0].action}: {failed[0].failure} {failed[0].message}" if failed else "",
    }


def generator_block(load: LoadTest) -> dict[str, Any]:
    """Whether the generator kept up. Send delays are of an open loop: a closed one has no schedule to fall behind."""
    health = load.health
    start, _ = load.window
    sent = [r for r in load.records if r.sent_s is not None and r.scheduled_s >= start]
    delay = None if load.closed else distribution(r.sent_s - r.scheduled_s for r in sent if r.sent_s is not None)
    lag = distribution(health.lags_s)
    shares = [share for at_s, share in health.cpu if at_s >= start]
    cpu = round(sum(shares) / len(shares), _DIGITS) if shares else None
    never = sum(1 for record in load.records if record.sent_s is None)
    reasons = bottlenecks(
        cpu_share=cpu,
        lag_p99_ms=lag["p99"] if lag else None,
        send_p95_ms=delay["p95"] if delay else None,
        reached_max_open=health.reached_max_open,
    )
    if never:
        reasons.append(f"{never} requests were due and never sent")
    return {
        "cpu_share": cpu,
        "loop_lag_ms": lag,
        "send_delay_ms": delay,
        "max_open": load.settings.max_open,
        "waited_for_max_open": health.reached_max_open,
        "never_sent": never,
        "bottleneck": bool(reasons),
        "reasons": reasons,
    }


def timeline(load: LoadTest) -> dict[str, list[float]]:
    """A value a second (of longer runs, 300 in all): tokens a second, requests a second due and answered, in flight."""
    last = max((record.end_s or record.scheduled_s for record in load.records), default=0.0)
    step = max(1.0, last / 300)
    edges = [step * i for i in range(math.ceil(last / step) + 1)] or [0.0]
    due, ended = (_histogram(times, step, len(edges)) for times in (
        [r.scheduled_s for r in load.records], [r.end_s for r in load.records if r.ok and r.end_s is not None]
    ))  # fmt: skip
    tokens = [0.0] * len(edges)
    for record in load.records:
        for at_s in record.events:
            tokens[min(int(at_s / step), len(edges) - 1)] += record.tokens / len(record.events)
    return {
        "t_s": [round(edge, _DIGITS) for edge in edges],
        "tokens_per_s": [round(count / step, _DIGITS) for count in tokens],
        "due_per_s": [round(count / step, _DIGITS) for count in due],
        "answered_per_s": [round(count / step, _DIGITS) for count in ended],
        "in_flight": _in_flight(load.records, edges),
    }


def _histogram(times: Iterable[float], step: float, n: int) -> list[float]:
    counts = [0.0] * n
    for at_s in times:
        counts[min(int(at_s / step), n - 1)] += 1
    return counts


def _in_flight(records: Sequence[Record], edges: Sequence[float]) -> list[float]:
    """How many had been sent and had not ended, at each of ``edges``."""
    changes = sorted(
        [(r.sent_s, 1) for r in records if r.sent_s is not None]
        + [(r.end_s, -1) for r in records if r.sent_s is not None and r.end_s is not None]
    )
    counts, running, i = [], 0, 0
    for edge in edges:
        while i < len(changes) and changes[i][0] <= edge:
            running += changes[i][1]
            i += 1
        counts.append(float(running))
    return counts


def summarise(load: LoadTest, run: Mapping[str, Any]) -> dict[str, Any]:
    """The whole summary; ``run`` is what was run where. Adapters come in the order of the server's list."""
    window, targets = load.window, load.settings.targets
    asked = {record.model for record in load.records}
    summary: dict[str, Any] = {
        "format": "manylora-loadtest/1",
        "run": dict(run),
        "targets": asdict(targets),
        "window_s": [round(edge, _DIGITS) for edge in window],
        "total": block(load.records, window, targets),
        "adapters": {
            model: block([r for r in load.records if r.model == model], window, targets)
            for model in (*(m for m in load.models if m in asked), *sorted(asked - set(load.models)))
        },
        "failures": failures(record for record in load.records if record.scheduled_s >= window[0]),
        "swaps": None if load.swapper is None else swaps_block(load.swapper),
        "generator": generator_block(load),
        "timeline": timeline(load),
    }
    summary["thresholds"] = [threshold.check(summary) for threshold in load.settings.thresholds]
    summary["passed"] = (
        all(one["passed"] for one in summary["thresholds"]) and summary["total"]["requests"]["answered"] > 0
    )
    return summary
