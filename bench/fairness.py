"""What a flood of one tenant does to another: the time to the first token of one request a second, idle and beside it.

    python -P bench/fairness.py                                      # two prompt lengths, three rounds; 9 minutes
    python -P bench/fairness.py --prompts 64 --adapters examples/adapters       # every request asks for one of those

A real server with two tenants of equal shares, on the demo base unless ``--model`` names another; what comes after
``--`` goes to ``manylora serve``. *probe* sends one request a second, somewhere within the second, and reads the time
from sending it to its first event; *flood*, a process of its own, keeps 200 requests open (64 tokens in, 64 out)
all the time. Idle and flooded take turns (idle, flood, flood, idle, ...), and the ratio of the p95s is the
median of the rounds'. The server's very first flood counts like any other. Prompts are random token ids, and
nothing comes from a prefix cache. Appends a JSON line for each prompt length to bench/results/fairness.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from results_file import ResultsFile

from manylora.server.cli import demo_base
from manylora.server.keys_command import add_key

FLOOD_PROMPT, FLOOD_OUTPUT = 64, 64
OUTPUT = 16
"""Tokens that a probe asks for."""
SETTLE_S = 5.0
"""After the flood has begun, or ended, until it is measured."""
READY_S = 900.0
_URL = re.compile(r"serving \S+ on http://127\.0\.0\.1:(\d+)")


def body(rng: random.Random, models: Sequence[str], prompt: int, output: int) -> bytes:
    tokens = [rng.randrange(1000, 40_000) for _ in range(prompt)]
    fields = {"model": rng.choice(models), "prompt": tokens, "max_tokens": output, "ignore_eos": True, "stream": True}
    return json.dumps({**fields, "temperature": 0}).encode()


async def events(port: int, key: str, data: bytes) -> AsyncIterator[bytes]:
    """The lines of a streamed completion, from raw sockets: what a comfortable client costs would be measured too."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {key}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r}: {(await reader.read())[-400:]!r}")
        async for line in reader:
            if line.startswith(b"data:"):
                yield line
    finally:
        writer.close()


# --- the flood, a process of its own ---------------------------------------------------------------------------------


async def flood(port: int, key: str, models: Sequence[str], at_once: int) -> None:
    """Keep ``at_once`` requests open until standard input ends; then print the tokens that came a second."""
    rng = random.Random(1)
    tokens = 0

    async def client() -> None:
        nonlocal tokens
        while True:
            async for _line in events(port, key, body(rng, models, FLOOD_PROMPT, FLOOD_OUTPUT)):
                tokens += 1

    clients = [asyncio.create_task(client()) for _ in range(at_once)]
    end = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.sleep(SETTLE_S)
    began, before = time.perf_counter(), tokens
    done, _ = await asyncio.wait([end, *clients], return_when=asyncio.FIRST_COMPLETED)
    print(json.dumps({"tokens_per_s": round((tokens - before) / (time.perf_counter() - began), 1)}), flush=True)
    if end not in done:
        next(iter(done)).result()  # raises what ended it
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


# --- the probe -------------------------------------------------------------------------------------------------------


async def probe(port: int, key: str, models: Sequence[str], prompt: int, seconds: int, seed: int) -> list[float]:
    """Seconds to the first token of each of ``seconds`` requests, one a second."""
    rng = random.Random(seed)
    start = time.perf_counter()

    async def ask(at: float, data: bytes) -> float:
        await asyncio.sleep(start + at - time.perf_counter())
        sent = time.perf_counter()
        first = 0.0
        async for _line in events(port, key, data):
            first = first or time.perf_counter() - sent
        return first

    asked = [ask(i + rng.random(), body(rng, models, prompt, OUTPUT)) for i in range(seconds)]
    return await asyncio.gather(*asked)


