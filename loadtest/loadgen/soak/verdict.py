"""A soak's summary: what was done, what was wrong, what grew, and whether it passed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadgen.machine import machine
from loadgen.soak.session import Soak
from loadgen.soak.vitals import MIB, Sample, Slope, rise, slope

LONG_MINUTES = 5.0
"""From so long a soak on, everything must have been done at least once."""
EXPECTED = (
    "answers, streamed", "answers, whole", "left in the stream", "left before the first token", "loads", "replacements",
    "unloads", "pins", "aliases", "merges, exact", "merges, compact", "unmerges", "wrong requests", "broken adapters",
    "404 while a name was absent", "scrapes",
)  # fmt: skip
_MAX_RISE = {"threads": 4, "files": 16}
"""Executors start threads, and clients open connections, as they are needed: a few more late in a run are no leak."""


@dataclass(frozen=True)
class Limits:
    """``max_slope``: MiB an hour. ``warm_up_s``: samples before are left out."""

    max_slope: float
    warm_up_s: float


def growth(samples: Sequence[Sample], limits: Limits) -> tuple[Slope | None, dict[str, int], list[str]]:
    """RSS in MiB, without the samples that a merge was part of; how much threads and files rose; what is wrong."""
    late = [one for one in samples if one.at_s >= limits.warm_up_s]
    fitted = slope([(one.at_s, one.rss / MIB) for one in late if one.comparable])
    rises = {"threads": rise([one.threads for one in late]), "files": rise([one.files for one in late])}
    wrong = [f"{kind}: {n} more at the end" for kind, n in rises.items() if n > _MAX_RISE[kind]]
    if fitted is not None and fitted.exceeds(limits.max_slope):
        wrong.append(f"RSS grows by {fitted.per_hour:.0f} ± {fitted.noise:.0f} MiB an hour")
    return fitted, rises, wrong


def summary(soak: Soak, limits: Limits) -> dict[str, Any]:
    """All figures; ``problems`` says in words why it did not pass."""
    judge = soak.judge
    fitted, rises, problems = growth(soak.samples, limits)
    problems += [f"{n} x {kind}" for kind, n in judge.failed.most_common()]
    if not judge.checked:
        problems.append("not a single answer was checked")
    if soak.settings.minutes >= LONG_MINUTES:
        problems += [f"nothing of this happened: {kind}" for kind in EXPECTED if not judge.done[kind]]
    if soak.interrupted:
        problems.append("interrupted")
    return {
        "minutes": round(soak.soaked_s / 60, 2),
        "seed": soak.settings.seed,
        "versions": soak.settings.versions,
        "clients": soak.settings.clients,
        "passed": not problems,
        "problems": problems,
        "checked": judge.checked,
        "checked_merged": sum(n for key, n in judge.checked_by.items() if key.endswith(("-exact", "-compact"))),
        "checked_weights": len(judge.checked_by),
        "wrong_version_answers": judge.failed["wrong version"] + judge.failed["wrong answer"],
        "done": dict(sorted(judge.done.items())),
        "statuses": {str(status): n for status, n in sorted(judge.statuses.items())},
        "failed": dict(judge.failed),
        "rss": rss_fields(soak.samples, fitted, limits),
        "threads_rise": rises["threads"],
        "files_rise": rises["files"],
        "exit_code": soak.exit_code,
        "integrity": soak.integrity,
        "references_s": round(soak.prepared_s, 1),
    }


def rss_fields(samples: Sequence[Sample], fitted: Slope | None, limits: Limits) -> dict[str, Any]:
    late = [one for one in samples if one.at_s >= limits.warm_up_s]
    used = [one.rss / MIB for one in late if one.comparable]

    def finite(value: float) -> float | None:
        return round(value, 1) if math.isfinite(value) else None

    return {
        "slope_mib_per_hour": None if fitted is None else finite(fitted.per_hour),
        "noise_mib_per_hour": None if fitted is None else finite(fitted.noise),
        "limit_mib_per_hour": limits.max_slope,
        "verdict": verdict(fitted, limits.max_slope),
        "points": 0 if fitted is None else fitted.points,
        "fit_mib": None if fitted is None else [round(fitted.first, 1), round(fitted.last, 1)],
        "range_mib": [round(min(used), 1), round(max(used), 1)] if used else None,
        "max_mib": round(max(one.rss for one in samples) / MIB, 1) if samples else None,
        "warm_up_s": limits.warm_up_s,
    }


def verdict(fitted: Slope | None, limit: float) -> str:
    if fitted is None or math.isinf(fitted.noise):
        return "too short to tell"
    if fitted.exceeds(limit):
        return "grows"
    return "flat" if fitted.within(limit) else "not told from noise"


def console_text(found: dict[str, Any], out: Path) -> str:
    rss = found["rss"]
    lines = [
        f"\n{found['minutes']:g} minutes, seed {found['seed']}",
        f"  answers checked   {found['checked']} (by {found['checked_weights']} different weights; merged: "
        f"{found['checked_merged']})",
        *(f"  {kind:30} {n}" for kind, n in found["done"].items()),
        f"  statuses          {', '.join(f'{n} x {status}' for status, n in found['statuses'].items())}",
        f"  RSS               {rss['slope_mib_per_hour']} ± {rss['noise_mib_per_hour']} MiB an hour: {rss['verdict']} "
        f"(limit {rss['limit_mib_per_hour']:g}; after {rss['warm_up_s']:g} s; fit {rss['fit_mib']}, range "
        f"{rss['range_mib']} MiB; with merges up to {rss['max_mib']})",
        f"  threads, files    {found['threads_rise']:+d}, {found['files_rise']:+d}",
        f"  the server's end  exit code {found['exit_code']}; {found['integrity'] or 'no integrity check seen'}",
    ]
    if found["passed"]:
        lines.append("passed")
    else:
        lines += ["FAILED:", *(f"  {problem}" for problem in found["problems"])]
        lines.append(f"  the first of them in full: {out / 'failures.jsonl'}; the server's log: {out / 'server.log'}")
    return "\n".join(lines)


def write(soak: Soak, found: dict[str, Any], out: Path) -> None:
    """summary.json, failures.jsonl and vitals.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n")
    for name, rows in (("failures", soak.judge.failures), ("vitals", [asdict(one) for one in soak.samples])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))


def keep(found: dict[str, Any], results: Path, note: str) -> None:
    """Append a line to ``results``, as the benchmarks do."""
    here = machine()
    line = {
        "run": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "machine": f"{here['cores']} cores, {here['processor']}",
        **found,
    }
    with results.open("a") as file:
        file.write(json.dumps({**line, **({"note": note} if note else {})}) + "\n")
