"""The simulation of bench/scaling/ held against the real server: one replica, the same trace, figure by figure.

    python -P bench/scale_check.py --workload build/workload             # about 8 minutes

Starts ``manylora serve`` with few slots and little host memory for the adapters of DIR/adapters (made by
bench/make_workload.py), replays a trace of the load test's zipf profile at each of ``--rates``; does so again with an
engine in this process, without HTTP and without a load generator that takes its share of the machine; and simulates the
same trace with the last costs of bench/results/replica_costs.jsonl (bench/scale_calibrate.py), none of which is fitted
to these runs. Prints all three, and appends a line a rate to bench/results/scale_check.jsonl. ``--again`` only
simulates, with the costs of a later calibration, what was measured last.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "loadtest"))

from loadgen.fresh_server import fresh_server
from loadgen.profiles import PROFILES, requests_of
from loadgen.traces import TracedRequest, write_trace
from results_file import ResultsFile
from scaling import routing
from scaling.costs import Costs, last_measured
from scaling.replica import Sizes
from scaling.simulation import WARMUP, Cluster
from scaling.theory import percentiles
from scaling.traffic import Traffic
from workload import N_ADAPTERS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "scale_check.jsonl"
BASE = "base"
NAMES = [f"a{i}" for i in range(N_ADAPTERS)]
Figures = dict[str, float]


def counters(url: str) -> Figures:
    """Of /metrics: uses of the tiers, and reads of the disk with their seconds."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels in {
        "slot_hits": r"manylora_adapter_lookups_total\{(?=[^}]*device)(?=[^}]*\"hit\")[^}]*\}",
        "slot_misses": r"manylora_adapter_lookups_total\{(?=[^}]*device)(?=[^}]*\"miss\")[^}]*\}",
        "reads": r"manylora_host_read_seconds_count",
        "read_seconds": r"manylora_host_read_seconds_sum",
    }.items():
        value = re.search(rf"^{labels} (\S+)$", text, re.MULTILINE)
        found[name] = float(value[1]) if value else 0.0
    return found


def replay(url: str, trace: list[TracedRequest], folder: Path) -> Figures:
    """The real server's figures."""
    path, out = folder / "trace.jsonl", folder / "out"
    write_trace(path, trace)
    before = counters(url)
    run = [sys.executable, "-P", str(ROOT / "loadtest" / "run.py")]
    run += ["--host", url, "--trace", str(path), "--out", str(out)]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    used = {name: value - before[name] for name, value in counters(url).items()}
    lines = [json.loads(text) for text in (out / "requests.jsonl").read_text().splitlines()]
    if failed := [line for line in lines if line.get("failure")]:
        raise RuntimeError(f"{len(failed)} requests failed, one of them: {failed[0]}")
    lines.sort(key=lambda line: line["scheduled_s"])
    counted = lines[int(WARMUP * len(lines)) :]
    return figures(
        used["slot_hits"], used["slot_misses"], used["reads"],
        [line["events_s"][0] - line["scheduled_s"] for line in counted],
        [line["end_s"] - line["scheduled_s"] for line in counted],
    ) | {
        "read_ms": round(used["read_seconds"] / max(used["reads"], 1) * 1e3, 1),
        "generator_cpu_share": json.loads((out / "summary.json").read_text())["generator"]["cpu_share"],
    }  # fmt: skip


async def replay_in_process(trace: list[TracedRequest], workload: Path, names: list[str], sizes: Sizes) -> Figures:
    """The engine's figures alone."""
    from manylora.server.config import AdapterSpec, EngineConfig, ServeConfig
    from manylora.server.engine.request import AdapterUse, FinishEvent, Request, SamplingParams, TokenEvent
    from manylora.server.serving import build, load_adapters

    config = ServeConfig(
        model=str(workload / "model"),
        adapters=tuple(AdapterSpec(name, str(workload / "adapters" / name)) for name in sorted(names)),
        served_model_name=BASE,
        engine=EngineConfig(
            max_context=1024, prefix_cache=False, max_device_adapters=sizes.slots, max_host_adapters=sizes.host
        ),
    )
    running = build(config, progress=False)
    load_adapters(running, config)
    running.engine.start()
    began = time.monotonic() + 0.5

    async def ask(number: int, traced: TracedRequest) -> tuple[float, float]:
        """Seconds from when it was due to the first token and to the end."""
        due = began + traced.at_s
        await asyncio.sleep(due - time.monotonic())
        params = SamplingParams(max_tokens=traced.max_tokens, temperature=0.0, ignore_eos=True)
        prompt = [1000 + (7 * number + i) % 3000 for i in range(traced.prompt_tokens)]
        uses = (AdapterUse(running.registry.acquire(traced.model)),)
        first = 0.0
        request = Request(f"check-{number}", prompt, params, uses, arrival_time=time.monotonic())
        async for event in running.engine.submit(request):
            if isinstance(event, TokenEvent):
                first = first or time.monotonic() - due
            elif isinstance(event, FinishEvent) and event.reason != "length":
                raise RuntimeError(f"a request ended otherwise: {event}")
        return first, time.monotonic() - due

    try:
        times = await asyncio.gather(*(ask(i, traced) for i, traced in enumerate(trace)))
        stats, reads = running.engine.stats(), running.host.stats().counters.reads
    finally:
        await running.close()
    counted = times[int(WARMUP * len(times)) :]
    return figures(stats.slot_hits, stats.slot_misses, reads, [one[0] for one in counted], [one[1] for one in counted])


