"""CPU kernels, compiled by numba on the user's machine: no C++, no compiler to install.

There is a variant for each kind of processor; one that runs none of them computes in torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from manylora.kernels.ops import Ops


Arithmetic = Literal["int16", "int8", "fp32"]
"""How NF4 weights are multiplied. ``int16``: both sides as integers, off by 1e-4 of a product (``nf4_inner``);
``int8``: the same of 8 bits, off by 0.65 percent but for a few large inputs that are exact, and fastest
(``nf4_bytes``); ``fp32``: as they are (``nf4_exact``), which takes longer."""


@dataclass(frozen=True)
class Variant:
    """Kernels for one kind of processor. ``features``: what it must have, by LLVM's names; ``make_ops`` imports what
    they are made of, and gives the operations (nothing is compiled before it is used, or ``compiling.compile_all``).

    Every variant gives the same bits: a wider one computes more outputs at once, each by the same chain of operations.
    """

    name: str
    features: tuple[str, ...]
    make_ops: Callable[[Arithmetic], Ops]


def _numba_ops(arithmetic: Arithmetic) -> Ops:
    from manylora.kernels.cpu.ops import NumbaOps  # numba, which need not be there

    return NumbaOps(arithmetic)


VARIANTS: Final = (
    Variant("avx512", ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"), _numba_ops),
    Variant("avx2", ("avx2", "fma"), _numba_ops),
)
"""Fastest first."""

_in_use: Variant | None = None


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


def choose(variant: Variant) -> None:
    """Fix the variant of this process. Raises RuntimeError if it has another already: the modules with kernels are made
    for one as they are imported."""
    global _in_use
    if _in_use is not None and _in_use != variant:
        raise RuntimeError(f"the CPU kernels of this process are {_in_use.name}'s already, not {variant.name}'s")
    _in_use = variant


def in_use() -> Variant:
    """This process's variant: the chosen one; if none was, the fastest that the machine can run, from now on.

    Raises RuntimeError if it can run none.
    """
    if _in_use is None:
        variant = best()
        if variant is None:
            raise RuntimeError("; ".join(f"no CPU kernels {one.name}: {missing(one)}" for one in VARIANTS))
        choose(variant)
    assert _in_use is not None
    return _in_use


def host_has(feature: str) -> bool:
    """Whether this processor has a feature, by LLVM's name."""
    return feature in _host_features()


def available() -> bool:
    """Whether this machine can run any."""
    return best() is not None
