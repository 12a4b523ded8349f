"""What stands around the timing of GPU benchmarks, and the timer itself over a CUDA that only takes notes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import gpu_timing
from gpu_timing import WrongResult


class NotedCuda:
    """Stands for torch.cuda: every replay takes as many milliseconds as launches were captured; notes what is done."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.now = 0.0
        self.capturing: Any = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        noted = self

        class Stream:
            def wait_stream(self, other: object) -> None: ...

            def synchronize(self) -> None:
                noted.notes.append("synchronize")

        class Graph:
            launches = 0

            def replay(self) -> None:
                noted.notes.append(f"replay {self.launches}")
                noted.now += self.launches

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = noted.now

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        @contextlib.contextmanager
        def graph(target: Graph, *, stream: Stream) -> Iterator[None]:
            noted.notes.append("capture")
            noted.capturing = target
            yield
            noted.capturing = None

        for name, stand_in in {
            "Stream": Stream, "CUDAGraph": Graph, "Event": Event, "graph": graph, "current_stream": Stream,
            "stream": contextlib.nullcontext, "synchronize": lambda: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def launch(self) -> None:
        self.notes.append("launch")
        if self.capturing is not None:
            self.capturing.launches += 1


def test_graph_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each system runs once before its capture; replays are in turn; a time is that of a whole replay."""
    cuda = NotedCuda()
    cuda.install(monkeypatch)
    monkeypatch.setattr(gpu_timing.gc, "freeze", lambda: None)  # not in the tests' process
    timer = gpu_timing.GraphTimer(seconds=0.0)
    first, second = timer.compare([[cuda.launch] * 2, [cuda.launch]])
    assert (first.seconds, second.seconds) == (pytest.approx(2e-3), pytest.approx(1e-3))
    assert first.spread == pytest.approx(0)
    assert cuda.notes[:6] == ["launch", "launch", "synchronize", "capture", "launch", "launch"]
    replays = [note for note in cuda.notes if note.startswith("replay")]
    assert replays == ["replay 2", "replay 1"] * (len(replays) // 2)
    assert len(replays) // 2 == 2 + 5  # warm-ups, fewest rounds

    def fails() -> None:
        cuda.notes.append("failed")
        raise ValueError("not compiled")

    timer.compile([fails, cuda.launch, fails])
    assert sorted(cuda.notes[-3:]) == ["failed", "failed", "launch"]


def test_spread_and_median() -> None:
    timing = gpu_timing.Timing.of([1.0] * 5 + [2.0] * 10 + [3.0] * 4 + [100.0])
    assert timing == gpu_timing.Timing(2.0, 1.0)


def test_copies_fill_the_cache_four_times() -> None:
    l2 = 50_000_000
    for nbytes in (1_000_000, 8_654_848, 60_000_000, 300_000_000):
        copies = gpu_timing.cold_copies(nbytes, l2)
        assert copies >= 2
        assert copies * nbytes >= 4 * l2
        assert copies == 2 or (copies - 1) * nbytes < 4 * l2


def test_the_gate_itself() -> None:
    exact, none = torch.tensor([[1.0, -2.0]]).double(), torch.zeros(1, 2)
    gpu_timing.check("same", exact.bfloat16(), exact, none)
    gpu_timing.check("a rounding off", (exact * (1 + 2.0**-8)).bfloat16(), exact, none)
    with pytest.raises(WrongResult, match=r"1 of 2 elements are wrong, the first at row 0, column 1"):
        gpu_timing.check("off", torch.tensor([[1.0, -2.1]]).bfloat16(), exact, none)
    with pytest.raises(WrongResult, match="nan"):
        gpu_timing.check("NaN", torch.tensor([[torch.nan, -2.0]]), exact, none + 1e9)


def test_cases_end_with_the_budget() -> None:
    time = [0.0]
    cases = [gpu_timing.Case(str(i), list) for i in range(5)]
    done, skipped = [], []  # type: ignore[var-annotated]
    for case in gpu_timing.within(cases, 25, skipped, clock=lambda: time[0]):
        done.append(case.label)
        time[0] += 10
    assert done == ["0", "1", "2"]
    assert skipped == ["3", "4"]
