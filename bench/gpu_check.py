"""Everything that needs a GPU, in one command and under ten minutes: `make gpu-check`.

    make gpu-check                     # with python3, or PYTHON=..., that has torch and triton; nothing else is needed
    make gpu-check ARGS=--tune         # first choose launch configurations for this card, then check and measure

1. kernels: the fused NF4 linear with and without adapters against fp64 on real shapes, in bf16 and fp16; the
   byte-permute decode against plain look-ups, to the bit; equal bits in every batch.
2. engine: a small random model through scheduler, slots, uploads, captured decode steps and the device sampler, against
   plain torch in fp32; nothing may be compiled while serving.
3. benchmarks: kernels (bench/gpu_kernels.py) against their peers and the copy bandwidth of this card.
4. decode steps: whole ones, of Llama-3.1-8B's shapes, against their byte floor.
5. tests: those under tests/ that know a GPU, if pytest is there and there is time.

Lines go to bench/results/gpu.jsonl, each with the GPU and its copy bandwidth. Exit code 1: something was wrong (the
last lines say what); 2: there is no GPU here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from gpu_timing import Card, GraphTimer, Results, measure_card, no_gpu  # noqa: E402

TESTS = (
    "tests/kernels/test_nf4_words.py", "tests/kernels/test_cuda_linear.py", "tests/kernels/test_cuda_attention.py",
    "tests/kernels/test_cuda_elementwise.py", "tests/kernels/test_cuda_sampling.py", "tests/model/test_cuda_decoder.py",
    "tests/engine/test_decode_graphs.py",
)  # fmt: skip
BUDGETS = {"kernels": 90, "engine": 120, "benchmarks": 150, "decode steps": 110, "tests": 150}
"""Seconds after which a stage starts nothing new, in their order. What compiling takes is in them: the first run on a
machine compiles some two hundred variants."""
_LEAST = 20
"""Seconds below which a stage is not begun."""

Stage = Callable[[float], dict[str, Any]]


def stages(results: Results, card: Card, device: torch.device) -> dict[str, Stage]:
    """Body of each stage, given its seconds; it raises if something is wrong, and returns figures for the report."""

    def kernels(seconds: float) -> dict[str, Any]:
        from linear_checks import check_linears

        return check_linears(device, seconds=seconds)

    def engine(seconds: float) -> dict[str, Any]:
        import gpu_engine

        began, figures = time.monotonic(), {"bf16": gpu_engine.run(device, torch.bfloat16)}
        if time.monotonic() - began < seconds / 2:
            figures["fp16"] = gpu_engine.run(device, torch.float16)
        return figures

    def benchmarks(seconds: float) -> dict[str, Any]:
        import gpu_kernels

        return gpu_kernels.run(card, GraphTimer(seconds=0.15), device, results, seconds=seconds)

    def decode_steps(seconds: float) -> dict[str, Any]:
        from decode_steps import DecodeSteps

        from manylora.server.model.synthetic import synthetic_spec

        began, measured = time.monotonic(), 0
        steps = DecodeSteps(synthetic_spec("llama-3.1-8b"), card, device, torch.bfloat16)
        for m in (1, 8, 32):
            if time.monotonic() - began > seconds:
                break
            for line in steps.run(m, sorted({0, 1, m})):
                results.add(line)
                measured += 1
                step, floor = line["step_ms"], line["floor_ms"]
                print(f"  {m} rows, {line['adapters']} adapters: {step} ms, floor {floor}", flush=True)
        return {"measured": measured}

    def tests(seconds: float) -> dict[str, Any]:
        if importlib.util.find_spec("pytest") is None:
            return {"skipped": "pytest is not installed"}
        return run_tests(seconds)

    return dict(zip(BUDGETS, (kernels, engine, benchmarks, decode_steps, tests), strict=True))


def run_tests(seconds: float) -> dict[str, Any]:
    """The tests that use a GPU where there is one, in a process of their own."""
    root = HERE.parent
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(packages(root)), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
    if importlib.util.find_spec("pytest_timeout") is None:
        command += ["-o", "timeout=", "-W", "ignore::pytest.PytestConfigWarning"]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        return {"unfinished_after_s": seconds, "said": str(error.stdout or "")[-300:]}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        raise AssertionError(f"{last}\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}")
    return {"pytest": last}


def packages(root: Path) -> Path:
    """A folder in which this checkout is importable as ``manylora``, as in the Makefile's check."""
    folder = root / "build" / "typing"
    inner = folder / "manylora"
    inner.mkdir(parents=True, exist_ok=True)
    for name in ("server", "kernels", "adapters"):
        link = inner / name
        if not link.exists():
            link.symlink_to(root / name)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BUDGETS), help="these stages only")
    parser.add_argument(
        "--tune", action="store_true", help="first choose this card's launch configurations (2 to 4 minutes)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.jsonl", help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=570, help="start nothing after this (default %(default)s)")
    parser.add_argument("--note", default="", help="kept with the results")
    options = parser.parse_args(arguments)
    if (reason := no_gpu()) is not None:
        print(f"gpu-check: nothing was checked: {reason}.", file=sys.stderr)
        print(
            "Without a GPU `make test` runs the kernels in Triton's interpreter and compiles them ahead of time.",
            file=sys.stderr,
        )
        return 2
    began = time.monotonic()
    if options.tune:
        subprocess.run([sys.executable, "-P", str(HERE / "gpu_kernels.py"), "--tune"], check=True)
    device = torch.device("cuda", torch.cuda.current_device())
    card = measure_card(GraphTimer(seconds=0.2))
    print(
        f"{card.gpu}, {card.arch}, torch {card.torch}, triton {card.triton}: copies at {card.copy_gbps:.0f} GB/s",
        flush=True,
    )
    run = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    results = Results(options.out, {"run": run, **card.fields(), "note": options.note})
    wrong, left_out = {}, []
    for name, body in stages(results, card, device).items():
        if options.only and name not in options.only:
            continue
        start = time.monotonic()
        left = options.seconds - (start - began)
        if left < _LEAST:
            print(f"{name}: not begun, the {options.seconds:.0f} s are over (--seconds, --only)", flush=True)
            left_out.append(name)
            continue
        print(f"{name} ...", flush=True)
        try:
            figures = body(min(left, BUDGETS[name]))
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the other stages still tell something
            traceback.print_exc()
            wrong[name] = figures = {"error": f"{type(error).__name__}: {error}"[:500]}
        seconds = round(time.monotonic() - start, 1)
        results.add({"kind": "check", "stage": name, "ok": name not in wrong, "seconds": seconds, "figures": figures})
        print(f"{name}: {'WRONG' if name in wrong else 'ok'} in {seconds} s  {json.dumps(figures)[:400]}", flush=True)
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"ok": not wrong, "wrong": sorted(wrong), "left_out": left_out, "seconds": seconds}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
