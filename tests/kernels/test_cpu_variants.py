"""Every variant of the CPU kernels gives the same bits, and the wide one compiles to what it was written for.

A process has one variant, so each is computed in one of its own. The wide kernels run on any processor that has AVX2:
LLVM splits their vectors, and the one instruction that is asked for by name is put together from two (``_permute_16``).
That this is what the instruction does, and what they compile to on a processor that has it, is tested apart. None of
this has run on one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from manylora.kernels import cpu
from manylora.kernels.nf4_code import NF4_CODE
from tests.kernels.x86_listing import Loop, innermost_loops

if not cpu.available():
    pytest.skip("no AVX2 and FMA here", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
NAMES = [variant.name for variant in cpu.VARIANTS]
ELSEWHERE = ("skylake-avx512", "znver5")
"""For the first of these LLVM prefers vectors of 256 bits where it chooses the width."""
KERNELS = ("_nf4_kernel", "_attend_kernel")

slow = pytest.mark.slow


def start(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", str(HERE / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(running: Sequence[subprocess.Popen[str]]) -> None:
    for one in running:
        _, errors = one.communicate(timeout=280)
        assert one.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bits")
    finish([start("variant_bits.py", name, folder / name) for name in NAMES])
    return {name: torch.load(folder / name, weights_only=True) for name in NAMES}


@slow
def test_every_variant_passes_the_self_test(computed: dict[str, Any]) -> None:
    assert [found["variant"] for found in computed.values()] == NAMES
    for name, found in computed.items():
        assert len(found["faults"]) == 2
        assert not any(found["faults"].values()), (name, found["faults"])


@slow
def test_every_variant_gives_the_same_bits(computed: dict[str, Any]) -> None:
    wide, narrow = (computed[name]["results"] for name in ("avx512", "avx2"))
    assert wide.keys() == narrow.keys()
    assert len(wide) > 500
    assert all(torch.isfinite(result).all() for result in narrow.values())
    assert [what for what in wide if not torch.equal(wide[what], narrow[what])] == []


@slow
def test_no_number_of_threads_changes_them(computed: dict[str, Any]) -> None:
    for found in computed.values():
        results = found["results"]
        ones = [what for what in results if what.endswith("; 1 threads")]
        assert len(ones) == len(results) // 2
        assert all(torch.equal(results[one], results[one.replace("; 1 ", "; 3 ")]) for one in ones)


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Loop]]:
    """The innermost loops by processor and kernel, as numba compiles them there."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ELSEWHERE}
    finish([
        start("variant_assembly.py", "avx512", folder, *KERNELS,
              NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="+avx512f", NUMBA_CACHE_DIR=str(folder / "cache"))
        for name, folder in folders.items()
    ])  # fmt: skip
    return {
        (name, kernel): innermost_loops((folder / f"{kernel}.s").read_text(encoding="utf-8"))
        for name, folder in folders.items()
        for kernel in KERNELS
    }


PERMUTE = r"vperm(d|ps) .*%zmm"
"""``vpermd`` and ``vpermps`` move the same bits; LLVM takes either."""


@slow
@pytest.mark.parametrize("processor", ELSEWHERE)
def test_codes_are_looked_up_sixteen_at_once(loops: dict[tuple[str, str], list[Loop]], processor: str) -> None:
    """A weight takes a shift, a permute, a product with its scale, and an FMA a row, all for 16 at once."""
    decoding = [loop for loop in loops[processor, "_nf4_kernel"] if loop.count(PERMUTE)]
    fused = [loop for loop in decoding if loop.count("vfmadd")]
    rows = range(1, 5)
    expected = [(8 * 4 * r, 32, r) for r in rows] + [(8 * r, 8, r) for r in rows]  # four tiles at once, then one
    assert sorted((loop.count("vfmadd"), loop.count(PERMUTE)) for loop in fused) == sorted(e[:2] for e in expected)
    for fmas, permutes, r in expected:
        loop = next(one for one in fused if (one.count("vfmadd"), one.count(PERMUTE)) == (fmas, permutes))
        assert len(loop.instructions) <= fmas + 3 * permutes + 8 * r + 16
    panels = [loop for loop in decoding if loop not in fused]
    assert panels
    for loop in panels:
        assert loop.count(PERMUTE) == loop.count(r"vmov\w+ %zmm\d+, .*\(") > 0, "each goes to the panel"


