"""How the GPU benchmarks take their times, what card they ran on, and what stops a wrong kernel from being timed.

**Under CUDA-graph replay**, as a decode step runs: a graph of many launches has no cost of Python or of the driver in
it, only the microsecond or so that the GPU itself needs between two kernels, which a decode step pays too. Times are of
whole replays, by CUDA events, queued without waiting in between so that the GPU never runs dry.

**With a cold second-level cache**, as in a decode step: between two uses of a layer's weights the whole rest of the
model is read. A 4096x4096 projection in NF4 is 8.7 MB and fits into an H100's 50 MB five times, so a loop over one copy
would measure the cache. A graph therefore goes round ``cold_copies`` distinct copies of the weights, together at least
four times the cache: one that evicts the least recently used line would hit nothing, the luckiest a quarter.

**Side by side**: what is to be compared is replayed in turn, so that all see the same clocks and temperature; the
median over the rounds counts, and the spread from the 10th to the 90th percentile is kept with it.

**Copy bandwidth** is the ceiling that is named beside every result: a device-to-device copy of 1 GiB, bytes read plus
bytes written. Reading alone can be a little faster than that, so a share slightly above 1 is possible, not an error.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("manylora") is None:
    # A bare machine with only torch, triton and numpy: the checkout itself is the package.
    _package = types.ModuleType("manylora")
    _package.__path__ = [str(ROOT)]
    sys.modules["manylora"] = _package

Launch = Callable[[], object]

COPY_BYTES = 1 << 30
LAUNCHES = 64
"""Launches of a graph at least: a third of a millisecond of even the smallest layers."""
COLD_FOOTPRINT = 4
"""Size of all copies together, in second-level caches."""
_WARM_UPS, _FEWEST_ROUNDS = 2, 5


class WrongResult(RuntimeError):
    """A kernel's output is not what the reference says; its time would mean nothing."""


def no_gpu() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return f"no NVIDIA GPU that this torch ({torch.__version__}) can use"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: Triton's kernels would run in its interpreter, on the CPU"
    return None


@dataclass(frozen=True)
class Timing:
    """``seconds`` of a replay, the median; ``spread``: 10th to 90th percentile, as a share of it."""

    seconds: float
    spread: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        ordered, median = sorted(samples), statistics.median(samples)
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        return cls(median, (high - low) / median if median else 0.0)


class Timer(Protocol):
    """What takes times. ``GraphTimer``; in the tests, which have no GPU, one that runs everything and invents them."""

    def compile(self, launches: Sequence[Launch]) -> None: ...

    def compare(self, systems: Sequence[Sequence[Launch]]) -> list[Timing]: ...


class GraphTimer:
    """Replays CUDA graphs; see the module's text. ``seconds``: about so long for each comparison, without warm-up."""

    def __init__(self, *, seconds: float = 0.4, most_rounds: int = 50) -> None:
        self._seconds, self._most_rounds = seconds, most_rounds
        self._stream = torch.cuda.Stream()
        gc.freeze()  # torch.cuda.graph may collect garbage at each capture: not through all that torch has made

    def compile(self, launches: Sequence[Launch]) -> None:
        """Run each launch once, in threads: Triton compiles without holding Python's lock, seconds for each variant.

        They must not share scratch memory that could still grow. What fails here fails again, and is told, when it is
        timed.
        """
        if not launches:
            return

        def attempt(launch: Launch) -> None:
            try:
                launch()
            except Exception:  # noqa: BLE001 - any of the compiler's; see above
                return

        attempt(launches[0])  # alone: what is set up once for a kernel is set up here
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(attempt, launches[1:]))
        torch.cuda.synchronize()

    def compare(self, systems: Sequence[Sequence[Launch]]) -> list[Timing]:
        """Time each system's launches, all of them in a row: replays in turn. What memory they keep must be there
        after their first run."""
        graphs = [self._capture(launches) for launches in systems]
        for _ in range(_WARM_UPS):
            first = time.perf_counter()
            self._replay(graphs)
            torch.cuda.synchronize()
        took = time.perf_counter() - first
        rounds = max(_FEWEST_ROUNDS, min(self._most_rounds, int(self._seconds / max(took, 1e-6))))
        marks = [self._replay(graphs) for _ in range(rounds)]
        torch.cuda.synchronize()
        return [
            Timing.of([marked[i][0].elapsed_time(marked[i][1]) * 1e-3 for marked in marks]) for i in range(len(graphs))
        ]

    def _capture(self, launches: Sequence[Launch]) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for launch in launches:  # compiles, grows scratch memory, sets up cuBLAS: nothing of that can be captured
                launch()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for launch in launches:
                launch()
        return graph

    @staticmethod
    def _replay(graphs: Sequence[Any]) -> list[tuple[Any, Any]]:
        marks = []
        for graph in graphs:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            marks.append((begin, end))
        return marks


