"""The soak as its users start it, for half a minute: it passes, and what it says is what it did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_a_minute_of_everything(tmp_path: Path, base_cache: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-P", str(ROOT / "loadtest" / "soak.py"), "--minutes", "0.5", "--versions", "1"]
    command += ["--admin-pause", "1", "--out", str(out), "--server-flags", f"--cache-dir '{base_cache}'"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert found["passed"]
    assert found["problems"] == []
    assert found["checked"] > 5
    assert found["wrong_version_answers"] == 0
    assert found["done"]["wrong requests"] > 5
    assert sum(found["done"][kind] for kind in ("loads", "replacements")) >= 2
    assert not [status for status in found["statuses"] if int(status) >= 500]
    assert found["exit_code"] == 0
    assert "integrity check passed" in found["integrity"]
    assert (out / "failures.jsonl").read_text() == ""
    assert len((out / "vitals.jsonl").read_text().splitlines()) >= 10
    assert "passed" in done.stdout


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(ROOT / "loadtest" / "soak.py"), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--server-flags=--no-such-flag"], capture_output=True, text=True, timeout=250)
    assert done.returncode == 3
    assert "--no-such-flag" in done.stderr
