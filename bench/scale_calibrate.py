"""What a replica's work costs on this machine, for the simulation of docs/scaling.md.

    python -P bench/scale_calibrate.py --workload build/workload         # about 2 minutes, otherwise idle

Measures the engine on the cases of bench/workload.py (medians of ``--repeats``), and what it takes to bring an adapter
to the device, from host memory and from the disk, while four streams of the base run, as copies and steps share the
machine. Fits scaling/costs.py's model to it, prints how far off the model is case by case, and appends a line to
bench/results/replica_costs.jsonl. Simulations take the last one.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine import Ours
from results_file import ResultsFile
from scaling.costs import Costs, Misses, fit
from workload import CASES, FIRST_TOKEN_CASES, N_ADAPTERS, Case

STREAMS = 4
PROMPT, OUTPUT = 32, 4
QUIET_S = 3.0


async def steps(workload: Path, repeats: int) -> dict[tuple[int, int, int, int], float]:
    """Seconds by case."""
    ours = Ours(workload)
    ours.start()
    found = {}
    for case in (*CASES, *FIRST_TOKEN_CASES):
        await ours.engine(case)  # adapters into their slots, memory touched
        found[dataclasses.astuple(case)] = statistics.median([await ours.engine(case) for _ in range(repeats)])
        print(f"{case}, {case.prompt_tokens} tokens in: {found[dataclasses.astuple(case)]:.3f} s", flush=True)
    return found


async def misses(workload: Path, costs: Costs) -> Misses:
    """Each adapter in turn to a server that holds two on the device and four in host memory, so that every use is a
    read and an upload, beside streams of the base; ``costs`` are those of steps."""
    from manylora.server.config import AdapterSpec, EngineConfig, ServeConfig
    from manylora.server.engine.request import AdapterUse, FinishEvent, Request, SamplingParams, TokenEvent
    from manylora.server.serving import build, load_adapters

    names = [f"a{i}" for i in range(N_ADAPTERS)]
    config = ServeConfig(
        model=str(workload / "model"),
        adapters=tuple(AdapterSpec(name, str(workload / "adapters" / name)) for name in names),
        served_model_name="base",
        engine=EngineConfig(
            max_context=1024, max_rows=32, prefix_cache=False, max_device_adapters=2, max_host_adapters=4
        ),
    )
    running = build(config, progress=False)
    load_adapters(running, config)
    running.engine.start()
    serial = itertools.count()
    tokens = 0

    async def ask(name: str | None, count: int) -> None:
        nonlocal tokens
        uses = () if name is None else (AdapterUse(running.registry.acquire(name)),)
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        number = next(serial)
        prompt = Case(1, 0).prompt(number)[:PROMPT]
        request = Request(f"calibrate-{number}", prompt, params, uses, arrival_time=time.monotonic())
        async for event in running.engine.submit(request):
            if isinstance(event, FinishEvent) and event.completion_tokens != count:
                raise RuntimeError(f"a request ended early: {event}")
            if isinstance(event, TokenEvent) and name is None:
                tokens += len(event.token_ids)

    async def stream() -> None:
        while True:
            await ask(None, 900)  # so long that prompts do not count

    streams = [asyncio.create_task(stream()) for _ in range(STREAMS)]
    try:
        await asyncio.sleep(1)
        began, before = time.perf_counter(), tokens
        await asyncio.sleep(QUIET_S)
        step_s = (time.perf_counter() - began) / (tokens - before) * STREAMS
        began, before = time.perf_counter(), tokens
        for name in names:
            await ask(name, OUTPUT)
        elapsed, steps_done = time.perf_counter() - began, (tokens - before) / STREAMS
        if any(task.done() for task in streams):
            raise RuntimeError("a stream that was watched has ended")
    finally:
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        uploads, host = running.slots.counters, running.host.stats()
        await running.close()
    under_way = uploads.upload_seconds + host.counters.read_seconds
    # What the streams' steps would have taken by themselves, and what the requests added to them.
    table = costs.base_table(STREAMS + 1)
    row_s = table[STREAMS + 1] - table[STREAMS] + costs.adapter_s
    expected = steps_done * step_s + len(names) * (PROMPT * costs.prompt_token_s + OUTPUT * row_s)
    return Misses(
        upload_s=uploads.upload_seconds / uploads.misses,
        read_s=host.counters.read_seconds / host.counters.reads,
        adapter_bytes=host.nbytes / host.copies,
        drag=max(0.0, (elapsed - expected) / under_way),
        uses=len(names),
        reads=host.counters.reads,
    )


async def measure(workload: Path, repeats: int, file: ResultsFile) -> None:
    seconds = await steps(workload, repeats)
    of_steps, _ = fit(seconds, Misses(0.0, 0.0, 0.0, 0.0, 0, 0))
    missed = await misses(workload, of_steps)
    costs, ratios = fit(seconds, missed)
    result: dict[str, Any] = {
        "model": "SmolLM2-135M, rank 16",
        "repeats": repeats,
        "seconds": {name_of(case): round(value, 4) for case, value in seconds.items()},
        "costs": dataclasses.asdict(costs),
        "fitted_over_measured": {name_of(case): ratio for case, ratio in ratios.items()},
        "misses": dataclasses.asdict(missed),
    }
    file.keep(result)
    print(costs)
    for name, ratio in result["fitted_over_measured"].items():
        print(f"{name}: fitted over measured seconds {ratio}")


def name_of(case: tuple[int, int, int, int]) -> str:
    rows, adapters, prompt, output = case
    return f"{rows}/{adapters} {prompt}+{output}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, required=True, help="folder with model/ and adapters/")
    parser.add_argument("--repeats", type=int, default=3, help="of each case (default 3)")
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    from manylora.server.http_server import new_loop

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(measure(options.workload, options.repeats, ResultsFile("replica_costs", note=options.note)))


if __name__ == "__main__":
    main()
