"""Adapter-affine routing against random routing: fleets of replicas on one machine under the load test's zipf profile.

    python -P bench/scale_out.py                       # 2 and 4 replicas, three rounds of both ways; about 20 minutes
    python -P bench/scale_out.py --replicas 2 --rounds 1 --seconds 20

More adapters than one replica has room for, on its device and in its memory, so that a miss is a copy to the device and
mostly also a read from the disk. For each round both ways get a fleet of their own, started anew, and the same requests
(``loadtest/run.py --profile zipf``, an open loop with the round's seed); the ways take turns in being first.

What is kept of each: the share of admissions that found their adapter on the device, and in host memory, over all
replicas (``manylora_adapter_lookups_total``, between two looks at /metrics); and what the load test says of times to
the first token, from when a request was due. A measurement during which this process did not run for a second, because
the machine or somebody stopped it, is thrown away and made again. All replicas share this machine's cores: more of them
make nothing faster here, only the routing can. Prints a table and appends JSON lines to bench/results/scale_out.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from results_file import ResultsFile
from swaps import write_adapters

from manylora.server.cli import demo_base
from manylora.server.model.gguf import GgufModel

LOADTEST = Path(__file__).resolve().parents[1] / "loadtest" / "run.py"
WAYS = ("affinity", "random")
START_S, STOP_S = 300.0, 120.0
STOPPED_S, TRIES = 1.0, 5
FIGURES = {
    "ttft_p50_ms": ("ttft_ms", "p50"),
    "ttft_p95_ms": ("ttft_ms", "p95"),
    "ttft_p99_ms": ("ttft_ms", "p99"),
    "itl_p95_ms": ("itl_ms", "p95"),
    "request_p95_ms": ("request_ms", "p95"),
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def fleet(options: argparse.Namespace, adapters: Path, replicas: int, way: str, folder: Path) -> Iterator[str]:
    """The URL of a fleet that is ready; it is gone at the end."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "manylora.deploy.ray_serve", "--port", str(port), "--routing", way),
        *("--replicas", str(replicas), "--served-model-name", "base", "--adapter-dir", str(adapters)),
        *("--state-dir", str(folder / "state"), "--device", "cpu", "--threads", "1", "--prefix-cache", "off"),
        *("--max-rows", str(options.rows), "--max-device-adapters", str(options.slots)),
        *("--max-host-adapters", str(options.host), "--max-context", "512", "--kv-memory", "64MiB"),
        *("--log-level", "warning", "--no-playground"),
    ]
    log = folder / "fleet.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while f"serving fleet on {url} " not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the fleet did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def lookups(url: str) -> Counter[tuple[str, str, str]]:
    """``manylora_adapter_lookups_total`` by (replica, tier, result)."""
    found: Counter[tuple[str, str, str]] = Counter()
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
        for line in response.read().decode().splitlines():
            if line.startswith("manylora_adapter_lookups_total{"):
                labels, _, value = line.partition("{")[2].rpartition("} ")
                fields = dict(one.split("=", 1) for one in labels.replace('"', "").split(","))
                found[fields["replica"], fields["tier"], fields["result"]] += int(float(value))
    return found


def share(counts: Counter[tuple[str, str, str]], tier: str) -> float | None:
    hits = sum(n for (_, of, result), n in counts.items() if (of, result) == (tier, "hit"))
    looks = sum(n for (_, of, _), n in counts.items() if of == tier)
    return round(hits / looks, 3) if looks else None


def load(url: str, options: argparse.Namespace, seed: int, seconds: float, rate: float, out: Path) -> dict[str, Any]:
    """Run the load test; its summary."""
    command = [
        *(sys.executable, "-P", str(LOADTEST), "--host", url, "--profile", "zipf", "--rate", f"{rate:g}"),
        *("--seconds", f"{seconds:g}", "--seed", str(seed), "--prompt-tokens", "32", "--output-tokens", "16-48"),
        *("--grace", "60", "--out", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 180, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"the load test ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


class Watch(threading.Thread):
    """Looks at the clock ten times a second; ``longest``: seconds between two looks."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest = 0.0
        self._over = threading.Event()

    def run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.1):
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()


def measure(options: argparse.Namespace, adapters: Path, replicas: int, way: str, number: int) -> dict[str, Any] | None:
    """What one fleet did; None if it was stopped meanwhile."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-out-")))
        url = stack.enter_context(fleet(options, adapters, replicas, way, folder))
        watch = stack.enter_context(Watch())
        load(url, options, 1000 + number, options.warm_up, options.rate, folder / "warm-up")
        before = lookups(url)
        summary = load(url, options, number, options.seconds, options.rate, folder / "out")
        counts = lookups(url)
        counts.subtract(before)
        if watch.longest > STOPPED_S:
            print(f"  stopped for {watch.longest:.1f} s: thrown away", file=sys.stderr)
            return None
    device = Counter[str]()
    for (replica, tier, _), n in counts.items():
        device[replica] += n if tier == "device" else 0
    return {
        "replicas": replicas,
        "routing": way,
        "round": number,
        "device_hit_rate": share(counts, "device"),
        "host_hit_rate": share(counts, "host"),
        "admissions_by_replica": sorted(device.values(), reverse=True),
        "requests": summary["total"]["requests"]["due"],
        "failed": summary["total"]["requests"]["failed"],
        **{name: round(summary["total"][of][at], 1) for name, (of, at) in FIGURES.items()},
        "tokens_per_s": summary["total"]["tokens_per_s"],
        "generator_bottleneck": summary["generator"]["bottleneck"],
    }


def report(results: list[dict[str, Any]]) -> None:
    def middle(values: list[float]) -> str:
        return f"{statistics.median(values):g} ({min(values):g}-{max(values):g})"

    print(f"\nmedian of the rounds (min-max)\n{'':34}{WAYS[0]:>28}{WAYS[1]:>28}{'affinity/random':>22}")
    for replicas in dict.fromkeys(one["replicas"] for one in results):
        print(f"{replicas} replicas")
        for name in ("device_hit_rate", "host_hit_rate", *FIGURES, "tokens_per_s", "failed"):
            by_way = {
                way: {
                    one["round"]: one[name]
                    for one in results
                    if (one["replicas"], one["routing"]) == (replicas, way) and one[name] is not None
                }
                for way in WAYS
            }
            both = [number for number in by_way[WAYS[0]] if by_way[WAYS[1]].get(number)]
            ratios = [by_way[WAYS[0]][number] / by_way[WAYS[1]][number] for number in both]
            cells = [middle(list(by_way[way].values())) if by_way[way] else "-" for way in WAYS]
            print(
                f"  {name:32}{cells[0]:>28}{cells[1]:>28}{middle([round(r, 2) for r in ratios]) if ratios else '-':>22}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=0, help="its number is its seed, and says who is first")
    parser.add_argument("--seconds", type=float, default=40, help="of one measurement (default 40)")
    parser.add_argument("--warm-up", type=float, default=10, help="seconds before it, with other requests (default 10)")
    parser.add_argument("--rate", type=float, default=3, help="requests a second (default 3)")
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--slots", type=int, default=4, help="of each replica's device (default 4)")
    parser.add_argument("--host", type=int, default=6, help="adapters in each replica's memory (default 6)")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by the fleets' own ends
    base = demo_base()
    if base is None:
        parser.error("the demo base is not installed")
    settings = ("rate", "seconds", "adapters", "rank", "slots", "host", "rows")
    file = ResultsFile("scale_out", note=options.note, **{name: getattr(options, name) for name in settings})
    results = []
    with tempfile.TemporaryDirectory(prefix="scale-out-adapters-") as folder:
        write_adapters(Path(folder), GgufModel(Path(base)).spec, options.adapters, options.rank)
        for replicas in options.replicas:
            for number in range(options.first_round, options.first_round + options.rounds):
                for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                    print(f"{replicas} replicas, round {number}: {way} ...", file=sys.stderr)
                    for _ in range(TRIES):
                        one = measure(options, Path(folder), replicas, way, number)
                        if one is not None:
                            file.keep(one)
                            results.append(one)
                            break
    report(results)


if __name__ == "__main__":
    main()
