"""CPU kernels, compiled by numba on the user's machine: no C++, no compiler to install.

There is a variant for each kind of processor; one that runs none of them computes in torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from manylora.kernels.ops import Ops


@dataclass(frozen=True)
class Variant:
    """Kernels for one kind of processor. ``features``: what it must have, by LLVM's names; ``make_ops`` imports what
    they are made of, and gives the operations (nothing is compiled before it is used, or ``compiling.compile_all``)."""

    name: str
    features: tuple[str, ...]
    make_ops: Callable[[], Ops]


def _numba_ops() -> Ops:
    from manylora.kernels.cpu.ops import NumbaOps  # numba, which need not be there

    return NumbaOps()


VARIANTS: Final = (Variant("avx2", ("avx2", "fma"), _numba_ops),)
"""Fastest first."""


@cache
def _host_features() -> frozenset[str]:
    """What LLVM finds this processor to have; nothing without numba."""
    if importlib.util.find_spec("numba") is None:
        return frozenset()
    from llvmlite import binding

    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


def missing(variant: Variant) -> str | None:
    """Why this machine cannot run the variant; None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    lacking = [feature for feature in variant.features if feature not in _host_features()]
    return f"this processor has no {' and no '.join(lacking)}" if lacking else None


def best() -> Variant | None:
    """The fastest variant that this machine can run."""
    return next((variant for variant in VARIANTS if missing(variant) is None), None)


def available() -> bool:
    """Whether this machine can run any."""
    return best() is not None
