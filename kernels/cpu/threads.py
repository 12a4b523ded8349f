"""Running a numba kernel on the OpenMP threads that torch already has.

torch ships its own libgomp. A second thread pool beside it (numba's ``parallel=True``) would fight it for the cores:
idle OpenMP threads spin. So a kernel here is a C callback handed to ``GOMP_parallel`` of *that* library, the call that
a compiler makes for ``#pragma omp parallel``. ``GOMP_parallel`` is libgomp's stable ABI though not torch's API, so
``launch`` falls back to running the parts one after another where the library is not found: slower, the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

logger = logging.getLogger(__name__)


def _cache_dir() -> Path:
    """Where compiled kernels are kept: a folder named after their sources.

    numba looks only at the file a kernel stands in, not at the files it takes inner loops from; a change in one of
    those would otherwise be served a stale kernel.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "manylora" / "kernels" / digest.hexdigest()[:16]


if not os.environ.get("NUMBA_CACHE_DIR"):
    numba.config.CACHE_DIR = str(_cache_dir())

KERNEL = types.void(types.CPointer(types.int64), types.int64, types.int64)
"""A kernel: ``(arguments, part, parts)``; arguments are int64 values or addresses, ``part`` says which share to do."""


def _find_libgomp() -> ctypes.CDLL | None:
    """torch's own libgomp, found by what is mapped into this process; never a second one."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps if "libgomp" in line}
    # Loading torch maps one libgomp; with several (another package's came along) torch's is the one in its folder.
    inside = [path for path in paths if str(Path(torch.__file__).parent.parent) in path]
    for path in inside or sorted(paths):
        return ctypes.CDLL(path)
    return None


_libgomp = _find_libgomp()
if _libgomp is not None:
    for _name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
        llvm.add_symbol(_name, ctypes.cast(getattr(_libgomp, _name), ctypes.c_void_p).value)
    _omp_get_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
    _omp_get_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
    barrier = types.ExternalFunction("GOMP_barrier", types.void())
    """All parts of the running kernel meet here; called by every part or by none, and only if there are several."""
else:

    @njit(nogil=True)
    def barrier() -> None:
        """Kernels run in one part here: there is nobody to wait for."""


@intrinsic
def _call_kernel(typingctx, kernel, arguments, part, parts):
    """Call the kernel at address ``kernel``."""

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        i64 = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [i64, i64, i64])
        b.call(b.inttoptr(args[0], function.as_pointer()), list(args[1:]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def _run_alone(program):
    for i in range(program[0]):
        _call_kernel(program[1 + 2 * i], program[2 + 2 * i], 0, 1)


if _libgomp is not None:

    @cfunc(types.void(types.CPointer(types.int64)), cache=True)
    def _team_member(program):
        part, parts = np.int64(_omp_get_thread_num()), np.int64(_omp_get_num_threads())
        for i in range(program[0]):
            if i > 0 and parts > 1:
                barrier()
            _call_kernel(program[1 + 2 * i], program[2 + 2 * i], part, parts)

    _gomp_parallel = _libgomp.GOMP_parallel
    _gomp_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    _gomp_parallel.restype = None
    _team_member_address = _team_member.address
else:
    logger.warning("torch's libgomp was not found: CPU kernels run on one thread")


class _Queue(threading.local):
    """What this thread has queued: kernels with their arguments, and what must stay alive until they have run."""

    def __init__(self) -> None:
        self.depth = 0
        self.kernels: list[int] = []
        self.alive: list[object] = []


_queue = _Queue()


def launch(kernel: Any, *arguments: int, keep: Sequence[torch.Tensor] = (), parallel: bool = True) -> None:
    """Run a ``cfunc`` of signature ``KERNEL``, split over torch's threads; returns when all parts are done.

    ``arguments`` are ints (values or addresses). ``parallel=False`` runs a small job here, without waking anyone.
    The result does not depend on the number of parts: a kernel gives each part outputs of its own.

    Within ``queued()`` the kernel runs later, at the latest when that ends; ``keep`` are the tensors behind the
    addresses, which are kept until then.
    """
    packed = (ctypes.c_int64 * len(arguments))(*arguments)
    _queue.kernels += (kernel.address, ctypes.addressof(packed))
    _queue.alive += (packed, *keep)
    if _queue.depth == 0:
        flush(parallel=parallel)


def flush(*, parallel: bool = True) -> None:
    """Run what this thread has queued, in order, each kernel after the one before has ended on all threads."""
    kernels, alive = _queue.kernels, _queue.alive
    if not kernels:
        return
    _queue.kernels, _queue.alive = [], []
    program = (ctypes.c_int64 * (1 + len(kernels)))(len(kernels) // 2, *kernels)
    threads = torch.get_num_threads() if parallel and _libgomp is not None else 1
    if threads > 1:
        _gomp_parallel(_team_member_address, program, threads, 0)
    else:
        _run_alone.ctypes(program)
    del alive


@contextlib.contextmanager
def queued() -> Iterator[None]:
    """Queue this thread's kernels and run them together: the threads are woken once, and Python's lock is given away
    once, for many kernels. Nothing may look at a kernel's output before ``flush`` or the end."""
    _queue.depth += 1
    try:
        yield
    except BaseException:
        _queue.kernels, _queue.alive = [], []
        raise
    finally:
        _queue.depth -= 1
    if _queue.depth == 0:
        flush()
