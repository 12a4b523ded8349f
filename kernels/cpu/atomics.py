"""What threads that share a program need and numba does not offer: atomic counters, and how to wait for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_COUNTERS = types.CPointer(types.int64)
_I64 = ir.IntType(64)


@intrinsic
def fetch_add_one(typingctx, counters, index):
    """Add 1 to ``counters[index]`` and return what it was: no two threads get the same number.

    What this thread has written before is visible to whoever sees the new value by ``load_counter``.
    """

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        return b.atomic_rmw("add", b.gep(args[0], [args[1]]), ir.Constant(_I64, 1), "acq_rel")

    return types.int64(_COUNTERS, types.int64), codegen


@intrinsic
def load_counter(typingctx, counters, index):
    """``counters[index]``, read anew each time."""

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        return b.load_atomic(b.gep(args[0], [args[1]]), "acquire", 8)

    return types.int64(_COUNTERS, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a waiting loop: the other thread of its core gets the execution units."""

    def codegen(context: Any, b: Any, sig: Any, args: Sequence[Any]) -> Any:
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause")
        b.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen
