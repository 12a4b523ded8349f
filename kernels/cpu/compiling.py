"""Kernels as they are compiled: once for a version of their sources, kept on the disk, all of them before serving."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numba
from numba import cfunc, types

from manylora.kernels.cpu import in_use


def _cache_dir() -> Path:
    """Where compiled kernels are kept: a folder named after their sources, in it one for each variant.

    numba looks only at the file a kernel stands in, not at the files it takes inner loops from; a change in one of
    those would otherwise be served a stale kernel, or another variant's. It does look at the processor.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    named = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(named) if named else Path(root) / "manylora" / "kernels"
    return folder / digest.hexdigest()[:16] / in_use().name


numba.config.CACHE_DIR = str(_cache_dir())

KERNEL = types.void(types.CPointer(types.int64), types.int64, types.int64)
"""A kernel: ``(arguments, part, parts)``; arguments are int64 values or addresses, ``part`` says which share to do."""

PROGRAM = types.void(types.CPointer(types.int64))
"""What runs kernels, see ``threads``."""


class Compiled:
    """A function of fixed signature, compiled or fetched from the cache when its address is first asked for."""

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self.name, self._function, self._signature = function.__name__, function, signature

    @cached_property
    def _compiled(self) -> Any:
        return cfunc(self._signature, cache=True)(self._function)

    @property
    def is_compiled(self) -> bool:
        return "_compiled" in self.__dict__

    @property
    def was_cached(self) -> bool:
        return bool(self._compiled.cache_hits)

    @cached_property
    def address(self) -> int:
        """Of the machine code, by the C calling convention."""
        return int(self._compiled.address)

    def __call__(self, *arguments: Any) -> None:
        self._compiled.ctypes(*arguments)


_MODULES: Final = (
    "threads", "elementwise", "nf4_linear", "nf4_bytes", "nf4_exact", "bf16_linear", "head_words", "head_bytes",
    "attention", "lora", "lora_tables", "lora_vectors", "maxima",
)  # fmt: skip
"""Where there are kernels."""

_registered: list[Compiled] = []


def kernel(function: Callable[..., Any]) -> Compiled:
    """A kernel of signature ``KERNEL``, one of those that ``compile_all`` compiles."""
    return _register(function, KERNEL)


def program(function: Callable[..., Any]) -> Compiled:
    """The same for ``PROGRAM``."""
    return _register(function, PROGRAM)


def _register(function: Callable[..., Any], signature: Any) -> Compiled:
    made = Compiled(function, signature)
    _registered.append(made)
    return made


def all_kernels() -> tuple[Compiled, ...]:
    """Every kernel there is, compiled or not."""
    for name in _MODULES:
        importlib.import_module(f"manylora.kernels.cpu.{name}")
    return tuple(_registered)


def compile_all(each: Callable[[], None] = lambda: None) -> int:
    """Compile what is not yet, calling ``each`` after every kernel: nothing is left to be compiled while serving.
    How many were not in the cache."""
    fresh = 0
    for one in all_kernels():
        fresh += not one.was_cached
        each()
    return fresh
