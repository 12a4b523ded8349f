"""CPU kernels, compiled by numba on the user's machine: no C++, no compiler to install."""

from __future__ import annotations

import importlib.util
import os
from functools import cache


@cache
def available() -> bool:
    """Whether this processor and installation can run them: x86-64 with AVX2 and FMA, numba installed.

    ``MANYLORA_CPU_KERNELS=0`` says no, for comparison with the torch path.
    """
    if os.environ.get("MANYLORA_CPU_KERNELS", "1") == "0" or importlib.util.find_spec("numba") is None:
        return False
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return bool(features.get("avx2") and features.get("fma"))
