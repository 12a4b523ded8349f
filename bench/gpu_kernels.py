"""Our CUDA kernels against their peers and against the card's own copy bandwidth; appends JSON lines.

    python -P bench/gpu_kernels.py            # about four minutes, most important first
    python -P bench/gpu_kernels.py --quick    # about one: nested scales, M 1, 8 and 32
    python -P bench/gpu_kernels.py --shapes 4096x4096,28672x4096 --dtype fp16
    python -P bench/gpu_kernels.py --tune     # choose launch configurations, into kernels/cuda/configs.json
    python -P bench/plot.py                   # pictures of the latest run

It needs an NVIDIA GPU, torch, triton and numpy; nothing need be installed of this project. bitsandbytes is compared
with where it is installed. Every output is first checked against an fp64 product: what is wrong is not timed, and the
exit code is 1. Exit code 2: no GPU to measure on.

Three kinds of lines, each with the card, the versions and its copy bandwidth (see bench/gpu_timing.py for the timing):

- copy: the copy bandwidth by itself.
- linear: one NF4 layer N x K for M rows, by system. ``us`` a launch; ``gbps`` is the bytes of the weight as that system
  stores it over the time, ``of_copy`` that as a share of the copy bandwidth. A system that is not there has ``absent``.
- adapters: the linears of a whole decode step, with ``adapters`` distinct rank-16 adapters among the ``m`` rows.
  ``overhead`` over the adapter-free step, ``floor_overhead`` what reading their bytes at copy bandwidth would cost.
"""

