"""The CPU kernels' self-test: quiet where they are right, and it names the one that is not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from manylora.kernels.cpu import Arithmetic, available
from manylora.kernels.ops import AttentionShape, Ops
from manylora.server.model.synthetic import synthetic_spec

if not available():
    pytest.skip("no AVX2 and FMA here", allow_module_level=True)

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from manylora.kernels.cpu import attention, bf16_linear, compiling, elementwise, lora, lora_vectors, nf4_linear
from manylora.kernels.cpu.compiling import KERNEL, Compiled
from manylora.kernels.cpu.ops import NumbaOps
from manylora.kernels.cpu.self_test import Fault, ModelShapes, self_test
from manylora.kernels.cpu.threads import _call_kernel, flush

SMOL = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip


def shapes(name: str = "tiny", window: int = 0, **changes: Any) -> ModelShapes:
    spec = synthetic_spec(name, **changes)
    features = spec.lora_shapes().in_features
    linears = tuple((k, 64) for k in sorted({features[p] for p in ("q", "o", "down")}))
    return ModelShapes(
        spec.lora_shapes(), linears, (AttentionShape(spec.n_heads, spec.n_kv_heads, spec.head_dim, window),)
    )


@pytest.fixture(scope="module")
def ops() -> Ops:
    compiling.compile_all()
    return NumbaOps()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "tested", [shapes(), shapes(window=5), shapes("tiny", **SMOL), shapes("llama-3.1-8b")],
    ids=["tiny", "window", "smol", "8b"],
)  # fmt: skip
def test_right_kernels_pass(ops: Ops, tested: ModelShapes, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert self_test(ops, tested) == []
    finally:
        torch.set_num_threads(before)


def test_it_is_quick(ops: Ops) -> None:
    """0.4 s in a slow phase of the machine. On one thread: threads that wait for each other beside other work take
    processor time, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        self_test(ops, shapes("tiny", **SMOL))
        began = time.process_time()
        self_test(ops, shapes("tiny", **SMOL))
        assert time.process_time() - began < 3.0
    finally:
        torch.set_num_threads(before)


@cfunc(KERNEL)
def _nothing(arguments: Any, part: int, parts: int) -> None:
    pass


def _all_but_one_part(address: int) -> Any:
    """A kernel that leaves out the last part, as one does whose threads are miscounted."""

    @cfunc(KERNEL)
    def broken(arguments, part, parts):  # type: ignore[no-untyped-def]
        if part + 1 < parts:
            _call_kernel(address, _address(arguments), part, parts)

    return broken


@intrinsic
def _address(typingctx: Any, pointer: Any) -> Any:
    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return b.ptrtoint(args[0], ir.IntType(64))

    return types.int64(types.CPointer(types.int64)), codegen


KERNELS = [one for one in compiling.all_kernels() if one.name not in ("_run_alone", "_team_member")]
NAMED = {
    "quantise_kernel": "NF4 linear", "_nf4_kernel": "NF4 linear", "_exact_nf4_kernel": "NF4 linear",
    "_quantise_bytes_kernel": "NF4 linear", "_nf4_bytes_kernel": "NF4 linear",
    "_bf16_kernel": "bf16 linear", "_bias_kernel": "NF4 linear", "_rms_norm_kernel": "RMS",
    "_gelu_mul_kernel": "GELU", "_gelu_kernel": "GELU",
    "_layer_norm_kernel": "layer norm", "_softcap_kernel": "soft cap", "_add_kernel": "sum of two",
    "_silu_mul_kernel": "SiLU", "_store_kernel": "attention", "_attend_kernel": "attention",
    "_shrink_kernel": "adapters at", "_expand_kernel": "adapters at", "_set_aside_kernel": "adapters at",
    "_take_products_kernel": "adapters at", "_add_vectors_kernel": "adapters at", "_fp32_kernel": "replaced logits",
    "_gather_kernel": "embedding", "_head_kernel": "embedding and logits",
    "_head_bytes_kernel": "embedding and logits", "_quantise_rotated_kernel": "embedding and logits",
    "_maxima_kernel": "largest logits",
}  # fmt: skip
"""How the self-test calls what each kernel does."""


def test_every_kernel_is_known_here() -> None:
    assert {one.name for one in KERNELS} == set(NAMED)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda one: one.name)
@pytest.mark.parametrize("fault", ["nothing", "all but one part"])
def test_a_broken_kernel_is_named(ops: Ops, kernel: Compiled, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = _nothing if fault == "nothing" else _all_but_one_part(kernel.address)
    monkeypatch.setitem(kernel.__dict__, "address", broken.address)
    named: dict[str, Arithmetic] = {
        "_exact_nf4_kernel": "fp32", "_quantise_bytes_kernel": "int8", "_nf4_bytes_kernel": "int8",
        "_head_bytes_kernel": "int8", "_quantise_rotated_kernel": "int8",
    }  # fmt: skip
    arithmetic = named.get(kernel.name, "int16")
    faults = self_test(NumbaOps(arithmetic), shapes("tiny", **SMOL), arithmetic)
    assert any(NAMED[kernel.name] in one.kernel for one in faults), faults
    assert all("differ from torch's" in one.problem or "other bits" in one.problem for one in faults)


def _scaled(original: Callable[..., Any], place: int, factor: float) -> Callable[..., Any]:
    """The kernel's call, and then ``factor`` times what it wrote."""

    def call(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        flush()
        arguments[place].mul_(factor)
        return result

    return call


@pytest.mark.parametrize(
    ("module", "name", "place", "factor", "named"),
    [
        (nf4_linear, "nf4_linear", 4, 1.001, "NF4 linear"),
        (bf16_linear, "bf16_linear", 2, 1.001, "bf16 linear"),
        (elementwise, "rms_norm", 3, 1.001, "RMS norm"),
        (elementwise, "silu_mul", 1, 1.001, "SiLU"),
        (elementwise, "put_bias", 1, 1.001, "NF4 linear"),
        (attention, "paged_attention", 1, 1.001, "attention"),
        (lora_vectors, "take_products", 3, 1.01, "adapters at"),
    ],
)
def test_a_little_too_much_is_seen(
    ops: Ops, module: Any, name: str, place: int, factor: float, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, _scaled(getattr(module, name), place, factor))
    faults = self_test(ops, shapes("tiny", **SMOL))
    assert any(one.kernel.startswith(named) for one in faults), faults


def test_an_exception_is_a_fault_too(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("no such instruction")

    monkeypatch.setattr(elementwise, "silu_mul", fail)
    assert self_test(ops, shapes()) == [Fault("SiLU", "OSError: no such instruction")]
    monkeypatch.undo()
    monkeypatch.setattr(lora.CpuLora, "add_", fail)
    assert {one.kernel.split("`")[0] for one in self_test(ops, shapes())} == {"adapters at "}
    monkeypatch.undo()
    assert self_test(ops, shapes()) == [], "nothing may be left queued"


def test_neighbours_that_change_a_rows_bits_are_seen(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right to within rounding, but summed in another order when there are many rows."""
    original = bf16_linear.bf16_linear

    def other_order(x: torch.Tensor, packed: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
        if x.shape[0] < 50:
            original(x, packed, out, accumulate=accumulate)
            return
        product = x @ bf16_linear.unpack_bf16(packed).T
        out.copy_(out + product if accumulate else product)

    monkeypatch.setattr(bf16_linear, "bf16_linear", other_order)
    faults = self_test(ops, shapes("tiny", **SMOL))
    assert faults
    assert all(one.problem == "rows have other bits alone than among others" for one in faults), faults
