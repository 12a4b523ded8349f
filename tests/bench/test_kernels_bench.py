"""The GPU benchmark without a GPU: everything but the timing itself runs here, in Triton's interpreter, on tiny layers.

Times are invented by ``InventedTimer``; what is tested is what stands around them: byte accounting, the gate that no
wrong kernel passes, the lines that are written, the choice of configurations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import adapter_cases
import gpu_kernels
import gpu_timing
import nf4_cases
import tune
from gpu_timing import Card, Launch, Timing, WrongResult

from manylora.kernels.cuda.configs import TileConfig, configs_for, parse, shipped
from manylora.kernels.cuda.nf4_words import pack
from manylora.server.model.synthetic import synthetic_base, synthetic_spec

# The interpreter's kernels would be launched on a GPU if there were one.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are the checks for machines without a GPU")

CARD = Card("Test GPU", "sm_90", "1.2", "2.0", "3.0", l2_mb=0.001, copy_gbps=1000.0)
LLAMA = synthetic_spec("llama-3.1-8b").lora_shapes()
CPU = torch.device("cpu")


class InventedTimer:
    """Runs each system's first launches once and says that every launch took 10 µs."""

    def __init__(self) -> None:
        self.ran = 0

    def compile(self, launches: Sequence[Launch]) -> None:
        launches[0]()

    def compare(self, systems: Sequence[Sequence[Launch]]) -> list[Timing]:
        for launches in systems:
            for launch in launches[:2]:
                launch()
                self.ran += 1
        return [Timing(1e-5 * len(launches), 0.01) for launches in systems]


def bench(timer: Any = None) -> nf4_cases.Bench:
    timer = InventedTimer() if timer is None else timer
    return nf4_cases.Bench(CARD, timer, configs_for(CPU), CPU, torch.float32, launches=2)


TINY = nf4_cases.Shape("pair", (128, 128), 128)


def test_bytes_of_llama_are_those_of_the_rooflines() -> None:
    assert round(adapter_cases.linear_bytes(LLAMA, nested=True) / 1e9, 2) == 3.60
    assert round(adapter_cases.linear_bytes(LLAMA, nested=False) / 1e9, 2) == 3.93
    assert round(adapter_cases.adapter_bytes(LLAMA, 16) / 1e6, 1) == 83.9
    # By hand, 4096x4096: 8 MiB of codes, 262144 scales of a byte, 1024 outer ones of 4; or 262144 of 4 bytes.
    assert nf4_cases.nf4_bytes(4096, 4096, True) == 8388608 + 262144 + 4096
    assert nf4_cases.nf4_bytes(4096, 4096, False) == 8388608 + 1048576
    # Rank 1 is read as a page of 16.
    assert adapter_cases.adapter_bytes(LLAMA, 1) == adapter_cases.adapter_bytes(LLAMA, 16)


def test_sites_of_the_shapes_are_llamas() -> None:
    by_name = {shape.name: shape for shape in nf4_cases.SHAPES}
    for site in adapter_cases.LAYER_SITES:
        assert by_name[site].n == LLAMA.site_offsets(site)[-1]
    named = {str(shape) for shape in nf4_cases.SHAPES}
    assert named == {"4096x4096", "14336x4096", "4096x14336", "6144x4096", "28672x4096"}


@pytest.mark.parametrize("nested", [True, False])
def test_bytes_agree_with_the_weights(nested: bool) -> None:
    """All but the tables of 256 and 16 values, and what ours keeps for each row (two numbers of 4 bytes)."""
    spec = synthetic_spec("tiny")
    weights = synthetic_base(spec, nested=nested).projections
    counted = adapter_cases.linear_bytes(spec.lora_shapes(), nested)
    tables = (16 + 256 * nested) * 4
    assert counted == sum(weight.nbytes - tables for weight in weights.values())
    one = weights["gate", 0]
    rows = 8 * one.shape[0] if nested else 0
    assert pack([one], torch.bfloat16).nbytes == nf4_cases.nf4_bytes(*one.shape, nested) + tables + rows


