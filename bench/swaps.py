"""More adapters than fit: 1,000 registered, 64 in host memory, 8 on the device, requests by Zipf's law.

    python -P bench/swaps.py                    # three rounds of 40 seconds each way; about 8 minutes with the set-up

Four *steady* streams of the base run all the time, and what is measured on them is the gap between two tokens: the
stall that swapping causes to those who swap nothing. Beside them four clients ask for adapters, one request after the
other:

- *swapping*: adapters by Zipf's law (exponent 1) over all of them, so most requests need one that is not on the
  device, and many one that is only on the disk;
- *resident*: the same requests, to adapters that all fit on the device. Nothing is swapped.

The two take turns (swapping, resident, resident, swapping, ...), and the ratio of the p99 gaps is the median of the
rounds'. Prints a table and appends JSON lines to bench/results/swaps.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from results_file import processor

from manylora.adapters.peft_tensors import places_of
from manylora.kernels.cpu import Arithmetic
from manylora.server.cli import demo_base
from manylora.server.collector import set_aside
from manylora.server.config import EngineConfig, ServeConfig
from manylora.server.engine.request import AdapterUse, FinishEvent, Request, SamplingParams, TokenEvent
from manylora.server.http_server import new_loop
from manylora.server.model.families import ModelSpec
from manylora.server.serving import Running, build

RESULTS = Path(__file__).parent / "results" / "swaps.jsonl"
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
STEADY, CLIENTS = 4, 4
PROMPT, OUTPUT = 32, 24


@dataclass(frozen=True)
class Counts:
    """Totals of the tiers at one moment."""

    device_hits: int
    device_misses: int
    host_hits: int
    host_misses: int
    uploads: int
    upload_seconds: float
    reads: int
    read_seconds: float

    @classmethod
    def of(cls, running: Running) -> Counts:
        slots, host, stats = running.slots.counters, running.host.stats().counters, running.engine.stats()
        return cls(
            stats.slot_hits, stats.slot_misses, host.hits, host.misses,
            slots.misses, slots.upload_seconds, host.reads, host.read_seconds,
        )  # fmt: skip

    def since(self, before: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(asdict(self).values(), asdict(before).values(), strict=True)))


def write_adapters(folder: Path, spec: ModelSpec, count: int, rank: int) -> list[Path]:
    """Random adapters in PEFT's format, bf16, all alike but for the signs of a few numbers, which count them: their
    values do not matter, but that they are of one size, or 8 bits would not hold them."""
    import torch
    from safetensors.torch import save

    shapes = spec.lora_shapes()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, place in places_of(shapes).items():
        if (projection := place.projection) in PROJECTIONS:
            a = torch.randn(rank, shapes.in_features[projection], generator=generator) * 0.01
            b = torch.randn(shapes.out_features[projection], rank, generator=generator) * 0.01
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.bfloat16()
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.bfloat16()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
        "target_modules": [f"{p}_proj" for p in PROJECTIONS],
    }  # fmt: skip
    one, digits = next(iter(tensors.values())), count.bit_length()
    paths = []
    for i in tqdm(range(count), desc="writing adapters", unit="adapter"):
        path = folder / f"a{i:04}"
        path.mkdir(parents=True)
        one.view(-1)[:digits] = 0.01 * torch.tensor([1 - 2 * (i >> k & 1) for k in range(digits)])
        (path / "adapter_config.json").write_text(json.dumps(config))
        (path / "adapter_model.safetensors").write_bytes(save(tensors))
        paths.append(path)
    return paths


class Load:
    """The streams and clients of one measurement."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._serial = itertools.count()
        self.gaps: list[float] = []
        self.first_tokens: list[float] = []
        self.n_requests = 0

    async def run(self, seconds: float, choose: Callable[[], str], n_tokens: int) -> None:
        ends = time.monotonic() + seconds
        await asyncio.gather(
            *(self._steady(ends, n_tokens) for _ in range(STEADY)),
            *(self._client(ends, choose) for _ in range(CLIENTS)),
        )

    async def _steady(self, ends: float, n_tokens: int) -> None:
        while time.monotonic() < ends:
            last = None
            async for moment in self._ask(None, n_tokens, ends):
                if last is not None:
                    self.gaps.append(moment - last)
                last = moment

    async def _client(self, ends: float, choose: Callable[[], str]) -> None:
        while time.monotonic() < ends:
            began, is_first = time.monotonic(), True
            async for moment in self._ask(choose(), OUTPUT, None):
                if is_first:
                    self.first_tokens.append(moment - began)
                    is_first = False
            self.n_requests += 1

    async def _ask(self, name: str | None, n_tokens: int, ends: float | None) -> Any:
        """The moments at which the request's tokens came; given up when ``ends`` is over."""
        number = next(self._serial)
        uses = () if name is None else (AdapterUse(self._running.registry.acquire(name)),)
        prompt = [1000 + (number * 7 + i) % 3000 for i in range(PROMPT)]
        params = SamplingParams(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
        request = Request(f"swap-{id(self)}-{number}", prompt, params, adapters=uses, arrival_time=time.monotonic())
        stream = self._running.engine.submit(request)
        async for event in stream:
            if isinstance(event, TokenEvent):
                yield time.monotonic()
                if ends is not None and time.monotonic() > ends:
                    stream.abort()
            elif isinstance(event, FinishEvent) and event.reason == "error":
                raise RuntimeError(f"{name}: {event.error}")


def zipf(names: Sequence[str], seed: int) -> Callable[[], str]:
    """Draws by Zipf's law with exponent 1, the first name being the most popular."""
    generator = random.Random(seed)
    weights = list(itertools.accumulate(1 / (i + 1) for i in range(len(names))))
    return lambda: generator.choices(names, cum_weights=weights)[0]


async def measure(options: argparse.Namespace, running: Running, names: list[str]) -> list[dict[str, Any]]:
    running.engine.start()
    ways = {"swapping": names, "resident": names[: options.slots]}
    results = []
    try:
        await Load(running).run(3, zipf(ways["resident"], 0), 100)  # memory touched, slots filled
        for number in range(options.rounds):
            for way in sorted(ways, reverse=number % 2 == 0):
                print(f"round {number + 1}/{options.rounds}: {way} ...", file=sys.stderr, flush=True)
                if way == "resident":  # its adapters into their slots, unmeasured
                    await Load(running).run(4, zipf(ways[way], 99), 100)
                before, load = Counts.of(running), Load(running)
                began = time.monotonic()
                await load.run(options.seconds, zipf(ways[way], number), 400)
                elapsed = time.monotonic() - began
                results.append(result(way, number, load, Counts.of(running).since(before), elapsed))
    finally:
        await running.close()
    return results


def result(way: str, number: int, load: Load, counts: Counts, elapsed: float) -> dict[str, Any]:
    def share(hits: int, misses: int) -> float | None:
        return round(hits / (hits + misses), 3) if hits + misses else None

    def milliseconds(values: Sequence[float], percent: float) -> float:
        return round(float(np.percentile(values, percent)) * 1e3, 1)

    return {
        "way": way,
        "round": number,
        "gaps": len(load.gaps),
        "gap_ms": {p: milliseconds(load.gaps, p) for p in (50, 95, 99, 100)},
        "first_token_ms": {p: milliseconds(load.first_tokens, p) for p in (50, 95, 99)},
        "requests_per_s": round(load.n_requests / elapsed, 2),
        "device_hit_rate": share(counts.device_hits, counts.device_misses),
        "host_hit_rate": share(counts.host_hits, counts.host_misses),
        "swaps_per_s": round(counts.uploads / elapsed, 2),
        "upload_ms": round(counts.upload_seconds / counts.uploads * 1e3, 1) if counts.uploads else None,
        "disk_read_ms": round(counts.read_seconds / counts.reads * 1e3, 1) if counts.reads else None,
    }


def report(results: Sequence[dict[str, Any]]) -> None:
    def median(way: str, get: Callable[[dict[str, Any]], float | None]) -> str:
        values = [v for one in results if one["way"] == way and (v := get(one)) is not None]
        return f"{statistics.median(values):g} ({min(values):g}-{max(values):g})" if values else "-"

    rows: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "gap between tokens of the steady streams, p50 ms": lambda one: one["gap_ms"][50],
        "p99 ms": lambda one: one["gap_ms"][99],
        "largest, ms": lambda one: one["gap_ms"][100],
        "first token of an adapter's request, p50 ms": lambda one: one["first_token_ms"][50],
        "first token, p99 ms": lambda one: one["first_token_ms"][99],
        "adapter requests a second": lambda one: one["requests_per_s"],
        "share that found its adapter on the device": lambda one: one["device_hit_rate"],
        "of the others: share found in host memory": lambda one: one["host_hit_rate"],
        "adapters brought to the device, a second": lambda one: one["swaps_per_s"],
        "time to copy one to the device, ms": lambda one: one["upload_ms"],
        "time to read one from the disk, ms": lambda one: one["disk_read_ms"],
    }
    print(f"\nmedian of the rounds (min-max)\n{'':52}{'swapping':>24}{'resident':>24}")
    for name, get in rows.items():
        print(f"{name:52}{median('swapping', get):>24}{median('resident', get):>24}")
    by_round = {(one["way"], one["round"]): one for one in results}
    ratios = [
        one["gap_ms"][99] / by_round["resident", number]["gap_ms"][99]
        for (way, number), one in by_round.items()
        if way == "swapping"
    ]
    print(f"p99 gap, swapping / resident: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo_base(), help="(default: the demo base)")
    parser.add_argument("--adapters", type=int, default=1000, help="registered (default 1000)")
    parser.add_argument("--host", type=int, default=64, help="that may be in host memory (default 64)")
    parser.add_argument("--slots", type=int, default=8, help="that may be on the device (default 8)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40, help="of one measurement (default 40)")
    parser.add_argument("--cpu-arithmetic", choices=get_args(Arithmetic), default="int16", help="as of serve")
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args()
    if options.model is None:
        parser.error("the demo base is not installed: give --model")
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="bench-swaps-") as folder:
        config = ServeConfig(
            model=options.model,
            engine=EngineConfig(
                max_context=1024,
                max_rows=STEADY + CLIENTS,
                max_device_adapters=options.slots,
                max_host_adapters=options.host,
                prefix_cache=False,
                cpu_arithmetic=options.cpu_arithmetic,
            ),
        )
        running = build(config)
        paths = write_adapters(Path(folder), running.decoder.spec, options.adapters, options.rank)
        began = time.monotonic()
        for path in tqdm(paths, desc="registering", unit="adapter"):
            running.registry.load(path.name, str(path))
        registering = time.monotonic() - began
        set_aside()  # as `manylora serve` does
        # Popular adapters are not the last that were registered, which are the ones in memory now.
        names = [path.name for path in paths]
        with asyncio.Runner(loop_factory=new_loop) as runner:
            results = runner.run(measure(options, running, names))
    run = {
        "run": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "arithmetic": options.cpu_arithmetic,
        "adapters": options.adapters, "host": options.host, "slots": options.slots, "rank": options.rank,
        "registered_per_s": round(options.adapters / registering, 1),
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for one in results:
            file.write(json.dumps({**run, **one, **({"note": options.note} if options.note else {})}) + "\n")
    report(results)


if __name__ == "__main__":
    main()
