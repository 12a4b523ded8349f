"""This project on the workload of bench/workload.py: the engine alone, and through HTTP.

    python -P bench/engine.py --workload build/workload                 # the engine alone
    python -P bench/engine.py --workload build/workload --http          # and through HTTP, at 32 streams

Prints a line per case, and appends it to bench/results/engine.jsonl. DIR holds model/ and adapters/a0 .. a31 (made by
bench/make_workload.py). Beside vLLM, PEFT and llama.cpp: bench/compare.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.kernels.cpu import Arithmetic
    from manylora.server.config import CpuKernels, LoraDtype
    from manylora.server.engine.stream import RequestStream

sys.path.insert(0, str(Path(__file__).parent))
import http_client
from results_file import ResultsFile
from workload import CASES, N_ADAPTERS, Case

OURS = "manylora"


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

    def __init__(
        self,
        workload: Path,
        *,
        cpu_kernels: CpuKernels = "auto",
        cpu_arithmetic: Arithmetic = "int16",
        lora_dtype: LoraDtype = "auto",
    ) -> None:
        from manylora.server.collector import set_aside
        from manylora.server.config import AdapterSpec, EngineConfig, ServeConfig
        from manylora.server.serving import build, load_adapters

        adapters = tuple(AdapterSpec(f"a{i}", str(workload / "adapters" / f"a{i}")) for i in range(N_ADAPTERS))
        config = ServeConfig(
            model=str(workload / "model"),
            adapters=adapters,
            served_model_name="base",
            engine=EngineConfig(
                max_context=1024,
                max_rows=32,
                prefix_cache=False,
                cpu_kernels=cpu_kernels,
                cpu_arithmetic=cpu_arithmetic,
                lora_dtype=lora_dtype,
            ),
        )
        self._config = config
        self._running = build(config, progress=False)
        load_adapters(self._running, config)
        set_aside()
        self._serial = 0

    def start(self) -> None:
        self._running.engine.start()

    async def measure(
        self, cases: Sequence[Case], repeats: int, keep: Callable[[dict[str, Any]], None], *, http: bool
    ) -> None:
        """A result per case, medians of the repeats; with ``http`` a second one for those of 32 rows.

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
                keep(line(OURS, case, statistics.median(pair[0] for pair in pairs)))
                if with_http:
                    result = line(f"{OURS} http", case, statistics.median(pair[1] for pair in pairs))
                    shares = [round(engine / through_http, 3) for engine, through_http in pairs]
                    keep({**result, "share": round(statistics.median(shares), 3), "shares": shares})
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, required=True, help="folder with model/ and adapters/")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes over a case (default 3)")
    parser.add_argument("--cases", nargs="+", metavar="ROWS/ADAPTERS", help="only these, e.g. 1/0 32/8")
    parser.add_argument("--http", action="store_true", help="also measure through HTTP, at 32 streams")
    parser.add_argument("--cpu-arithmetic", choices=("int16", "int8", "fp32"), default="int16", help="as of serve")
    parser.add_argument("--note", default="", help="kept with the results: what was special about this run")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    from manylora.server.http_server import new_loop

    by_name = {str(case): case for case in CASES}
    if unknown := set(options.cases or ()) - set(by_name):
        parser.error(f"--cases: {', '.join(sorted(unknown))}: not among {', '.join(by_name)}")
    cases = [by_name[name] for name in options.cases or by_name]
    file = ResultsFile("engine", note=options.note, arithmetic=options.cpu_arithmetic)

    def keep(result: dict[str, Any]) -> None:
        print(json.dumps(result), flush=True)
        file.keep(result)

    ours = Ours(options.workload, cpu_arithmetic=options.cpu_arithmetic)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ours.measure(cases, options.repeats, keep, http=options.http))


if __name__ == "__main__":
    main()
