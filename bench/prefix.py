"""What a cached prefix saves: the time to the first token of a prompt whose beginning was computed before.

    python -P bench/prefix.py                      # the demo base and one demo adapter, 1 minute
    python -P bench/prefix.py --shared 480 --own 32 --pairs 15

A pair is two requests, one after the other on an idle engine, whose prompts begin with the same ``shared`` random
tokens and end with ``own`` of their own: the first finds nothing, the second its beginning. Reported is the ratio of
each pair's times from submission to the first token. Only full pages (16 tokens) are found. Appends a JSON line for the
base and one for an adapter to bench/results/prefix.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import sys
import time
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parent))
from results_file import ResultsFile

from manylora.kernels.cpu import Arithmetic
from manylora.server.cli import demo_base
from manylora.server.config import AdapterSpec, EngineConfig, ServeConfig
from manylora.server.engine.request import AdapterUse, Request, SamplingParams
from manylora.server.http_server import new_loop
from manylora.server.serving import Running, build, load_adapters

ADAPTER = Path(__file__).parents[1] / "examples" / "adapters" / "sql"


async def first_token(running: Running, prompt: list[int], adapter: str | None, serial: int) -> tuple[float, int]:
    """Seconds until it came, and how many of the prompt's tokens were cached."""
    refs = [] if adapter is None else [running.registry.acquire(adapter)]
    request = Request(
        f"prefix-{serial}", prompt, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        tuple(AdapterUse(ref) for ref in refs), arrival_time=time.monotonic(),
    )  # fmt: skip
    began = time.perf_counter()
    _, finish = await running.engine.submit(request).result()
    if finish.completion_tokens != 1:
        raise RuntimeError(f"a request ended early: {finish}")
    return time.perf_counter() - began, finish.cached_tokens


async def measure(running: Running, options: argparse.Namespace, results: ResultsFile) -> None:
    running.engine.start()
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1000, 40_000) for _ in range(count)]

    for adapter in (None, "sql"):
        found: list[tuple[float, float]] = []
        for pair in range(-2, options.pairs):  # two to warm up
            shared = tokens(options.shared)
            (cold, none), (warm, cached) = [
                await first_token(running, shared + tokens(options.own), adapter, 2 * pair + i) for i in (0, 1)
            ]
            if none or cached != options.shared // 16 * 16:
                raise RuntimeError(f"{none} and {cached} tokens were cached")
            if pair >= 0:
                found.append((cold, warm))
        ratios = [cold / warm for cold, warm in found]
        result = {
            "adapter": adapter, "shared": options.shared, "own": options.own, "pairs": options.pairs,
            "cold_ms": round(statistics.median(cold for cold, _ in found) * 1e3, 1),
            "cached_ms": round(statistics.median(warm for _, warm in found) * 1e3, 1),
            "ratio": round(statistics.median(ratios), 2), "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
        }  # fmt: skip
        results.keep(result)
        print(
            f"{adapter or 'base'}: first token of {options.shared} + {options.own} tokens {result['cold_ms']} ms, "
            f"with the {options.shared} cached {result['cached_ms']} ms: {result['ratio']} times as fast "
            f"({min(ratios):.2f}-{max(ratios):.2f})",
            flush=True,
        )
    await running.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=int, default=480, help="tokens at the beginning of both (default 480)")
    parser.add_argument("--own", type=int, default=32, help="tokens behind them (default 32)")
    parser.add_argument("--pairs", type=int, default=15, help="(default 15)")
    parser.add_argument("--cpu-arithmetic", choices=get_args(Arithmetic), default="int16", help="as of serve")
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args()
    model = demo_base()
    if model is None:
        parser.error("the demo base is not installed")
    logging.basicConfig(level=logging.ERROR)
    config = ServeConfig(
        model=model, adapters=(AdapterSpec("sql", str(ADAPTER)),), served_model_name="base",
        engine=EngineConfig(max_context=2048, prefix_cache=True, cpu_arithmetic=options.cpu_arithmetic),
    )  # fmt: skip
    running = build(config, progress=False)
    load_adapters(running, config)
    results = ResultsFile("prefix", note=options.note, model=Path(model).name, arithmetic=options.cpu_arithmetic)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(measure(running, options, results))


if __name__ == "__main__":
    main()
