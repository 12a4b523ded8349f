from __future__ import annotations

import sys
from pathlib import Path

# The load test is scripts and their package `loadgen`, not part of the installed project.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "loadtest"))
