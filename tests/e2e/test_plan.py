"""What ``manylora plan`` says of a server, beside what its process then has in memory."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server_process import BASE, MANYLORA, complete, greedy, serving

pytestmark = pytest.mark.timeout(900)

MIB = 1 << 20
WITHIN = 0.05
SIZES = [
    *("--device", "cpu", "--max-context", "1024", "--kv-memory", "192MiB", "--max-device-adapters", "4"),
    *("--max-rank", "64", "--host-memory", "256MiB", "--max-rows", "8"),
]


def planned() -> dict[str, Any]:
    command = [str(MANYLORA), "plan", *SIZES, "--adapters", "4", "--rank", "64", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_process_takes_what_was_planned(base_cache: Path, tmp_path: Path) -> None:
    """When it has started: the base and the process itself. When every KV page was written: those too. Linux counts
    what was written, so both are seen."""
    plan = planned()
    flags = ["--served-model-name", BASE, "--cache-dir", str(base_cache), "--port", "0", "--state-dir", "none"]
    # The first start quantises, and what that took stays with the process: it is the second that is measured.
    with serving(tmp_path / "first.log", *SIZES, *flags):
        pass
    with serving(tmp_path / "server.log", *SIZES, *flags) as server, server.client() as client:
        assert complete(client, greedy(BASE, "Once", 4)).status == 200
        started = server.rss()
        at_start = plan["bytes"]["base"] + plan["bytes"]["process"]
        print(f"at the start: planned {at_start / MIB:.0f} MiB, {started / MIB:.0f} in memory")
        assert at_start == pytest.approx(started, rel=WITHIN)

        for i in range(plan["sizes"]["kv_tokens"] // 1000 + 2):  # no two begin alike, so nothing is shared
            answer = complete(client, greedy(BASE, f"{i} " + "word " * 1000, 2))
            assert answer.status == 200, answer.body
        grown = server.rss() - started
        kv, scratch = plan["bytes"]["kv"], plan["bytes"]["scratch"]
        print(f"keys and values: planned {kv / MIB:.0f} MiB, {grown / MIB:.0f} more in memory")
        # These prompts came one at a time, so that not all of the scratch memory was needed.
        assert kv * (1 - WITHIN) <= grown <= (kv + scratch) * (1 + WITHIN)
    log = server.log_text()
    for part in ("base", "kv", "slots", "scratch", "host", "process"):
        assert f"plan:   {part:<8} {plan['bytes'][part] / MIB:>6.1f} MiB" in log, part