def figures(hits: float, misses: float, reads: float, ttft_s: list[float], request_s: list[float]) -> Figures:
    found = {"requests": hits + misses, "slot_hit_rate": round(hits / (hits + misses), 3), "reads": reads}
    for name, seconds in (("ttft", ttft_s), ("request", request_s)):
        for percent, value in zip((50, 95), percentiles(seconds, (50, 95)), strict=True):
            found[f"{name}_p{percent}_ms"] = round(value * 1e3, 1)
    return found


def simulated(trace: list[TracedRequest], names: list[str], in_host: list[str], sizes: Sizes, costs: Costs) -> Figures:
    traffic = Traffic.of_requests(trace, names, BASE)
    cluster = Cluster(traffic, routing.at_random, costs, sizes, 1)
    cluster.hold_in_host(names.index(name) for name in in_host)
    cluster.run()
    counts, answers = cluster.replicas[0].counts, cluster.answers
    counted = range(int(WARMUP * len(traffic)), len(traffic))
    return figures(
        counts.slot_hits, counts.slot_misses, counts.reads,
        [answers.first_token_s[i] - traffic.at_s[i] for i in counted],
        [answers.end_s[i] - traffic.at_s[i] for i in counted],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, help="folder with model/ and adapters/")
    parser.add_argument("--again", action="store_true", help="simulate the last measurement again")
    parser.add_argument("--slots", type=int, default=8, help="on the device (default 8)")
    parser.add_argument("--host", type=int, default=16, help="adapters in host memory (default 16)")
    parser.add_argument("--rates", type=float, nargs="+", default=[4, 8], help="requests a second (default 4 8)")
    parser.add_argument("--seconds", type=float, default=100, help="of each rate (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    from manylora.server.http_server import new_loop

    if options.again:
        again()
        return
    if options.workload is None:
        parser.error("--workload: missing")
    shape = {"adapters": N_ADAPTERS, "slots": options.slots, "host": options.host}
    costs, calibration = last_measured()
    file = ResultsFile("scale_check", note=options.note, **shape)
    flags = [
        "--model", str(options.workload / "model"), "--served-model-name", BASE, "--prefix-cache", "off",
        "--adapter-dir", str(options.workload / "adapters"), "--max-context", "1024",
        "--max-device-adapters", str(options.slots), "--max-host-adapters", str(options.host),
    ]  # fmt: skip
    for rate in options.rates:
        run = {**shape, "rate": rate, "seconds": options.seconds, "seed": options.seed}
        trace = trace_of(run)
        # A server for each rate, so that both begin with empty slots and what was registered last in host memory.
        with (
            tempfile.TemporaryDirectory(prefix="scale-check-") as kept,
            fresh_server(flags, Path(kept) / "server.log") as url,
        ):
            server = replay(url, trace, Path(kept))
        with asyncio.Runner(loop_factory=new_loop) as runner:
            engine = runner.run(replay_in_process(trace, options.workload, NAMES, Sizes(options.slots, options.host)))
        finish(file, {**run, "costs": calibration, "server": server, "engine": engine}, costs)


def again() -> None:
    """The last measurement's lines, simulated anew."""
    lines = [json.loads(text) for text in RESULTS.read_text(encoding="utf-8").splitlines()]
    measured = lines[-1].get("measured", lines[-1]["run"])
    costs, calibration = last_measured()
    file = ResultsFile("scale_check", measured=measured)
    for line in [line for line in lines if line["run"] == measured]:
        kept = {name: value for name, value in line.items() if name not in ("run", "machine", "note", "simulated")}
        finish(file, {**kept, "costs": calibration}, costs)


def trace_of(run: dict[str, Any]) -> list[TracedRequest]:
    profile = dataclasses.replace(
        PROFILES["zipf"], rate=run["rate"], seconds=run["seconds"], chat_share=0.0, seed=run["seed"]
    )
    return list(requests_of(profile, NAMES[: run["adapters"]], BASE))


def finish(file: ResultsFile, run: dict[str, Any], costs: Costs) -> None:
    """Simulate what was measured, keep it and print it."""
    sizes = Sizes(slots=run["slots"], host=run["host"])
    model = simulated(trace_of(run), NAMES, sorted(NAMES), sizes, costs)
    file.keep({**run, "simulated": model})
    show(run["rate"], run["server"], run["engine"], model)


def show(rate: float, real: Figures, engine: Figures, model: Figures) -> None:
    """Ratios are simulated over measured."""
    print(f"\n{f'{rate:g} requests a second':24}{'server':>10}{'engine':>10}{'simulated':>11}{'ratios':>13}")
    for name, value in real.items():
        if name not in model:
            print(f"{name:24}{value:>10g}")
            continue
        ratios = "".join(f"{model[name] / measured:7.2f}" for measured in (value, engine[name]) if measured)
        print(f"{name:24}{value:>10g}{engine[name]:>10g}{model[name]:>11g}{ratios}", flush=True)


if __name__ == "__main__":
    main()
