"""The costs of a replica: what is fitted, what is read, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from scaling.costs import NEEDED, STEP_TOKENS, Case, Costs, CostsError, Misses, fit, last_measured

MISSES = Misses(upload_s=0.02, read_s=0.1, adapter_bytes=1e7, drag=0.5, uses=3, reads=3)
COSTS = Costs(((1, 0.005), (8, 0.012), (32, 0.024)), 0.0006, 0.0007, 0.02, 0.1, 1e7)
PLAIN_TOKEN_S = 0.0005


def seconds(case: Case) -> float:
    """Of a machine that is exactly as the model says: prompts first, in whole steps, then a step for each token."""
    rows, adapters, prompt, output = case
    table = COSTS.base_table(32)
    prefills = -(-rows * prompt // STEP_TOKENS)
    token_s = COSTS.prompt_token_s if adapters else PLAIN_TOKEN_S
    decoding = (output - 1) * (table[rows] + adapters * COSTS.adapter_s)
    prompts = prefills * table[0] + max(adapters, prefills * bool(adapters)) * COSTS.adapter_s
    return prompts + rows * prompt * token_s + decoding


def test_a_machine_that_is_as_the_model_says_is_found_again() -> None:
    costs, ratios = fit({case: seconds(case) for case in NEEDED}, MISSES)
    assert costs.base_s == tuple((rows, pytest.approx(value, rel=1e-3)) for rows, value in COSTS.base_s)
    assert costs.prompt_token_s == pytest.approx(COSTS.prompt_token_s, rel=1e-3)
    assert costs.adapter_s == pytest.approx(COSTS.adapter_s, rel=1e-3)
    assert (costs.upload_s, costs.read_s, costs.adapter_bytes, costs.drag) == (0.02, 0.1, 1e7, 0.5)
    assert ratios == {case: pytest.approx(1, abs=2e-3) for case in NEEDED}


def test_a_case_that_is_off_is_told() -> None:
    times = {case: seconds(case) for case in NEEDED}
    times[32, 32, 64, 64] *= 1.3
    _, ratios = fit(times, MISSES)
    assert ratios[32, 32, 64, 64] < 0.95
    del times[8, 8, 64, 64]
    with pytest.raises(CostsError, match=r"\(8, 8, 64, 64\)"):
        fit(times, MISSES)


def test_a_step_between_and_beyond_what_was_measured() -> None:
    table = COSTS.base_table(40)
    assert len(table) == 41
    assert [table[n] for n in (0, 1, 8, 20, 32, 40)] == pytest.approx([0.004, 0.005, 0.012, 0.018, 0.024, 0.028])


def test_capacity_is_that_of_full_steps() -> None:
    # 32 requests of 10 tokens in and 20 out: 20 steps of 24 ms and 32 adapters at 0.7 ms, and 320 tokens at 0.6 ms.
    whole = 20 * (0.024 + 32 * 0.0007) + 320 * 0.0006
    assert COSTS.capacity(rows=32, slots=64, prompt_tokens=10, output_tokens=20) == pytest.approx(32 / whole)
    few = 20 * (0.024 + 4 * 0.0007) + 320 * 0.0006
    assert COSTS.capacity(rows=32, slots=4, prompt_tokens=10, output_tokens=20) == pytest.approx(32 / few)


def test_costs_from_json() -> None:
    changed = Costs.of({"read_s": 2, "base_s": [[1, 0.1], [4, 0.2]]}, COSTS)
    assert (changed.read_s, changed.base_s, changed.upload_s) == (2, ((1, 0.1), (4, 0.2)), 0.02)
    for given, what in (
        ({"reads_s": 1}, "reads_s"),
        ({"read_s": -1}, "read_s"),
        ({"read_s": float("nan")}, "read_s"),
        ({"base_s": [[8, 0.1], [1, 0.2]]}, "base_s"),
        ({"base_s": [[1, 0.1]]}, "base_s"),
        ({"base_s": 3}, "costs"),
    ):
        with pytest.raises(CostsError, match=what):
            Costs.of(given, COSTS)


def test_the_last_calibration_counts(tmp_path: Path) -> None:
    path = tmp_path / "replica_costs.jsonl"
    with pytest.raises(CostsError, match="scale_calibrate"):
        last_measured(path)
    fields = {"base_s": [[1, 0.1], [8, 0.2]], "prompt_token_s": 1, "adapter_s": 2, "upload_s": 3, "adapter_bytes": 5}
    lines = [{"run": run, "costs": {**fields, "read_s": i}} for i, run in enumerate(("first", "second"))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    costs, run = last_measured(path)
    assert (run, costs.read_s) == ("second", 1)


def test_the_kept_calibration_can_be_used() -> None:
    costs, _ = last_measured()
    assert costs.capacity(rows=32, slots=32, prompt_tokens=64, output_tokens=32) > 0