def measure(port: int, keys: dict[str, str], prompt: int, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One round: idle and flooded."""
    found: dict[str, Any] = {}
    for way in ("idle", "flood") if seed % 2 == 0 else ("flood", "idle"):
        at_once = options.at_once if way == "flood" else 0
        with flooding(port, keys["flood"], options.models, at_once) as tokens_per_s:
            time.sleep(SETTLE_S)
            times = asyncio.run(probe(port, keys["probe"], options.models, prompt, options.seconds, seed))
        found[way] = {f"p{p}_ms": round(float(np.percentile(times, p)) * 1e3, 1) for p in (50, 95)}
        found[way]["max_ms"] = round(max(times) * 1e3, 1)
        if tokens_per_s:
            found[way]["flood_tokens_per_s"] = tokens_per_s[0]
    found["ratio"] = round(found["flood"]["p95_ms"] / found["idle"]["p95_ms"], 2)
    return found


@contextlib.contextmanager
def flooding(port: int, key: str, models: Sequence[str], at_once: int) -> Iterator[list[float]]:
    """A flood while the block runs; afterwards the list has its tokens a second, if there was one."""
    told: list[float] = []
    if not at_once:
        yield told
        return
    command = [sys.executable, "-P", __file__, "--as-flood", str(port), "--at-once", str(at_once)]
    command += ["--models", *models]
    environment = {**os.environ, "FLOOD_KEY": key}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        try:
            yield told
            out, _ = process.communicate(timeout=60)
            if process.returncode:
                raise RuntimeError(f"the flood ended with exit code {process.returncode}")
            told.append(json.loads(out)["tokens_per_s"])
        finally:
            process.kill()


@contextlib.contextmanager
def server(model: str, flags: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """A server with two tenants: its port and their keys."""
    with tempfile.TemporaryDirectory() as folder:
        tenants = Path(folder) / "keys.toml"
        keys = {name: add_key(tenants, name, {"adapters": ["*"]}) for name in ("flood", "probe")}
        log = Path(folder) / "log"
        command = [str(Path(sys.executable).parent / "manylora"), "serve", "--model", model, "--port", "0"]
        command += ["--served-model-name", "base", "--keys", str(tenants), "--prefix-cache", "off", *flags]
        environment = {**os.environ, "XDG_STATE_HOME": folder}
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            deadline = time.monotonic() + READY_S
            while (found := _URL.search(log.read_text(errors="replace"))) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
                time.sleep(0.2)
            yield int(found[1]), keys
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="(default: the demo base)")
    parser.add_argument("--prompts", type=int, nargs="+", default=(32, 64), help="(default 32 64 tokens)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--seconds", type=int, default=40, help="of each way in each round (default 40)")
    parser.add_argument("--at-once", type=int, default=200, help="requests of the flood (default 200)")
    parser.add_argument("--note", default="", help="kept with the results")
    parser.add_argument(
        "--adapters", help="a folder of adapters, of which each request asks for one (default: the base)"
    )
    parser.add_argument("--models", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--as-flood", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="for the server, after --")
    options = parser.parse_args()
    if options.as_flood is not None:
        asyncio.run(flood(options.as_flood, os.environ["FLOOD_KEY"], options.models, options.at_once))
        return
    options.models, flags = ["base"], list(options.flags)
    if options.adapters is not None:
        options.models = sorted(folder.name for folder in Path(options.adapters).iterdir() if folder.is_dir())
        flags += ["--adapter-dir", options.adapters]
    model = options.model or demo_base()
    if model is None:
        parser.error("the demo base is not installed: give --model")
    results = ResultsFile("fairness", note=options.note, model=Path(model).name, asked=options.models)
    with server(model, flags) as (port, keys):
        asyncio.run(probe(port, keys["probe"], options.models, 64, 3 * len(options.models), 0))  # memory touched
        for prompt in options.prompts:
            rounds = [measure(port, keys, prompt, options, seed) for seed in range(options.rounds)]
            ratios = [one["ratio"] for one in rounds]
            result = {
                "prompt": prompt, "output": OUTPUT, "seconds": options.seconds, "flood_requests": options.at_once,
                "flood_prompt": FLOOD_PROMPT, "flood_output": FLOOD_OUTPUT, "flags": options.flags,
                "ratio": statistics.median(ratios), "rounds": rounds,
            }  # fmt: skip
            results.keep(result)
            idle, flooded = (statistics.median(one[way]["p95_ms"] for one in rounds) for way in ("idle", "flood"))
            print(
                f"prompt of {prompt}: first token p95 {idle:.0f} ms idle, {flooded:.0f} ms beside the flood; "
                f"ratio {result['ratio']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
