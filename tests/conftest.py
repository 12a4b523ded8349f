"""Triton's kernels run in its interpreter here, unless a GPU is there. That is said before any test module is imported:
torch or transformers may import triton for one of them, and triton reads it once, when it is imported."""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
