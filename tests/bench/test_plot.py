"""The pictures of the kernel benchmark, from invented lines that are nowhere but here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import adapter_cases
import nf4_cases
import plot
from gpu_timing import Card

CARD = Card("Test GPU", "sm_90", "1.2", "2.0", "3.0", l2_mb=0.001, copy_gbps=1000.0)


def synthetic_lines() -> list[dict[str, Any]]:
    """Invented results, for the pictures alone."""
    head = {"run": "2000-01-01T00:00:00", "machine": "none", **CARD.fields()}
    lines: list[dict[str, Any]] = [{**head, "kind": "copy", "bytes": 1}]
    head["dtype"] = "bf16"
    for shape in nf4_cases.SHAPES:
        for m in (1, 8, 64):
            for i, system in enumerate(nf4_cases.SYSTEMS):
                one = {
                    **head,
                    "kind": "linear",
                    "n": shape.n,
                    "k": shape.k,
                    "layer": shape.name,
                    "nested": True,
                    "m": m,
                }
                nbytes = nf4_cases.nf4_bytes(shape.n, shape.k, True)
                us = nbytes / 1e12 * 1e6 * (1.1 + i * 0.4 + m / 64)
                lines.append({**one, "system": system.name, "us": us, "bytes": nbytes, "gbps": 1.0, "of_copy": 0.1})
        lines.append({**one, "system": "bitsandbytes", "absent": "not installed"})
    for m in (1, 32):
        for adapters in (0, *adapter_cases.distinct_adapters(m)):
            for variant in ("fused", "unfused") if adapters else ("none",):
                ms = 4 + adapters * (0.1 if variant == "fused" else 0.2)
                lines.append({
                    **head, "kind": "adapters", "m": m, "adapters": adapters, "variant": variant, "rank": 16,
                    "nested": True, "layers": 32, "step_ms": ms, "base_step_ms": 4.0, "overhead": ms / 4 - 1,
                    "base_bytes": 3.6e9, "adapter_bytes": adapters * 84e6, "floor_ms": adapters * 0.084,
                    "floor_overhead": 0.0,
                })  # fmt: skip
    return lines


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, out = tmp_path / "kernels.jsonl", tmp_path / "pictures"
    path.write_text("".join(json.dumps(line) + "\n" for line in synthetic_lines()))
    assert plot.main(["--results", str(path), "--out", str(out)]) == 0
    for name in ("kernels-linear.png", "kernels-adapters.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert (out / name).stat().st_size > 20_000
    said = capsys.readouterr().out
    assert "plotting run 2000-01-01T00:00:00: Test GPU" in said
    assert set(plot.SYSTEM_STYLES) == {system.name for system in nf4_cases.SYSTEMS}


def test_plot_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.jsonl"
    assert plot.main(["--results", str(path)]) == 2
    path.write_text(json.dumps({"run": "x", "machine": "2 cores"}) + "\n")
    assert plot.main(["--results", str(path)]) == 2
    assert "no GPU results" in capsys.readouterr().err
    path.write_text("".join(json.dumps(line) + "\n" for line in synthetic_lines()))
    assert plot.main(["--results", str(path), "--run", "1999"]) == 2
    assert "no results of run 1999 (runs: 2000-01-01T00:00:00)" in capsys.readouterr().err
