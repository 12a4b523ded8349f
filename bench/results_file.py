"""Where a benchmark keeps what it measured: one JSON line a result, appended, each with its run and machine."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ResultsFile:
    """``bench/results/<name>.jsonl``. ``shared``: what all results of this run have in common; ``note`` if given."""

    def __init__(self, name: str, *, note: str = "", **shared: Any) -> None:
        self._path = Path(__file__).parent / "results" / f"{name}.jsonl"
        self._run = {
            "run": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "machine": f"{os.cpu_count()} cores, {processor()}",
            **shared,
        }
        self._note = {"note": note} if note else {}

    def keep(self, result: Mapping[str, Any]) -> None:
        """Append it at once: a run that is cut off keeps what it has."""
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({**self._run, **result, **self._note}) + "\n")


def processor() -> str:
    """The processor and the vector extensions that decide which kernels run."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    model = next((row.split(":", 1)[1].strip() for row in text.splitlines() if row.startswith("model name")), "")
    flags = next((row.split(":", 1)[1].split() for row in text.splitlines() if row.startswith("flags")), [])
    return " ".join([model, *(flag for flag in ("avx2", "avx512f", "avx512_bf16") if flag in flags)])
