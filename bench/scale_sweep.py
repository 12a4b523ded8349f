"""Every cell of docs/scaling.md: simulated, written down, and printed.

    python -P bench/scale_sweep.py                     # a few minutes; --jobs says on how many cores

Adapters 100, 1,000 and 10,000 by Zipf's law with exponent 1 and 0.7, on 1 to 100 replicas, at half and at four fifths
of what they can answer, by each policy; then what changes where swaps take nothing from steps, with the policy's
settings, with slower disks and with other numbers of slots; and how much each can do. One line is appended to
bench/results/scaling.jsonl; bench/scale_plots.py draws it. Costs are those of the last calibration
(bench/scale_calibrate.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from results_file import ResultsFile
from scaling.cells import POLICIES, VARIANTS, Cell
from scaling.costs import Costs, last_measured
from scaling.replica import Sizes
from scaling.simulation import Outcome
from scaling.theory import lru_hit_rate, zipf_shares

ADAPTERS = (100, 1000, 10_000)
REPLICAS = (1, 2, 4, 10, 30, 100)
EXPONENTS = (1.0, 0.7)
LOADS = (0.5, 0.8)
LIMIT_MS = 500.0
"""Of the table of limits: the 95th percentile of first tokens."""
COLUMNS = (
    "adapters", "zipf", "load", "replicas", "policy", "slots", "host", "read_s",
    "slot_hit_rate", "uploads_per_request", "reads_per_request", "swap_mb_per_s",
    "ttft_p50_ms", "ttft_p95_ms", "ttft_p99_ms", "request_p95_ms", "busy", "imbalance", "backlog",
)  # fmt: skip
Job = tuple[str, Cell, Costs]
"""The table that it is for, the cell, and its costs."""


def requests(replicas: int) -> int:
    """At least 400 a replica: tiers are filled before, and a fifth is not counted."""
    return max(20_000, 400 * replicas)


def jobs(costs: Costs) -> Iterator[Job]:
    for replicas in REPLICAS:
        for adapters in ADAPTERS:
            for zipf in EXPONENTS:
                for load in LOADS:
                    # With one replica there is nothing to choose: every policy is the same.
                    for policy in POLICIES if replicas > 1 else ("random",):
                        yield "cells", Cell(adapters, replicas, policy, zipf, load, requests=requests(replicas)), costs
    for policy in POLICIES:
        for adapters, replicas in ((100, 10), (1000, 4), (1000, 10), (10_000, 30)):
            # Where adapters are copied by the device itself, and read by cores that have nothing else to do.
            yield "no drag", Cell(adapters, replicas, policy), dataclasses.replace(costs, drag=0.0)
        for adapters, replicas in ((100, 4), (1000, 4), (1000, 10), (10_000, 30)):
            yield "limits", Cell(adapters, replicas, policy), costs
    for policy in ("affinity", *VARIANTS):
        for adapters, replicas, load in ((1000, 10, 0.3), (1000, 10, 0.5), (1000, 10, 0.65), (10_000, 30, 0.5)):
            yield "settings", Cell(adapters, replicas, policy, load=load), costs
    for policy in ("random", "round robin", "affinity"):
        for read_s in (costs.read_s, 0.5, 2.0):
            for host in (128, 512):
                cell = Cell(1000, 4, policy, load=0.5, sizes=Sizes(host=host))
                # Waiting for a slow disk is not work: without drag.
                yield "disks", cell, dataclasses.replace(costs, read_s=read_s, drag=0.0)
        for slots in (8, 16, 32, 64, 128):
            # Rows do not depend on slots, but the load does: a step of few slots has few adapters. So the rate is that
            # of the others.
            cell = Cell(1000, 4, policy, sizes=Sizes(slots=slots, host=max(128, slots)))
            load = Cell(1000, 4, policy, load=0.5).rate(costs) / dataclasses.replace(cell, load=1.0).rate(costs)
            yield "slots", dataclasses.replace(cell, load=load), costs


def simulate(job: Job) -> tuple[str, list[Any]]:
    table, cell, costs = job
    if table == "limits":
        cell = most(cell, costs)
    return table, row(cell, costs, cell.run(costs))


def most(cell: Cell, costs: Costs) -> Cell:
    """The cell at the largest load, in steps of 0.05 up to 1.5, at which the first token's p95 is within ``LIMIT_MS``;
    at the least if there is none. More load is taken to mean later first tokens."""
    low, high = 1, 31
    while high - low > 1:
        middle = (low + high) // 2
        if dataclasses.replace(cell, load=middle / 20).run(costs).ttft_ms["p95"] <= LIMIT_MS:
            low = middle
        else:
            high = middle
    return dataclasses.replace(cell, load=low / 20)


def row(cell: Cell, costs: Costs, outcome: Outcome) -> list[Any]:
    ttft = outcome.ttft_ms
    return [
        cell.adapters, cell.zipf, round(cell.load, 3), cell.replicas, cell.policy, cell.sizes.slots, cell.sizes.host,
        costs.read_s, round(outcome.slot_hit_rate, 4), round(outcome.uploads_per_request, 4),
        round(outcome.reads_per_request, 4), round(outcome.swap_mb_per_s, 2), round(ttft["p50"], 1),
        round(ttft["p95"], 1), round(ttft["p99"], 1), round(outcome.request_ms["p95"], 1), round(outcome.busy, 3),
        round(outcome.imbalance, 3), round(outcome.backlog, 2),
    ]  # fmt: skip


def beside_theory(rows: Sequence[Sequence[Any]]) -> dict[str, float]:
    """The largest distance of a simulated slot hit rate from Che's approximation, of the cells that keep up: of one
    replica's slots for policies that do not look at adapters, of all replicas' together for affinity and hashing (an
    upper bound, which a policy that copies popular adapters stays below)."""
    found: dict[str, float] = {}
    for one in rows:
        cell = dict(zip(COLUMNS, one, strict=True))
        if cell["backlog"] > Sizes().rows:
            continue  # it does not keep up, and requests that wait share uploads
        shares = zipf_shares(cell["adapters"], cell["zipf"])
        together = cell["replicas"] if cell["policy"] in ("affinity", "bounded hashing") else 1
        distance = cell["slot_hit_rate"] - lru_hit_rate(shares, cell["slots"] * together)
        name = cell["policy"]
        if abs(distance) > abs(found.get(name, 0.0)):
            found[name] = round(distance, 4)
    return found


def show(rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> None:
    indices = [COLUMNS.index(name) for name in columns]
    print("  ".join(f"{name:>16}" for name in columns))
    for one in rows:
        print("  ".join(f"{one[i]:>16}" for i in indices))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")
    parser.add_argument("--only", metavar="TABLE", nargs="+", help="of cells, no drag, limits, settings, disks, slots")
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args()
    costs, calibration = last_measured()
    began = time.perf_counter()
    tables: dict[str, list[list[Any]]] = {}
    todo = [job for job in jobs(costs) if options.only is None or job[0] in options.only]
    if not todo:
        parser.error(f"--only: no table is called {' or '.join(options.only)}")
    with ProcessPoolExecutor(options.jobs) as pool:
        for table, one in tqdm(pool.map(simulate, todo), total=len(todo), unit="cell"):
            tables.setdefault(table, []).append(one)
    theory = beside_theory(tables.get("cells", ()))
    for name, rows in tables.items():
        print(f"\n{name}")
        show(rows, [column for column in COLUMNS if column not in ("request_p95_ms", "busy", "backlog")])
    print("\nlargest distance of a slot hit rate from Che's approximation:", theory)
    file = ResultsFile("scaling", note=options.note, calibration=calibration, costs=dataclasses.asdict(costs))
    took = round(time.perf_counter() - began, 1)
    file.keep({"took_s": took, "jobs": options.jobs, "beside_theory": theory, "columns": COLUMNS, **tables})


if __name__ == "__main__":
    main()
