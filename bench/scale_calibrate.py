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
from scaling.costs import Misses, fit
from workload import CASES, FIRST_TOKEN_CASES, N_ADAPTERS, Case

STREAMS = 4


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


async def misses(workload: Path, rounds: int) -> Misses:
    """Each adapter in turn, ``rounds`` times, to a server that holds two on the device and four in host memory: every
    use is a read and an upload."""
    from manylora.server.config import AdapterSpec, EngineConfig, ServeConfig
    from manylora.server.engine.request import AdapterUse, Request, SamplingParams
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

    async def ask(name: str | None, tokens: int) -> None:
        uses = () if name is None else (AdapterUse(running.registry.acquire(name)),)
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        number = next(serial)
        prompt = Case(1, 0).prompt(number)[:32]
        request = Request(f"calibrate-{number}", prompt, params, uses, arrival_time=time.monotonic())
        _, finish = await running.engine.submit(request).result()
        if finish.completion_tokens != tokens:
            raise RuntimeError(f"a request ended early: {finish}")

    async def stream(until: asyncio.Event) -> None:
        while not until.is_set():
            await ask(None, 64)

    is_over = asyncio.Event()
    streams = [asyncio.create_task(stream(is_over)) for _ in range(STREAMS)]
    try:
        for name in names * rounds:
            await ask(name, 4)
        uploads, reads = running.slots.counters, running.host.stats().counters
        sizes = running.host.stats()
        return Misses(
            upload_s=uploads.upload_seconds / uploads.misses,
            read_s=reads.read_seconds / reads.reads,
            adapter_bytes=sizes.nbytes / sizes.copies,
            uses=N_ADAPTERS * rounds,
            reads=reads.reads,
        )
    finally:
        is_over.set()
        await asyncio.gather(*streams)
        await running.close()


async def measure(workload: Path, repeats: int, file: ResultsFile) -> None:
    seconds = await steps(workload, repeats)
    missed = await misses(workload, 2)
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