@pytest.mark.parametrize("nested", [True, False])
def test_linear_lines(nested: bool) -> None:
    """Every system in its place, with the schema that plot.py reads; bitsandbytes computes on the CPU too."""
    timer = InventedTimer()
    cases = nf4_cases.LinearCases(bench(timer))
    lines = cases.run(TINY, nested, 3)
    assert not cases.refused
    assert [line["system"] for line in lines] == [system.name for system in nf4_cases.SYSTEMS]
    for line in lines:
        assert "absent" not in line, line
        assert {
            "kind": "linear",
            "dtype": "fp32",
            "n": 256,
            "k": 128,
            "layer": "pair",
            "nested": nested,
        }.items() <= line.items()
        stored = 256 * 128 * 4 if line["system"] == "cuBLAS, 16-bit weight" else nf4_cases.nf4_bytes(256, 128, nested)
        assert line["bytes"] == stored
        assert line["us"] == 10.0
        assert line["gbps"] == round(stored / 1e-5 / 1e9, 1)
        assert line["of_copy"] == round(stored / 1e-5 / 1e12, 4)
    assert timer.ran > 0


def test_bitsandbytes_absent_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = nf4_cases.importlib.util.find_spec
    monkeypatch.setattr(
        nf4_cases.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    lines = nf4_cases.LinearCases(bench()).run(TINY, True, 1)
    absent = {line["system"]: line["absent"] for line in lines if "absent" in line}
    reason = "bitsandbytes is not installed"
    assert absent == {"bitsandbytes": reason, "bitsandbytes, separate": reason}


def test_rows_of_a_weight_are_views_of_it() -> None:
    weights = nf4_cases.Weights(bench(), TINY, nested=True)
    parts = weights.parts(weights.tensor)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), weights.tensor.dequantize())
    assert all(
        part.packed.untyped_storage().data_ptr() == weights.tensor.packed.untyped_storage().data_ptr() for part in parts
    )
    with pytest.raises(ValueError, match="nested block"):
        nf4_cases.rows_of(weights.tensor, 1, 3)


def spoiled(how: str) -> nf4_cases.System:
    """Our kernel with a wrong output in the last copy alone."""

    def products(which: nf4_cases.Bench, weights: nf4_cases.Weights) -> list[nf4_cases.Product]:
        right = nf4_cases.SYSTEMS[0].products(which, weights)

        def wrong(x: torch.Tensor) -> torch.Tensor:
            y = right[-1](x)
            if how == "one element":
                y[-1, -1] += 0.01
            elif how == "not written":
                y[0, 5] = torch.nan
            else:
                y = y.roll(1, dims=1)
            return y

        return [*right[:-1], wrong]

    return nf4_cases.System(nf4_cases.OURS, products, 2.0**-16)


@pytest.mark.parametrize("how", ["one element", "not written", "columns shifted"])
def test_a_wrong_kernel_is_not_timed(how: str) -> None:
    timer = InventedTimer()
    cases = nf4_cases.LinearCases(bench(timer), [spoiled(how)])
    (line,) = cases.run(TINY, True, 2)
    assert line["absent"].startswith("refused: manylora, 256x128, M 2")
    assert "us" not in line
    assert timer.ran == 0
    assert len(cases.refused) == 1


@pytest.fixture(scope="module")
def adapters() -> adapter_cases.AdapterCases:
    return adapter_cases.AdapterCases(bench(), synthetic_spec("tiny", vocab_size=64, num_hidden_layers=2), slots=4)


