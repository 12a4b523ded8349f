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
SLOTS, RANK = 4, 64
SIZES = [
    *("--device", "cpu", "--max-context", "1024", "--kv-memory", "384MiB", "--max-device-adapters", str(SLOTS)),
    *("--max-rank", str(RANK), "--host-memory", "256MiB", "--max-rows", "8"),
]


def planned(*flags: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(MANYLORA), "plan", *SIZES, "--rank", str(RANK), "--json", *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_process_takes_what_was_planned(base_cache: Path, tmp_path: Path) -> None:
    """When it has started: the base and the process itself. When every KV page was written and every slot filled: those
    too. Linux counts what was written, so both are seen."""
    plan = planned("--adapters", str(SLOTS))
    flags = ["--served-model-name", BASE, "--cache-dir", str(base_cache), "--port", "0", "--state-dir", "none"]
    # The first start quantises, and what that took stays with the process: it is the second that is measured.
    with serving(tmp_path / "first.log", *SIZES, *flags):
        pass
    with serving(tmp_path / "server.log", *SIZES, *flags, "--adapter-root", str(tmp_path)) as server:
        with server.client() as client:
            assert complete(client, greedy(BASE, "Once", 4)).status == 200
            started = server.rss()
            at_start = plan["bytes"]["base"] + plan["bytes"]["process"]
            print(f"at the start: planned {at_start / MIB:.0f} MiB, {started / MIB:.0f} in memory")
            assert at_start == pytest.approx(started, rel=WITHIN)

            for i in range(plan["sizes"]["kv_tokens"] // 1000 + 2):  # no two begin alike, so nothing is shared
                answer = complete(client, greedy(BASE, f"{i} " + "word " * 1000, 2))
                assert answer.status == 200, answer.body
            with_kv = server.rss()
            grown = with_kv - started
            print(f"keys and values: planned {plan['bytes']['kv'] / MIB:.0f} MiB, {grown / MIB:.0f} more in memory")
            assert plan["bytes"]["kv"] + plan["bytes"]["scratch"] == pytest.approx(grown, rel=WITHIN)
    log = server.log_text()
    assert "plan: " in log
    for part, nbytes in plan["bytes"].items():
        if part not in ("tables", "total"):  # what is free when it is planned decides
            assert f"{nbytes / MIB:.1f} MiB" in log, part
