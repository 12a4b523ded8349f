"""What `make gpu-check` runs, as far as it goes in the interpreter: that its checks pass, and that they can fail."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

BENCH = Path(__file__).parents[2] / "bench"
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu-check` itself runs here")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of bench/ by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in (
        "gpu_check",
        "gpu_engine",
        "linear_checks",
        "decode_steps",
        "adapter_cases",
        "nf4_cases",
        "gpu_timing",
    ):
        sys.modules.pop(name, None)


def test_the_engine_check_passes_and_notices_a_broken_operation(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bench("gpu_engine")
    figures = engine.run(CPU, torch.float32, quick=True)
    assert figures["tokens_compared"] == 4
    assert figures["worst_gap"] <= figures["bound"]

    real = engine.CudaOps.silu_mul
    monkeypatch.setattr(engine.CudaOps, "silu_mul", lambda self, gate_up: real(self, gate_up.flip(1)))
    with pytest.raises(engine.Wrong, match="deviations below the best"):
        engine.run(CPU, torch.float32, quick=True)


def test_the_linear_check_passes_and_notices_a_wrong_weight(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = bench("linear_checks")
    shapes = checks.LoraShapes(
        n_layers=2,
        in_features=dict.fromkeys(checks.SMALL.in_features, 192),
        out_features=dict.fromkeys(checks.SMALL.out_features, 72),
    )
    monkeypatch.setattr(checks, "SMALL", shapes)
    made = checks.check_linears(CPU, seconds=60, rows=(1, 17))
    assert made["checked"] == 4

    real = checks.LinearKernels.fused

    def broken(self: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        y: torch.Tensor = real(self, x, *arguments, **options)
        y[-1, 71] *= 1.001
        return y

    monkeypatch.setattr(checks.LinearKernels, "fused", broken)
    with pytest.raises(checks.Wrong, match="rows are off from fp64"):
        checks.check_linears(CPU, seconds=60, rows=(1, 17))


def test_decode_steps_count_what_they_read(bench: Any) -> None:
    steps = bench("decode_steps")
    timing = bench("gpu_timing")
    spec = importlib.import_module("manylora.server.model.synthetic").synthetic_spec("tiny", num_hidden_layers=1)
    card = timing.Card("none", "sm_0", "-", "-", "-", 1.0, 100.0)
    lines = steps.DecodeSteps(spec, card, CPU, torch.float32, max_rows=2, context=20).run(2, (0, 1, 2))
    assert [line["adapters"] for line in lines] == [0, 1, 2]
    # One rank-16 adapter, fp32: (K + N) of q, k, v, o, gate, up, down times 16 times 4 bytes.
    of_adapter = (256 + 192 + 192 + 256 + 320 + 320 + 320) * 16 * 4
    assert lines[1]["bytes"] - lines[0]["bytes"] == of_adapter == lines[2]["bytes"] - lines[1]["bytes"]


def test_without_a_gpu_it_says_so(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("gpu_check").main([]) == 2
    assert "nothing was checked: no NVIDIA GPU" in capsys.readouterr().err