# Not called kernels.py: wherever this folder is on the path, transformers and bitsandbytes would take a module of that
# name for PyPI's `kernels` and import it.

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import gpu_timing
import torch
from gpu_timing import COPY_BYTES, Card, Case, GraphTimer, Results, Timer, WrongResult, measure_card, no_gpu, within

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
FIRST_ROWS, OTHER_ROWS, QUICK_ROWS = (1, 8, 16, 32), (2, 4, 64, 128), (1, 8, 32)
ADAPTER_ROWS, QUICK_ADAPTER_ROWS = (8, 32, 1, 64), (8, 32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MODEL = "llama-3.1-8b"


def plan(linear: Any, adapters: Any, shapes: Sequence[Any], *, quick: bool) -> list[Case]:
    """What to measure, most important first: what is left out when the time is over stands at the end.

    ``linear.run(shape, nested, m)`` and ``adapters().run(m)`` measure; the latter is made when it is first needed. What
    a group needs is compiled first.
    """

    def linears(nested: bool, rows: Sequence[int]) -> list[Case]:
        scales = "" if nested else ", fp32 scales"
        return [
            Case(f"compiling for M {rows[0]} ..{scales}", functools.partial(linear.compile, shapes, nested, rows)),
            *(
                Case(f"{shape.name} {shape}{scales}, M {m}", functools.partial(linear.run, shape, nested, m))
                for shape in shapes
                for m in rows
            ),
        ]

    adapter_rows = QUICK_ADAPTER_ROWS if quick else ADAPTER_ROWS
    with_adapters = [
        Case("compiling for adapters", lambda: adapters().compile(adapter_rows)),
        *(Case(f"adapters, M {m}", lambda m=m: adapters().run(m)) for m in adapter_rows),
    ]
    if quick:
        return [*linears(True, QUICK_ROWS), *with_adapters]
    rows = sorted((*FIRST_ROWS, *OTHER_ROWS))
    return [*linears(True, FIRST_ROWS), *with_adapters, *linears(True, OTHER_ROWS), *linears(False, rows)]


def measure(bench: Any, results: Results, shapes: Sequence[Any], *, quick: bool, seconds: float) -> dict[str, Any]:
    """Everything that fits into ``seconds``; the summary, which is the last line of the output."""
    from adapter_cases import AdapterCases
    from nf4_cases import LinearCases

    from manylora.server.model.synthetic import synthetic_spec

    begin, before = time.monotonic(), len(results.lines)
    results.add({"kind": "copy", "bytes": COPY_BYTES})
    linear = LinearCases(bench)
    slots = max(QUICK_ADAPTER_ROWS if quick else ADAPTER_ROWS)

    @functools.cache
    def adapters() -> AdapterCases:
        return AdapterCases(bench, synthetic_spec(MODEL, vocab_size=256), slots=slots)

    skipped: list[str] = []
    refused = linear.refused
    cases = plan(linear, adapters, shapes, quick=quick)
    for case in within(cases, seconds - (time.monotonic() - begin), skipped):
        try:
            lines = case.run()
        except WrongResult as error:
            print(f"REFUSED: {error}", file=sys.stderr, flush=True)
            refused.append(str(error))
            continue
        for line in lines:
            results.add(line)
    report(results.lines[before:])
    return summary(results.lines[before:], skipped, refused, time.monotonic() - begin)


def run(
    card: Card,
    timer: Timer,
    device: torch.device,
    results: Results,
    *,
    seconds: float,
    dtype: torch.dtype = torch.bfloat16,
    quick: bool = False,
) -> dict[str, Any]:
    """``measure`` all shapes with this device's configurations, for other programs. Raises WrongResult, after all has
    been measured, if a kernel of ours was refused."""
    from nf4_cases import SHAPES, Bench

    from manylora.kernels.cuda.configs import configs_for

    bench = Bench(card, timer, configs_for(device), device, dtype)
    with torch.inference_mode():
        last = measure(bench, results, SHAPES, quick=quick, seconds=seconds)
    if last["refused"]:
        raise WrongResult("; ".join(last["refused"]))
    return last


def summary(lines: Sequence[dict[str, Any]], skipped: list[str], refused: list[str], seconds: float) -> dict[str, Any]:
    """The geometric mean of our share of the copy bandwidth, and the adapters' overheads, beside what they would cost
    at least."""
    from nf4_cases import OURS

    shares: dict[int, list[float]] = {}
    overheads = {}
    for line in lines:
        if line["kind"] == "linear" and line["system"] == OURS and line["nested"] and "of_copy" in line:
            shares.setdefault(line["m"], []).append(line["of_copy"])
        if line["kind"] == "adapters" and line["variant"] == "fused":
            key = f"M {line['m']}, {line['adapters']} adapters"
            overheads[key] = {"overhead": line["overhead"], "floor": line["floor_overhead"]}
    means = {m: math.exp(sum(map(math.log, each)) / len(each)) for m, each in sorted(shares.items())}
    head = {key: lines[0][key] for key in ("run", "gpu", "copy_gbps") if lines}
    return {
        **head,
        "of_copy": {f"M {m}": round(mean, 3) for m, mean in means.items()},
        "adapters": overheads,
        "refused": refused,
        "absent": sorted({f"{line['system']}: {line['absent']}" for line in lines if "absent" in line}),
        "skipped": skipped,
        "seconds": round(seconds, 1),
    }


def report(lines: Sequence[dict[str, Any]]) -> None:
    """The table: microseconds of each system, and our share of the copy bandwidth."""
    from nf4_cases import OURS, SYSTEMS

    cells = {(ln["n"], ln["k"], ln["nested"], ln["m"], ln["system"]): ln for ln in lines if ln["kind"] == "linear"}
    names = [system.name for system in SYSTEMS]
    if cells:
        print(f"\n{'µs a launch':32}" + "".join(f"{name:>24}" for name in names) + f"{'ours, of copy':>16}")
    for n, k, nested, m in dict.fromkeys(key[:4] for key in cells):
        row = "".join(f"{cells.get((n, k, nested, m, name), {}).get('us', '-'):>24}" for name in names)
        share = cells.get((n, k, nested, m, OURS), {}).get("of_copy")
        label = f"{n}x{k} {'nested' if nested else 'fp32 scales'} M {m}"
        print(f"{label:32}{row}{'-' if share is None else f'{share:.0%}':>16}")
    steps = [line for line in lines if line["kind"] == "adapters"]
    if steps:
        print(f"\n{'a step of linears':32}{'ms':>10}{'overhead':>12}{'byte floor':>12}")
    for line in steps:
        label = f"M {line['m']}, {line['adapters']} adapters, {line['variant']}"
        print(f"{label:32}{line['step_ms']:>10.3f}{line['overhead']:>12.1%}{line['floor_overhead']:>12.1%}")
    print()


def common_fields(card: Card, note: str) -> dict[str, Any]:
    """Of every line of a run."""
    head = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": platform.node(), **card.fields()}
    return {**head, "note": note} if note else head


def main(arguments: Sequence[str] | None = None, *, timer: Timer | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="nested scales only, M 1, 8, 32; adapters at M 8 and 32")
    parser.add_argument("--shapes", metavar="NxK,...", help="only these; default: all five of Llama-3.1-8B")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="type of the activations (default bf16)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="file that lines are appended to (default %(default)s)"
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=240, metavar="S",
        help="start nothing new after this; what is left out is named in the last line (default 240)",
    )  # fmt: skip
    parser.add_argument(
        "--tune", nargs="?", const=True, metavar="FILE",
        help="choose tiles and splits for this GPU by measurement, write its entry into FILE (default "
        "kernels/cuda/configs.json), measure nothing else",
    )  # fmt: skip
    parser.add_argument("--note", default="", help="kept with the results: what was special about this run")
    options = parser.parse_args(arguments)
    if (reason := no_gpu()) is not None:
        print(f"bench/gpu_kernels.py: nothing measured: {reason}", file=sys.stderr)
        return 2

    from nf4_cases import SHAPES, Bench

    from manylora.kernels.cuda.configs import configs_for

    known = {str(shape): shape for shape in SHAPES}
    wanted = list(known) if options.shapes is None else options.shapes.split(",")
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--shapes: no {', '.join(unknown)}; there are {', '.join(known)}")
    shapes = [known[name] for name in wanted]
    timer = GraphTimer(seconds=0.15 if options.quick else 0.3) if timer is None else timer
    device = torch.device("cuda", torch.cuda.current_device())
    card = measure_card(timer)
    print(f"{card.gpu}: copies at {card.copy_gbps:.0f} GB/s (read + written)", file=sys.stderr, flush=True)
    bench = Bench(card, timer, configs_for(device), device, DTYPES[options.dtype])
    if options.tune is not None:
        return _tune(bench, shapes, options)
    results = Results(options.out, common_fields(card, options.note))
    with torch.inference_mode():
        last = measure(bench, results, shapes, quick=options.quick, seconds=options.budget_seconds)
    print(json.dumps(last))
    return 1 if last["refused"] else 0


def _tune(bench: Any, shapes: Sequence[Any], options: argparse.Namespace) -> int:
    import tune

    path = tune.CONFIGS if options.tune is True else Path(options.tune)
    say = functools.partial(print, file=sys.stderr, flush=True)
    processors = tune.processors_of(bench.device)
    try:
        with torch.inference_mode():
            found = tune.tune(bench, shapes, processors=processors, seconds=options.budget_seconds, say=say)
    except gpu_timing.WrongResult as error:
        print(f"bench/gpu_kernels.py: a kernel computes wrongly, nothing written: {error}", file=sys.stderr)
        return 1
    tune.write(path, bench.card.arch, found)
    print(json.dumps({"gpu": bench.card.gpu, "arch": bench.card.arch, "file": str(path), "configuration": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
