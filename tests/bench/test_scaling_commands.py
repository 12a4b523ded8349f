"""The commands around the simulation: one cluster, the table of docs/scaling.md, its pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import scale_sweep
import simulate_fleet
from scaling.cells import POLICIES, VARIANTS, Cell
from scaling.costs import Costs
from scaling.theory import lru_hit_rate, zipf_shares

COSTS = Costs(((1, 0.005), (8, 0.011), (32, 0.025)), 0.0005, 0.0007, 0.016, 0.1, 2e7)


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["simulate_fleet.py", *flags])
    return simulate_fleet.main()


def test_a_line_for_each_policy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--adapters", "200", "--replicas", "3", "--requests", "900", "--rate", "9") == 0
    printed = capsys.readouterr().out
    assert [name for name in POLICIES if f"\n{name} " in printed] == list(POLICIES)
    assert "9 requests a second" in printed
    shares = zipf_shares(200, 1.0)
    assert f"{lru_hit_rate(shares, 32):.1%} if" in printed
    assert f"up to {lru_hit_rate(shares, 96):.1%} by" in printed


def test_a_trace_and_costs_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, costs = tmp_path / "trace.jsonl", tmp_path / "costs.json"
    lines = [{"at_s": i, "model": f"a{i % 7}", "prompt_tokens": 10, "max_tokens": 4} for i in range(1, 101)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    costs.write_text(json.dumps({"base_s": [[1, 0.5], [8, 0.5]], "prompt_token_s": 0, "adapter_s": 0}))
    flags = ("--trace", str(trace), "--costs", str(costs), "--policy", "affinity", "--replicas", "1", "--rows", "8")
    assert run(monkeypatch, *flags) == 0
    printed = capsys.readouterr().out
    assert "7 adapters, 1 replicas" in printed
    assert "1 requests a second; a replica can answer 4 at most: load 0.25" in printed
    line = next(line for line in printed.splitlines() if line.startswith("affinity"))
    assert line.split()[1] == "100.0%"


def test_what_does_not_keep_up_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--replicas", "1", "--adapters", "8", "--requests", "2000", "--policy", "random", "--load")
    assert run(monkeypatch, *flags, "2") == 0
    assert "does not keep up" in capsys.readouterr().out
    assert run(monkeypatch, *flags, "0.5") == 0
    assert "does not keep up" not in capsys.readouterr().out


def test_what_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text('{"reed_s": 1}')
    for flags, what in (
        (("--costs", str(costs)), "reed_s"),
        (("--costs", str(tmp_path / "none.json")), "none.json"),
        (("--trace", str(tmp_path / "none.jsonl")), "none.jsonl"),
        (("--slots", "0"), "slots"),
    ):
        assert run(monkeypatch, *flags) == 2
        assert what in capsys.readouterr().err


def test_the_table_has_every_cell_once() -> None:
    jobs = list(scale_sweep.jobs(COSTS))
    assert len(set(jobs)) == len(jobs)
    cells = [cell for table, cell, _ in jobs if table == "cells"]
    grid = len(scale_sweep.ADAPTERS) * len(scale_sweep.EXPONENTS) * len(scale_sweep.LOADS)
    assert len(cells) == grid * (1 + (len(scale_sweep.REPLICAS) - 1) * len(POLICIES))
    assert {cell.policy for table, cell, _ in jobs if table == "settings"} == {"affinity", *VARIANTS}
    assert all(cell.requests >= 400 * cell.replicas for cell in cells)


def test_the_load_of_few_slots_is_the_rate_of_many() -> None:
    of_slots = [cell for table, cell, _ in scale_sweep.jobs(COSTS) if table == "slots"]
    assert {round(cell.rate(COSTS), 6) for cell in of_slots} == {
        round(Cell(1000, 4, "random", load=0.5).rate(COSTS), 6)
    }


def test_the_most_load_is_the_last_that_keeps_the_limit() -> None:
    cell = Cell(100, 1, "random", requests=2000)
    found = scale_sweep.most(cell, COSTS)
    assert 0.3 < found.load < 1.5

    def p95(load: float) -> float:
        return Cell(100, 1, "random", load=load, requests=2000).run(COSTS).ttft_ms["p95"]

    assert p95(found.load) <= scale_sweep.LIMIT_MS < p95(found.load + 0.05)


def test_a_row_has_its_columns() -> None:
    table, row = scale_sweep.simulate(("cells", Cell(100, 2, "random", requests=500), COSTS))
    named = dict(zip(scale_sweep.COLUMNS, row, strict=True))
    assert (table, named["policy"], named["read_s"]) == ("cells", "random", 0.1)
    assert (named["adapters"], named["replicas"]) == (100, 2)
    assert 0 < named["ttft_p50_ms"] <= named["ttft_p95_ms"] <= named["ttft_p99_ms"]
    distance = scale_sweep.beside_theory([row])["random"]
    assert distance == pytest.approx(named["slot_hit_rate"] - lru_hit_rate(zipf_shares(100, 1.0), 32), abs=1e-4)


def line(rates: dict[str, float]) -> dict[str, Any]:
    """Invented, and nowhere but here."""
    cells = []
    for adapters in (10, 50):
        for replicas in (1, 4):
            for policy in POLICIES if replicas > 1 else ("random",):
                named = dict.fromkeys(scale_sweep.COLUMNS, 1.0)
                named |= {"adapters": adapters, "replicas": replicas, "policy": policy, "zipf": 1.0, "load": 0.5}
                named |= {"slots": 4, "host": 8, **rates}
                cells.append([named[column] for column in scale_sweep.COLUMNS])
    return {"run": "2000-01-01T00:00:00", "machine": "none", "columns": scale_sweep.COLUMNS, "cells": cells}


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    import readme_plots
    import scale_plots

    monkeypatch.setattr(readme_plots, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["scale_plots.py", "--out", str(tmp_path / "pictures")])
    assert scale_plots.main() == 2
    assert "scale_sweep.py makes one" in capsys.readouterr().err
    drawn = []
    for rate in (0.5, 0.5, 0.7):
        (tmp_path / "scaling.jsonl").write_text(json.dumps(line({"slot_hit_rate": rate})) + "\n")
        assert scale_plots.main() == 0
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()})
    assert set(drawn[0]) == {"scaling-hits.png", "scaling-swaps.png", "scaling-ttft.png"}
    assert drawn[0] == drawn[1]
    assert [name for name in drawn[0] if drawn[0][name] != drawn[2][name]] == ["scaling-hits.png"]