@dataclass(frozen=True)
class Card:
    """What a result was measured on. ``copy_gbps``: 10^9 bytes a second, read plus written."""

    gpu: str
    arch: str
    driver: str
    torch: str
    triton: str
    l2_mb: float
    copy_gbps: float

    def fields(self) -> dict[str, Any]:
        """Of every JSON line."""
        return {
            "gpu": self.gpu, "arch": self.arch, "driver": self.driver, "torch": self.torch, "triton": self.triton,
            "l2_mb": self.l2_mb, "copy_gbps": round(self.copy_gbps, 1),
        }  # fmt: skip

    @property
    def l2_bytes(self) -> int:
        return int(self.l2_mb * 1e6)


def measure_card(timer: Timer) -> Card:
    """The current CUDA device, its copy bandwidth included."""
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Card(
        gpu=properties.name,
        arch=f"sm_{properties.major}{properties.minor}",
        driver=_driver(),
        torch=torch.__version__,
        triton=triton.__version__,
        l2_mb=round(properties.L2_cache_size / 1e6, 1),
        copy_gbps=copy_gbps(timer, "cuda"),
    )


def copy_gbps(timer: Timer, device: str, nbytes: int = COPY_BYTES) -> float:
    """10^9 bytes a second of a copy of ``nbytes``: each is read and written."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (timing,) = timer.compare([[lambda: target.copy_(source)] * 2])
    return 2 * 2 * nbytes / timing.seconds / 1e9


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return said[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def cold_copies(nbytes: int, l2_bytes: int) -> int:
    """How many distinct copies a graph goes round; see the module's text."""
    return max(2, -(-COLD_FOOTPRINT * l2_bytes // nbytes))


def check(what: str, got: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor) -> None:
    """Raise WrongResult unless every element is within one rounding to its type of ``exact``, plus ``slack``."""
    rounding = torch.finfo(got.dtype).eps  # twice the rounding error to nearest, as Triton's interpreter truncates
    distance = (got.double() - exact.double()).abs()
    bound = rounding * exact.double().abs() + slack.double()
    outside = ~(distance <= bound)  # NaN is outside
    if outside.any():
        row, column = (int(i) for i in outside.nonzero()[0])
        raise WrongResult(
            f"{what}: {int(outside.sum())} of {got.numel()} elements are wrong, the first at row {row}, "
            f"column {column}: {float(got[row, column])}, the reference has {float(exact[row, column])}"
        )


def poison(m: int, n: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Leave NaN in the block that the caching allocator most likely hands out for the next ``[m, n]``."""
    torch.full((m, n), float("nan"), dtype=dtype, device=device)


@dataclass(frozen=True)
class Case:
    """A part of a plan: ``run`` gives the JSON lines (without the card) of what it measured."""

    label: str
    run: Callable[[], list[dict[str, Any]]]


class Results:
    """Appends JSON lines to a file as they come; each with the run, the card and the options."""

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        self.path, self._common, self.lines = path, common, list[dict[str, Any]]()
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, line: dict[str, Any]) -> None:
        kept = {**self._common, **line}
        self.lines.append(kept)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")


def within(
    cases: Sequence[Case], seconds: float, skipped: list[str], *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Case]:
    """The cases in order, with progress on stderr (a bar on a terminal, else lines), until ``seconds`` have passed; the
    labels of the rest are left in ``skipped``."""
    begin, bar = clock(), None
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        bar = tqdm(total=len(cases), unit="case", file=sys.stderr, dynamic_ncols=True)
    for i, case in enumerate(cases):
        passed = clock() - begin
        if passed >= seconds:
            skipped.extend(one.label for one in cases[i:])
            break
        left = min(passed / i * (len(cases) - i), seconds - passed) if i else seconds
        if bar is not None:
            bar.set_description(case.label)
            bar.set_postfix_str(f"at most {seconds - passed:.0f} s left")
        else:
            print(f"{i + 1}/{len(cases)} {case.label} (about {left:.0f} s left)", file=sys.stderr, flush=True)
        yield case
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