def test_adapter_lines(adapters: adapter_cases.AdapterCases, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapter_cases.distinct_adapters(1) == [1]
    assert adapter_cases.distinct_adapters(64) == [1, 16, 64]
    monkeypatch.setattr(adapter_cases, "distinct_adapters", lambda m: [m // 2])
    lines = adapters.run(4)
    shapes = synthetic_spec("tiny").lora_shapes()
    assert [(ln["variant"], ln["adapters"]) for ln in lines] == [
        ("none", 0), ("fused", 2), ("unfused", 2),
    ]  # fmt: skip
    by_hand = adapter_cases.adapter_bytes(shapes, 16, itemsize=4)
    for line in lines:
        assert (line["kind"], line["dtype"], line["m"], line["rank"]) == ("adapters", "fp32", 4, 16)
        assert line["adapter_bytes"] == line["adapters"] * by_hand
        assert line["base_bytes"] == adapter_cases.linear_bytes(shapes, True)
        assert line["floor_ms"] == round(line["adapter_bytes"] / 1e12 * 1e3, 4)
        assert line["floor_overhead"] == round(line["adapter_bytes"] / 1e12 / 8e-5, 4)
        assert line["base_step_ms"] == 0.08  # 2 layers of 4 launches, 10 µs each
    # A fused step has one launch more, which zeroes the counters.
    assert [line["overhead"] for line in lines] == [0.0, 0.125, 0.0]


def test_a_wrong_adapter_is_not_timed(adapters: adapter_cases.AdapterCases, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows' adapters exchanged, which moves the output by a tenth."""
    real = adapters._lora.route

    def exchanged(segments: Any, n_rows: int) -> Any:
        return real(replace(segments, slot_list=segments.slot_list[::-1]), n_rows)

    monkeypatch.setattr(adapter_cases, "distinct_adapters", lambda m: [m])
    monkeypatch.setattr(adapters._lora, "route", exchanged)
    monkeypatch.setattr(adapters._bench.timer, "compare", lambda systems: pytest.fail("timed"))
    with pytest.raises(WrongResult, match="qkv fused, M 2, 2 adapters"):
        adapters.run(2)


def test_plan_has_the_important_first_and_all_once() -> None:
    class Linear:
        def compile(self, *key: Any) -> list[dict[str, Any]]:
            return []

        def run(self, *key: Any) -> list[dict[str, Any]]:
            return [{"key": key}]

    class Adapters:
        def compile(self, rows: Sequence[int]) -> list[dict[str, Any]]:
            return []

        def run(self, m: int) -> list[dict[str, Any]]:
            return [{"adapters": m}]

    cases = gpu_kernels.plan(Linear(), Adapters, nf4_cases.SHAPES, quick=False)
    found = [json.dumps(line, default=str) for case in cases for line in case.run()]
    assert len(set(found)) == len(found) == 5 * 8 * 2 + 4
    assert len({case.label for case in cases}) == len(cases)
    kinds = ["adapters" if "adapters" in text else "true" in text for text in found]
    assert kinds == [True] * 20 + ["adapters"] * 4 + [True] * 20 + [False] * 40
    assert len(gpu_kernels.plan(Linear(), Adapters, nf4_cases.SHAPES, quick=True)) == 5 * 3 + 2 + 2  # and 2 to compile


def test_a_whole_run_but_for_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of a file: each names the hardware and the run, and the summary is JSON."""
    monkeypatch.setattr(gpu_kernels, "QUICK_ROWS", (3,))
    monkeypatch.setattr(gpu_kernels, "QUICK_ADAPTER_ROWS", (1,))
    monkeypatch.setattr(gpu_kernels, "MODEL", "tiny")
    path = tmp_path / "kernels.jsonl"
    results = gpu_timing.Results(path, gpu_kernels.common_fields(CARD, "a test"))
    last = gpu_kernels.measure(bench(), results, [TINY], quick=True, seconds=200)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert lines == results.lines
    for line in lines:
        assert set(CARD.fields()) | {"run", "machine", "note", "kind"} <= set(line)
    kinds = [line["kind"] for line in lines]
    assert kinds == ["copy"] + ["linear"] * len(nf4_cases.SYSTEMS) + ["adapters"] * 3
    assert json.loads(json.dumps(last))["skipped"] == []
    assert last["refused"] == []
    assert last["of_copy"].keys() == {"M 3"}
    assert last["adapters"].keys() == {"M 1, 1 adapters"}


def test_copy_bandwidth_counts_both_directions() -> None:
    # Two copies of 1000 bytes in 20 µs: 4000 bytes.
    assert gpu_timing.copy_gbps(InventedTimer(), "cpu", 1000) == pytest.approx(0.2)


class CostTimer(InventedTimer):
    """Times that a model of the launch says, without running anything."""

    def compare(self, systems: Sequence[Sequence[Launch]]) -> list[Timing]:
        times = []
        for launches in systems:
            chosen = launches[0].__defaults__[0].__defaults__  # type: ignore[attr-defined]
            _, _, tile, splits = chosen
            cost = 1 + abs(splits - 2) + (tile.bn != 64) + abs(tile.num_stages - 4)
            times.append(Timing(cost * 1e-6 * len(launches), 0.0))
        return times


def test_tune_writes_what_configs_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest by an invented cost is found, and the file keeps its other entries."""
    shape = nf4_cases.Shape("small", (128,), 512)
    monkeypatch.setattr(tune, "SPLIT_ROWS", (17,))
    monkeypatch.setattr(tune, "TILE_ROWS", {32: (17,)})
    monkeypatch.setattr(
        tune, "TILES", {bm: (TileConfig(bm, 64, 2, 4, 4), TileConfig(bm, 128, 4, 4, 2)) for bm in (16, 32, 64)}
    )
    said: list[str] = []
    found = tune.tune(bench(CostTimer()), [shape], processors=4, seconds=200, say=said.append)
    assert found["splits"] == {"128x512": 2}
    assert found["tiles"]["32"] == {"bn": 64, "nb": 2, "num_warps": 4, "num_stages": 4}
    assert found["tiles"]["64"] == tune.entry(configs_for(CPU), "")["tiles"]["64"]  # not tried: kept
    assert "Test GPU" in found["source"]
    assert said

    path = tmp_path / "configs.json"
    path.write_text(tune.CONFIGS.read_text())
    tune.write(path, "sm_90", found)
    read = parse(json.loads(path.read_text()))
    assert read["sm_80"] == shipped()["sm_80"]
    assert read["sm_90"].splits_of(128, 512) == 2
    assert read["sm_90"].tile(17).bn == 64
    with pytest.raises(ValueError, match="sm_90"):
        tune.write(path, "sm_90", {**found, "splits": {"1x1": 0}})
    assert parse(json.loads(path.read_text())) == read


def test_tune_keeps_what_it_has_when_the_time_is_over() -> None:
    found = tune.tune(bench(CostTimer()), [TINY], processors=4, seconds=-1, say=lambda text: None)
    assert found["splits"] == dict(configs_for(CPU).splits)
    assert "ended after" in found["source"]


def test_tune_rewrites_the_shipped_file_as_it_is(tmp_path: Path) -> None:
    """Its format by hand and by program are one, so that a tuned entry is a small diff."""
    path = tmp_path / "configs.json"
    path.write_text(tune.CONFIGS.read_text())
    data = json.loads(path.read_text())
    tune.write(path, "sm_90", data["sm_90"])
    assert path.read_text() == tune.CONFIGS.read_text()


@pytest.mark.parametrize("shape", nf4_cases.SHAPES, ids=str)
def test_split_candidates_are_sensible(shape: nf4_cases.Shape) -> None:
    for bn in (64, 128, 256):
        candidates = tune.split_candidates(shape, bn, 132)
        tiles = -(-shape.n // bn)
        assert all(shape.k // 64 // splits >= 4 for splits in candidates)
        assert any(tiles * splits >= 132 for splits in candidates)


def test_without_a_gpu_exit_code_2(tmp_path: Path) -> None:
    """As a user runs it, from another folder; nothing is written."""
    out = tmp_path / "out.jsonl"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-P", gpu_kernels.__file__, "--quick", "--out", str(out)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "no NVIDIA GPU" in run.stderr
    assert "Traceback" not in run.stderr
    assert not out.exists()
