"""Queued kernels: the same bits as one by one, though results share memory and threads share out parts."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from manylora.kernels.cpu import available
from manylora.kernels.ops import Ops
from tests.kernels.test_cpu_ops import activations, nf4

pytestmark = pytest.mark.skipif(not available(), reason="no AVX2 and FMA here")

LAYERS = 40


@pytest.fixture(scope="module")
def ops() -> Ops:
    from manylora.kernels.cpu.ops import NumbaOps

    return NumbaOps()


@pytest.fixture(scope="module")
def layer(ops: Ops) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """A block of norm, biased linear, norm of some heads, SiLU, and a biased linear into the residual stream."""
    up = ops.prepare_linear([nf4(256, 64, seed=1)], activations(1, 256)[0])
    down = ops.prepare_linear([nf4(64, 128, seed=2)], 0.1 * activations(1, 64, seed=4)[0])
    norms = [0.1 * activations(1, 64, seed=i)[0] for i in range(LAYERS)]
    head = activations(1, 32, seed=9)[0]

    def compute(x: torch.Tensor, i: int) -> torch.Tensor:
        y = ops.linear(ops.rms_norm(x, norms[i], 1e-5), up)
        ops.head_norm_(y[:, 64:128], head, 1e-5)
        return ops.linear(ops.silu_mul(y), down, add_to=x)

    return compute


def one_by_one(layer: Callable[[torch.Tensor, int], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    for i in range(LAYERS):
        x = layer(x, i)
    return x


def together(ops: Ops, layer: Callable[[torch.Tensor, int], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    with ops.together():
        for i in range(LAYERS):
            with ops.together():
                x = layer(x, i)
    return x


@pytest.mark.parametrize("threads", [1, 3])
def test_a_kernel_that_follows_runs_part_by_part(threads: int) -> None:
    """Each part of the second adds to what that part of the first has just left; the third waits for both."""
    from manylora.kernels.cpu.elementwise import put_bias
    from manylora.kernels.cpu.threads import launch, launch_again, queued

    calls: list[tuple[str, int, int]] = []
    lock = threading.Lock()
    begun = threading.Barrier(threads)

    def noted(name: str) -> Callable[[int, int, int], None]:
        def kernel(_: int, part: int, parts: int) -> None:
            if name == "first" and parts > 1 and part < threads:
                begun.wait(10)  # all threads are within the first kernel: none has it for itself
            with lock:
                calls.append((name, part, threading.get_ident()))

        return kernel

    class Noted:
        def __init__(self, name: str) -> None:
            self.callback = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(noted(name))
            self.address = ctypes.cast(self.callback, ctypes.c_void_p).value

    first, second, third = Noted("first"), Noted("second"), Noted("third")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with queued():
            arguments = launch(first, 0)  # type: ignore[arg-type]
            launch_again(second, arguments, follows=True)  # type: ignore[arg-type]
            launch_again(third, arguments)  # type: ignore[arg-type]
        last = len([name for name, _, _ in calls if name != "third"])
        assert {name for name, _, _ in calls[last:]} == {"third"}
        for thread in {thread for _, _, thread in calls}:
            own = [(name, part) for name, part, of in calls[:last] if of == thread]
            assert own[1::2] == [("second", part) for _, part in own[::2]]
        counts = {name: sorted(part for one, part, _ in calls if one == name) for name in ("first", "second", "third")}
        assert counts["first"] == counts["second"] == counts["third"] == list(range(len(counts["first"])))
        calls.clear()
        launch(second, 0, follows=True)  # type: ignore[arg-type] # nothing is queued that it could follow
        assert sorted(part for _, part, _ in calls) == counts["second"]
        put_bias(torch.zeros(16), torch.zeros(1, 16), add=False)  # the queue is as it was
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 64, 3000])
def test_together_gives_the_same_bits(
    ops: Ops, layer: Callable[[torch.Tensor, int], torch.Tensor], rows: int, threads: int
) -> None:
    """3000 rows of 256 are more than a block of the scratch memory holds, and come between smaller ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = activations(rows, 64, seed=rows)
        expected = one_by_one(layer, x)
        assert torch.isfinite(expected).all()
        for _ in range(3):
            assert torch.equal(together(ops, layer, x), expected)
    finally:
        torch.set_num_threads(before)


def test_scratch_memory_is_a_threads_own(ops: Ops, layer: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    xs = [activations(16, 64, seed=seed) for seed in range(4)]
    expected = [one_by_one(layer, x) for x in xs]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(20):
            if not torch.equal(together(ops, layer, xs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_error_leaves_nothing_queued(ops: Ops, layer: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    x = activations(4, 64)
    untouched = x.clone()

    def fail() -> None:
        with ops.together():
            layer(x, 0)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    ops.flush()
    assert torch.equal(x, untouched)
    assert torch.equal(together(ops, layer, x), one_by_one(layer, x))


def test_head_norm_is_the_norm_of_each_head(ops: Ops) -> None:
    wide, weight = activations(5, 256), activations(1, 32, seed=3)[0]
    expected = wide.clone()
    for head in range(2, 5):
        columns = slice(32 * head, 32 * head + 32)
        expected[:, columns] = ops.rms_norm(wide[:, columns].contiguous(), weight, 1e-5)
    ops.head_norm_(wide[:, 64:160], weight, 1e-5)
    assert torch.equal(wide, expected)


@pytest.mark.parametrize(
    ("mapped", "found"),
    [
        (["/v/site/torch/lib/libgomp.so.1", "/v/site/sentencepiece.libs/libgomp-6a.so.1"], 0),
        (["/v/site/a.libs/libgomp-6a.so.1", "/v/site/torch.libs/libgomp-98.so.1"], 1),
        (["/usr/lib/libgomp.so.1", "/v/site/torch/lib/libgomp.so.1"], 1),
        (["/v/site/a.libs/libgomp-6a.so.1", "/usr/lib/libgomp.so.1"], 1),
        (["/v/site/a.libs/libgomp-6a.so.1"], None),
        ([], None),
    ],
)
def test_the_threads_are_torchs_own(mapped: list[str], found: int | None) -> None:
    from manylora.kernels.cpu.threads import torchs_libgomp

    maps = "".join(f"7f00-7f01 r-xp 00000000 08:01 42    {path}\n" for path in ["/usr/lib/libc.so.6", *mapped] * 2)
    assert torchs_libgomp(maps, Path("/v/site/torch")) == (None if found is None else mapped[found])


def test_single_threaded_is_for_this_thread_alone() -> None:
    """Neither for threads that compute already nor for those that begin meanwhile, and not for longer."""
    from manylora.kernels.cpu.threads import single_threaded

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        go_on, seen = threading.Event(), []

        def other(wait: bool) -> None:
            counts = [torch.get_num_threads()]
            if wait:
                running.set()
                assert go_on.wait(30)
                counts.append(torch.get_num_threads())
            seen.append(counts)

        running = threading.Event()
        old = threading.Thread(target=other, args=(True,))
        old.start()
        assert running.wait(30)
        with single_threaded():
            inside = torch.get_num_threads()
            new = threading.Thread(target=other, args=(False,))
            new.start()
            new.join(30)
            go_on.set()
            old.join(30)
        assert (inside, torch.get_num_threads()) == (1, 2)
        assert seen == [[2], [2, 2]]
    finally:
        torch.set_num_threads(before)
