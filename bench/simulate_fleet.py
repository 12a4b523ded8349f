"""How many replicas and slots for so many adapters: one cluster, simulated with each policy (docs/scaling.md).

    python -P bench/simulate_fleet.py --adapters 500 --replicas 4 --rate 20
    python -P bench/simulate_fleet.py --adapters 2000 --replicas 8 --load 0.7 --zipf 0.8 --slots 64 --host 512
    python -P bench/simulate_fleet.py --trace build/loadtest/trace.jsonl --replicas 4 --costs mine.json

Costs are those of the last calibration (bench/scale_calibrate.py); ``--costs`` is a JSON object with other values for
some of its fields: base_s (pairs of rows and a step's seconds), prompt_token_s, adapter_s, upload_s, read_s,
adapter_bytes. Prints the hit rate that theory expects, and a line a policy; writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from scaling.cells import POLICIES, capacity, drawn
from scaling.costs import Costs, CostsError, last_measured
from scaling.replica import Sizes
from scaling.simulation import Cluster
from scaling.theory import Shares, lru_hit_rate, slots_for, zipf_shares
from scaling.traffic import BASE, Traffic

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "loadtest"))
from loadgen.errors import TraceError
from loadgen.traces import read_trace


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = Sizes()
    parser.add_argument("--adapters", type=int, default=1000, help="asked for, by Zipf's law (default 1000)")
    parser.add_argument("--zipf", type=float, default=1.0, metavar="S", help="its exponent (default 1)")
    parser.add_argument("--replicas", type=int, default=4, help="(default 4)")
    parser.add_argument(
        "--slots", type=int, default=sizes.slots, help="of a replica, on its device (default %(default)s)"
    )
    parser.add_argument("--host", type=int, default=sizes.host, help="in its host memory (default %(default)s)")
    parser.add_argument("--rows", type=int, default=sizes.rows, help="of its steps (default %(default)s)")
    parser.add_argument("--rate", type=float, help="requests a second, of all replicas together")
    parser.add_argument("--load", type=float, default=0.8, help="instead of a rate: a share of capacity (default 0.8)")
    parser.add_argument("--requests", type=int, help="to simulate (default 20000, or 400 a replica if that is more)")
    parser.add_argument("--policy", choices=POLICIES, action="append", help="only this one; repeatable")
    parser.add_argument("--costs", type=Path, help="JSON object with other costs than the measured ones")
    parser.add_argument("--trace", type=Path, help="JSON lines of the load test: its requests, times and lengths")
    parser.add_argument("--base", help="with --trace: the model that is no adapter")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if min(options.adapters, options.replicas) < 1 or options.load <= 0 or (options.rate or 1) <= 0:
        parser.error("adapters, replicas, load and rate must be positive")
    return options


def traffic_of(options: argparse.Namespace) -> tuple[Traffic, Shares]:
    """The requests, and each adapter's share of them."""
    if options.trace is None:
        count = options.requests or max(20_000, 400 * options.replicas)
        return drawn(options.adapters, options.zipf, count, options.seed), zipf_shares(options.adapters, options.zipf)
    traffic = Traffic.of_requests(read_trace(options.trace), (), options.base)
    counts = Counter(adapter for adapter in traffic.adapter if adapter != BASE)
    if not counts:
        raise TraceError(f"{options.trace}: no request asks for an adapter")
    asked = np.array([counts[i] for i in range(traffic.adapters)], dtype=np.float64)
    return traffic, asked / asked.sum()


def main() -> int:
    options = parse()
    try:
        sizes = Sizes(slots=options.slots, host=options.host, rows=options.rows, step_tokens=max(256, options.rows))
        costs, run = last_measured()
        if options.costs is not None:
            costs = Costs.of(json.loads(options.costs.read_text(encoding="utf-8")), costs)
        traffic, shares = traffic_of(options)
    except (CostsError, TraceError, OSError, ValueError) as error:
        print(f"bench/simulate_fleet.py: {error}", file=sys.stderr)
        return 2
    one = capacity(traffic, costs, sizes)
    if options.trace is None:
        rate = options.rate or options.load * options.replicas * one
        traffic = traffic.first(len(traffic), rate=rate)
    else:
        rate = len(traffic) / traffic.at_s[-1]
    apart = lru_hit_rate(shares, sizes.slots)
    together = lru_hit_rate(shares, sizes.slots * options.replicas)
    print(
        f"costs of {run}{'' if options.costs is None else f' with {options.costs}'}\n"
        f"{traffic.adapters} adapters, {options.replicas} replicas of {sizes.slots} slots and {sizes.host} in host "
        f"memory\n{rate:.3g} requests a second; a replica can answer {one:.3g} at most: "
        f"load {rate / one / options.replicas:.2f}\n"
        f"slot hit rate by theory: {apart:.1%} if replicas are asked whatever they hold, up to {together:.1%} by "
        "affinity\n"
        f"slots for 90 %: {slots_for(shares, 0.9)} of each replica, or by affinity of all together\n\n"
        f"{'':16}{'slot hits':>10}{'uploads':>9}{'reads':>8}{'MB/s':>8}"
        f"{'TTFT p50':>10}{'p95':>8}{'p99 ms':>8}{'imbalance':>11}"
    )
    for name in options.policy or POLICIES:
        cluster = Cluster(traffic, POLICIES[name], costs, sizes, options.replicas, seed=options.seed)
        cluster.fill(shares, seed=options.seed)
        cluster.run()
        found = cluster.outcome()
        times = found.ttft_ms
        late = "" if found.backlog <= sizes.rows else f"   does not keep up: {found.backlog:.0f} wait at the end"
        print(
            f"{name:16}{found.slot_hit_rate:>10.1%}{found.uploads_per_request:>9.3f}{found.reads_per_request:>8.3f}"
            f"{found.swap_mb_per_s:>8.1f}{times['p50']:>10.0f}{times['p95']:>8.0f}{times['p99']:>8.0f}"
            f"{found.imbalance:>11.2f}{late}",
            flush=True,
        )
    print("\nuploads, reads: of a request; MB/s: uploaded by a replica; imbalance: the busiest replica over the mean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
