"""The machine that the load came from, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from loadgen.generator_health import machine_load


def machine() -> dict[str, Any]:
    """Cores, processor, system, Python; and the load at the end, as others may have run beside."""
    load = machine_load()
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_a_core": None if load is None else round(load, 2),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
