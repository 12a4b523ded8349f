"""What merging an adapter costs and saves: tokens per second of its requests, as a share of the bare base's.

    python -P bench/merged.py --workload build/workload         # about 12 minutes

For 1, 8 and 32 rows of one adapter (rank 16, all seven projections): unmerged, merged compact (NF4) and merged exact
(bf16), each in pairs with the base's own rows, back to back and in turn (base, adapter, adapter, base, ...) in one
process. The share of each pair is what is reported: the machine may drift between pairs, hardly within one. Then mixed
steps: half the rows on the merged adapter, half on the base, against all of them on the base. Appends JSON lines to
bench/results/merged.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from results_file import ResultsFile
from workload import OUTPUT_TOKENS, PROMPT_TOKENS

from manylora.server.config import AdapterSpec, EngineConfig, ServeConfig
from manylora.server.engine.request import AdapterUse, Request, SamplingParams
from manylora.server.http_server import new_loop
from manylora.server.serving import Running, build, load_adapters

MODES = ("unmerged", "compact", "exact")
ROWS = (1, 8, 32)
NAME = "a0"


class Bench:
    def __init__(self, running: Running) -> None:
        self._running = running
        self._serial = itertools.count()

    async def seconds(self, names: Sequence[str | None]) -> float:
        """Of generating with a row for each name at once; None is the base."""
        params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        streams = []
        for row, name in enumerate(names):
            ref = None if name is None else self._running.registry.acquire(name)
            request = Request(
                f"merged-{next(self._serial)}",
                [1000 + row + j for j in range(PROMPT_TOKENS)],
                params,
                adapters=() if ref is None else (AdapterUse(ref),),
                merged=None if ref is None else self._running.merges.bind(ref),
                arrival_time=time.monotonic(),
            )
            streams.append(self._running.engine.submit(request))
        for _, finish in await asyncio.gather(*(stream.result() for stream in streams)):
            if finish.completion_tokens != OUTPUT_TOKENS:
                raise RuntimeError(f"a request ended early: {finish}")
        return time.perf_counter() - began

    async def shares(self, names: Sequence[str | None], pairs: int) -> list[tuple[float, float]]:
        """(seconds of the base, seconds of ``names``) of each pair, alternating who goes first."""
        base: list[None] = [None] * len(names)
        await self.seconds(names)  # adapters into their slots, memory touched
        found = []
        for pair in range(pairs):
            first, second = (base, names) if pair % 2 == 0 else (names, base)
            a, b = await self.seconds(first), await self.seconds(second)
            found.append((a, b) if pair % 2 == 0 else (b, a))
        return found


async def measure(
    options: argparse.Namespace, running: Running, keep: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    bench, results = Bench(running), []
    running.engine.start()
    try:
        for mode in options.modes:
            made: dict[str, Any] = {}
            if mode != "unmerged":
                info = await asyncio.to_thread(running.merges.merge, NAME, mode)
                made = {
                    "mib": info.nbytes >> 20,
                    "drift_max": round(info.measured.drift.max, 4),
                    "drift_mean": round(info.measured.drift.mean, 4),
                    "effect_mean": round(info.measured.effect.mean, 4),
                }
            for rows in options.rows:
                cases = {"adapter": [NAME] * rows}
                if mode != "unmerged" and rows > 1:
                    cases["mixed"] = [NAME if row % 2 else None for row in range(rows)]
                for case, names in cases.items():
                    pairs = await bench.shares(names, options.pairs)
                    shares = [round(base / other, 3) for base, other in pairs]
                    tokens = rows * OUTPUT_TOKENS
                    results.append(
                        {
                            "mode": mode, "case": case, "rows": rows,
                            "base_tokens_per_s": round(tokens / statistics.median(base for base, _ in pairs), 1),
                            "tokens_per_s": round(tokens / statistics.median(other for _, other in pairs), 1),
                            "share": round(statistics.median(shares), 3), "shares": shares, **made,
                        }
                    )  # fmt: skip
                    print(json.dumps(results[-1]), flush=True)
                    keep(results[-1])
            if mode != "unmerged":
                running.merges.unmerge()
    finally:
        await running.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, required=True, help="folder with model/ and adapters/a0")
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs of each case (default 7)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="(default: all)")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="at once (default 1 8 32)")
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    config = ServeConfig(
        model=str(options.workload / "model"),
        served_model_name="base",
        adapters=(AdapterSpec(NAME, str(options.workload / "adapters" / NAME)),),
        engine=EngineConfig(max_context=1024, max_rows=32, prefix_cache=False),
    )
    running = build(config)
    load_adapters(running, config)
    file = ResultsFile("merged", note=options.note)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        results = runner.run(measure(options, running, file.keep))
    print("\nshare of the base's tokens per second, median of the pairs (min-max)")
    for one in results:
        spread = f"{min(one['shares']):.2f}-{max(one['shares']):.2f}"
        print(f"{one['mode']:10}{one['case']:10}{one['rows']:3} rows  {one['share']:.3f} ({spread})")


if __name__ == "__main__":
    main()
