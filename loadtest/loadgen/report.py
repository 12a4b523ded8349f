"""What a run leaves behind: summary.json, report.html, requests.jsonl, trace.jsonl; and the lines on the console."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from loadgen import plots
from loadgen.machine import machine
from loadgen.profiles import Profile
from loadgen.records import FAILURES
from loadgen.summary import summarise
from loadgen.traces import write_trace

if TYPE_CHECKING:
    from loadgen.session import LoadTest

TEMPLATE = Path(__file__).with_name("report.html.jinja")
LATENCIES = {
    "ttft_ms": "first token (TTFT)",
    "itl_ms": "between tokens (ITL)",
    "tpot_ms": "a token, on average (TPOT)",
    "request_ms": "whole request",
}


def write_results(load: LoadTest, server_flags: str) -> dict[str, Any]:
    """Summarise ``load``, which has stopped, and write all files into its folder; the summary."""
    out = load.settings.out
    out.mkdir(parents=True, exist_ok=True)
    summary = summarise(load, run_fields(load, server_flags))
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    with (out / "requests.jsonl").open("w", encoding="utf-8") as file:
        for record in load.records:
            file.write(json.dumps(record.fields(), ensure_ascii=False) + "\n")
    # At the times at which they were due, which for a closed loop is when they were sent: a replay is an open loop.
    asked = (replace(record.request, at_s=round(record.scheduled_s, 6)) for record in load.records)
    write_trace(out / "trace.jsonl", asked)
    (out / "report.html").write_text(html(summary, load), encoding="utf-8")
    return summary


def run_fields(load: LoadTest, server_flags: str) -> dict[str, Any]:
    """What was run, where. Without keys."""
    settings = load.settings
    return {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "seconds": round(load.clock(), 3),
        "interrupted": load.interrupted,
        "trace": None if settings.trace is None else str(settings.trace),
        "left_out_of_trace": load.left_out,
        "profile": profile_fields(settings.profile),
        "loop": settings.profile.loop,
        "seed": settings.profile.seed,
        "warmup_s": settings.warmup_s,
        "grace_s": settings.grace_s,
        "timeout_s": settings.timeout_s,
        "server": load.target.url,
        "server_started_with": server_flags or None,
        "server_models": list(load.target.models),
        "models_asked": list(load.models),
        "machine": machine(),
    }


def profile_fields(profile: Profile) -> dict[str, Any]:
    fields = asdict(profile)
    fields["prompt"], fields["output"] = str(profile.prompt), str(profile.output)
    return fields


def html(summary: Mapping[str, Any], load: LoadTest) -> str:
    """One file that needs no other."""
    pictures, without = plots.draw(summary, load.records) if plots.available() else ([], plots.MISSING)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        s=summary, latencies=LATENCIES, kinds=FAILURES, pictures=pictures, without_pictures=without
    )


def figure(value: Any, digits: int = 1) -> str:
    """A number for a table; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def console_text(summary: Mapping[str, Any], out: Path) -> str:
    """The summary in a few lines."""
    total, generator = summary["total"], summary["generator"]
    requests, goodput, targets = total["requests"], total["goodput"], summary["targets"]
    lines = [
        f"\n{requests['due']} requests, {requests['answered']} answered, {requests['failed']} failed; "
        f"{figure(total['tokens_per_s'])} tokens/s, {figure(total['requests_per_s'], 2)} requests/s",
        f"goodput (first token <= {targets['ttft_ms']:g} ms, p95 gap <= {targets['itl_ms']:g} ms): "
        f"{figure(goodput['requests_per_s'], 2)} requests/s, {_share(goodput['share'])} of all",
        f"\n{'ms':28}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'max':>10}",
    ]
    lines += [_row(text, total[name]) for name, text in LATENCIES.items()]
    if len(summary["adapters"]) > 1:
        lines.append(f"\n{'first token of':28}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'max':>10}{'requests':>10}")
        lines += [
            f"{_row(name, one['ttft_ms'])}{one['requests']['due']:>10}" for name, one in summary["adapters"].items()
        ]
    if summary["swaps"] is not None:
        lines.append("\nswaps, every " + f"{summary['swaps']['every_s']:g} s, {summary['swaps']['failures']} failures")
        if summary["swaps"]["example"]:
            lines.append(f"  e.g. {summary['swaps']['example'][:200]}")
        lines += [_row(f"  {name}", one["took_ms"]) for name, one in summary["swaps"]["actions"].items()]
        lines.append(_row("  first token after a load", summary["swaps"]["first_request"]["ttft_ms"]))
    for kind, one in summary["failures"].items():
        lines.append(f"\nfailed: {one['count']} x {kind}, e.g. {one['example'][:160]}")
    if generator["bottleneck"]:
        lines.append(
            "\nTHE GENERATOR DID NOT KEEP UP, so these figures are partly its own: " + "; ".join(generator["reasons"])
        )
    if total["tokens_counted_by_server"] is False:
        lines.append("\nthe server sends no usage: tokens are counted as events, and may be more")
    lines.append("")
    for one in summary["thresholds"]:
        value = "no value" if one["value"] is None else f"it is {one['value']:g}"
        lines.append(f"{'ok    ' if one['passed'] else 'FAILED'} fail if {one['fail_if']}: {value}")
    if total["requests"]["answered"] == 0:
        lines.append("FAILED nothing was answered")
    lines.append(f"{out / 'report.html'}  {out / 'summary.json'}")
    return "\n".join(lines)


def _row(name: str, found: Mapping[str, Any] | None) -> str:
    statistics = ("p50", "p90", "p95", "p99", "max")
    return f"{name[:27]:28}" + "".join(f"{figure(found and found[one]):>10}" for one in statistics)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