@slow
@pytest.mark.parametrize("processor", ELSEWHERE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_products_use_whole_registers_and_spill_none(
    loops: dict[tuple[str, str], list[Loop]], processor: str, kernel: str
) -> None:
    # What stores its sums is a loop over groups or tiles, which LLVM has laid out around its inner one.
    storing = r"vmov\w+ %zmm\d+, -?\d*\((?!%rsp)"
    products = [loop for loop in loops[processor, kernel] if loop.count("vfmadd.*%zmm") and not loop.count(storing)]
    assert len(products) >= 13  # 8 micro-kernels for one tile, 5 and more for several
    assert max(loop.count("vfmadd") for loop in products) >= 16
    for loop in products:
        assert loop.count("vfmadd") == loop.count(r"vfmadd.*%zmm")
        assert not [one for one in loop.stack if re.search(r"%[xyz]mm", one)]
        assert len(loop.instructions) <= 3 * (loop.count("vfmadd") + loop.count(PERMUTE)) + 8


@slow
@pytest.mark.parametrize("processor", ELSEWHERE)
def test_the_softmax_takes_whole_registers(loops: dict[tuple[str, str], list[Loop]], processor: str) -> None:
    assert [loop for loop in loops[processor, "_attend_kernel"] if loop.count(r"vrndscaleps .*%zmm")]


def test_the_permute_is_what_the_wide_kernels_take_it_for() -> None:
    """LLVM knows what its intrinsic means: with constant arguments it computes the result. Bits of an index above the
    low four count for nothing."""
    from llvmlite import binding, ir

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    indices = [13, 0x7FFFFFF0, 5, 0, 15, 1 << 31 | 7, 2, 3, 0x1F, 8, 6, 9, 0xFFFFFFFE, 11, 12, 4]
    kind, integers = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
    module = ir.Module()
    permute = ir.Function(module, ir.FunctionType(kind, [kind, integers]), "llvm.x86.avx512.permvar.sf.512")
    function = ir.Function(module, ir.FunctionType(kind, []), "permuted")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(builder.call(permute, [ir.Constant(kind, list(NF4_CODE)), ir.Constant(integers, indices)]))
    parsed = binding.parse_assembly(str(module))
    machine = binding.Target.from_default_triple().create_target_machine(cpu="skylake-avx512")
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    (returned,) = re.findall(r"ret <16 x float> <(.*)>", str(parsed))
    assert [_value(one) for one in returned.split(",")] == [float(np.float32(NF4_CODE[i % 16])) for i in indices]


def _value(text: str) -> float:
    """A ``float`` constant as LLVM prints it: in decimal, or as the bits of the fp64 of the same value."""
    digits = text.split()[-1]
    if not digits.startswith("0x"):
        return float(np.float32(float(digits)))
    return float(np.frombuffer(bytes.fromhex(digits[2:].zfill(16)), ">f8")[0])


LISTING = """
one:
	movq	%rdi, %rax
.LBB0_1:
	xorl	%ecx, %ecx
.LBB0_2:                                # in the loop
	vmovups	(%rbp,%rcx), %zmm3
	vfmadd231ps	8(%rsp), %zmm3, %zmm1 # 64-byte Folded Reload
	incq	%rcx
	jne	.LBB0_2
	decq	%rax
	jne	.LBB0_1
	je	.LBB0_3
.LBB0_3:
	.p2align	4
	jmp	.LBB0_3
	retq
"""


def test_listings_are_read_as_they_are() -> None:
    inner, last = innermost_loops(LISTING)
    assert inner.instructions == (
        "vmovups (%rbp,%rcx), %zmm3", "vfmadd231ps 8(%rsp), %zmm3, %zmm1", "incq %rcx", "jne .LBB0_2",
    )  # fmt: skip
    assert inner.count(r"vfmadd.*%zmm") == 1
    assert inner.stack == ["vfmadd231ps 8(%rsp), %zmm3, %zmm1"], "rbp is a register like others"
    assert last.instructions == ("jmp .LBB0_3",)
