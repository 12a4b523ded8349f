"""Running a numba kernel on the OpenMP threads that torch already has.

torch ships its own libgomp. A second thread pool beside it (numba's ``parallel=True``) would fight it for the cores:
idle OpenMP threads spin. So a kernel here is a C callback handed to ``GOMP_parallel`` of *that* library, the call that
a compiler makes for ``#pragma omp parallel``. ``GOMP_parallel`` is libgomp's stable ABI though not torch's API, so
``launch`` falls back to running the parts one after another where the library is not found: slower, the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from manylora.kernels.cpu.atomics import fetch_add_one, load_counter, pause
from manylora.kernels.cpu.compiling import Compiled, program

logger = logging.getLogger(__name__)


def _find_libgomp() -> ctypes.CDLL | None:
    """torch's own libgomp, found by what is mapped into this process; never a second one."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    path = torchs_libgomp(maps, Path(torch.__file__).parent)
    return None if path is None else ctypes.CDLL(path)


def torchs_libgomp(maps: str, torch_folder: Path) -> str | None:
    """Which of the mapped files is the libgomp that torch computes with; None if there is none.

    Other packages bring one of their own (sentencepiece does), with threads of its own: were kernels run by those, they
    and torch's would wait for each other. torch's is in its folder, or beside it in ``torch.libs``, or the system's.
    """
    paths = sorted({line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libgomp" in line})
    own = [path for path in paths if path.startswith((f"{torch_folder}/", f"{torch_folder}.libs/"))]
    others = [path for path in paths if str(torch_folder.parent) not in path]
    return next(iter([*own, *others]), None)


_libgomp = _find_libgomp()

_SHARES = 2
"""Parts of a kernel for each thread. Who is done early takes another, so that a thread that was kept off its processor
(by the HTTP server's own thread, say) holds up the others by a part of a kernel at most."""
_FOLLOWS = -1
"""Instead of a kernel's next part."""
_SPINS = 1000
"""Rounds of waiting, some 20 microseconds, before a thread offers its processor to whoever else wants it."""


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """torch's operations on this thread use no other one: for long work beside the step loop. Threads that wait for
    each other while there are more of them than processors cost several times what they compute.

    ``torch.set_num_threads`` would do it for threads that begin meanwhile, too. Nothing happens without libgomp.
    """
    if _libgomp is None:
        yield
        return
    before = torch.get_num_threads()  # torch has set this thread's number by now, and does not do it again
    _libgomp.omp_set_num_threads(1)
    try:
        yield
    finally:
        _libgomp.omp_set_num_threads(before)


@intrinsic
def _call_kernel(typingctx, kernel, arguments, part, parts):
    """Call the kernel at address ``kernel``."""

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        i64 = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [i64, i64, i64])
        b.call(b.inttoptr(args[0], function.as_pointer()), list(args[1:]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


# A program is int64: the number of kernels, the parts that each is cut into, then for each kernel its address, the
# address of its arguments, the number of its next part (_FOLLOWS: it has none, its parts are run with those of the
# kernel before it), and how many parts are done.
@program
def _run_alone(program):
    for i in range(program[0]):
        _call_kernel(program[2 + 4 * i], program[3 + 4 * i], 0, 1)


if _libgomp is not None:
    llvm.add_symbol("sched_yield", ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value)
    _sched_yield = types.ExternalFunction("sched_yield", types.int32())

    @program
    def _team_member(program):
        """Take parts until none is left, wait for the others' to be done, go on to the next kernel.

        Not OpenMP's barrier: that waits for every thread, also for one that has nothing to do and is not even running;
        and with a second team in the process (torch made one while the model was loaded) it stops spinning almost at
        once, whatever GOMP_SPINCOUNT says, and each of some four hundred kernels a step then costs a wake-up.
        """
        kernels, parts = program[0], program[1]
        first = 0
        while first < kernels:
            after = first + 1
            while after < kernels and program[4 + 4 * after] == _FOLLOWS:
                after += 1
            part = fetch_add_one(program, 4 + 4 * first)
            while part < parts:
                for i in range(first, after):
                    _call_kernel(program[2 + 4 * i], program[3 + 4 * i], part, parts)
                fetch_add_one(program, 5 + 4 * first)
                part = fetch_add_one(program, 4 + 4 * first)
            spins = 0
            while after < kernels and load_counter(program, 5 + 4 * first) < parts:
                pause()
                spins += 1
                if spins > _SPINS:
                    _sched_yield()
            first = after

    _gomp_parallel = _libgomp.GOMP_parallel
    _gomp_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    _gomp_parallel.restype = None
else:
    logger.warning("torch's libgomp was not found: CPU kernels run on one thread")


Arguments = ctypes.Array[ctypes.c_int64]


class _Queue(threading.local):
    """What this thread has queued: kernels with their arguments, and what must stay alive until they have run."""

    def __init__(self) -> None:
        self.depth = 0
        self.kernels: list[int] = []
        self.alive: list[object] = []
        self.recordings: list[Recording] | None = None


class Recording:
    """Kernels that ran once, to be run again with the same arguments; it keeps the memory that they use."""

    def __init__(self, kernels: Sequence[int], alive: Sequence[object]) -> None:
        # Of the many views of a scratch block one is enough.
        storages = {t.untyped_storage().data_ptr(): t for t in alive if isinstance(t, torch.Tensor)}
        self._alive = [*storages.values(), *(one for one in alive if not isinstance(one, torch.Tensor))]
        self._program = (ctypes.c_int64 * (2 + len(kernels)))(len(kernels) // 4, 0, *kernels)
        self._fresh = bytes(self._program)

    def run(self) -> None:
        ctypes.memmove(self._program, self._fresh, len(self._fresh))  # the counters are zero again
        _run(self._program)


_queue = _Queue()


def launch(
    kernel: Compiled,
    *arguments: int,
    then: Compiled | None = None,
    keep: Sequence[torch.Tensor] = (),
    parallel: bool = True,
    follows: bool = False,
) -> Arguments:
    """Run a kernel, split over torch's threads; returns when all parts are done.

    ``arguments`` are ints (values or addresses). ``then`` is a second kernel for the same arguments, run after the
    first has ended everywhere. ``parallel=False`` runs a small job here, without waking anyone.
    The result does not depend on the number of parts: a kernel gives each part outputs of its own.

    Within ``queued()`` the kernel runs later, at the latest when that ends; ``keep`` are the tensors behind the
    addresses, which are kept until then.

    ``follows``: each part of the kernel is run right after that part of the kernel queued before it, by the same thread
    and without waiting for other parts: of what that kernel writes it may read its own part's alone, and it must write
    nothing that another part of that kernel reads. Returns the arguments, for ``launch_again``.
    """
    packed = (ctypes.c_int64 * len(arguments))(*arguments)
    _put(kernel, packed, keep, follows)
    if then is not None:
        _put(then, packed, (), False)
    if _queue.depth == 0:
        flush(parallel=parallel)
    return packed


def launch_again(
    kernel: Compiled, arguments: Arguments, *, keep: Sequence[torch.Tensor] = (), follows: bool = False
) -> None:
    """``launch`` with arguments that another kernel had: laying them out is most of what queueing costs."""
    _put(kernel, arguments, keep, follows)
    if _queue.depth == 0:
        flush()


def _put(kernel: Compiled, arguments: Arguments, keep: Sequence[torch.Tensor], follows: bool) -> None:
    first = _FOLLOWS if follows and _queue.kernels else 0
    _queue.kernels += (kernel.address, ctypes.addressof(arguments), first, 0)
    _queue.alive += (arguments, *keep)


def flush(*, parallel: bool = True) -> None:
    """Run what this thread has queued, in order, each kernel after the one before has ended on all threads."""
    kernels, alive = _queue.kernels, _queue.alive
    if not kernels:
        return
    _queue.kernels, _queue.alive = [], []
    _run((ctypes.c_int64 * (2 + len(kernels)))(len(kernels) // 4, 0, *kernels), parallel=parallel)
    if _queue.recordings is not None:
        _queue.recordings.append(Recording(kernels, alive))
    del alive


def _run(packed: ctypes.Array[ctypes.c_int64], *, parallel: bool = True) -> None:
    """Run a program, whose number of parts is filled in here."""
    threads = torch.get_num_threads() if parallel and _libgomp is not None else 1
    packed[1] = threads * _SHARES
    if threads > 1:
        _gomp_parallel(_team_member.address, packed, threads, 0)
    else:
        _run_alone(packed)


@contextlib.contextmanager
def recorded() -> Iterator[list[Recording]]:
    """What this thread runs within, each ``flush`` by itself. Not to be nested."""
    made: list[Recording] = []
    _queue.recordings = made
    try:
        yield made
    finally:
        _queue.recordings = None


@contextlib.contextmanager
def queued() -> Iterator[None]:
    """Queue this thread's kernels and run them together, at the end of the outermost such block: the threads are woken
    once, and Python's lock is given away once, for many kernels. Nothing may look at a kernel's output before that or
    ``flush``."""
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
