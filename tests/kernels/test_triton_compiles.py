"""The Triton kernels compile ahead of time for the GPUs they are meant for; no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from manylora.kernels import lora_triton as m

POINTERS = {"p_rows": "*i32", "p_block_slot": "*i32", "p_block_first": "*i32", "p_block_last": "*i32",
            "p_table": "*i32", "p_ranks": "*i32", "p_scales": "*fp32", "p_scaling": "*fp32", "p_h": "*fp32"}
for capability in (80, 90):
    for dtype, wide in (("bf16", False), ("fp16", False), ("fp32", True)):
        for kernel, sizes in (
            (m.shrink_kernel, {"BM": m.BM, "BK": m.BK}),
            (m.expand_kernel, {"BM": m.BM, "BN": m.BN}),
        ):
            constants = {**sizes, "SPLITS": m.SPLITS, "WIDE": wide}
            signature = {
                name: "constexpr" if name in constants
                else POINTERS.get(name, "*" + dtype if name.startswith("p_") else "i32")
                for name in kernel.arg_names
            }
            source = ASTSource(kernel, signature=signature, constexprs={(kernel.arg_names.index(k),): v
                                                                        for k, v in constants.items()})
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            ptx = compiled.asm["ptx"]
            uses_matrix_unit = "mma" in ptx
            print(capability, dtype, kernel.__name__, len(compiled.asm["cubin"]), uses_matrix_unit)
            assert wide or uses_matrix_unit, (capability, dtype, kernel.__name__)
"""


def test_compiles_for_sm80_and_sm90() -> None:
    """In a process of its own: this one may have imported triton for its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == 12
