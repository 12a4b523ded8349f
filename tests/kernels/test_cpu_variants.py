"""Every variant of the CPU kernels gives the same bits, and the wide one compiles to what it was written for.

A process has one variant, so each is computed in one of its own. The wide kernels run on any processor that has AVX2:
LLVM splits their vectors, and the two instructions that are asked for by name are put together from two of 256 bits
(``nf4_inner._by_name``), a third one, ``vpdpbusd``, of others (``nf4_bytes._dot``). That this is what they do, and what
they compile to on a processor that has them, is tested apart.
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
from tests.kernels.x86_listing import Loop, innermost_loops

if not cpu.available():
    pytest.skip("no AVX2 and FMA here", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
NAMES = [variant.name for variant in cpu.VARIANTS]
ELSEWHERE = {"skylake-avx512": "avx512", "znver5": "avx512+avx512vnni"}
"""Processors, and what ``variant_assembly.py`` is told of them. For the first LLVM prefers vectors of 256 bits where it
chooses the width."""
KERNELS = ("_nf4_kernel", "_nf4_bytes_kernel", "_attend_kernel")

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
@pytest.mark.parametrize(("name", "feature"), [("avx512", "avx512vnni"), ("avx2", "avxvnni")])
def test_products_of_bytes_are_the_same_without_their_instruction(
    computed: dict[str, Any], name: str, feature: str, tmp_path: Path
) -> None:
    """With it where this processor has it; ``test_every_variant_gives_the_same_bits`` compares the variants."""
    finish([start("variant_bits.py", name, tmp_path / "bits", feature, NUMBA_CACHE_DIR=str(tmp_path))])
    without = torch.load(tmp_path / "bits", weights_only=True)["results"]
    assert len(without) > 100
    found = computed[name]["results"]
    assert [what for what in without if not torch.equal(without[what], found[f"{what}; 1 threads"])] == []


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
        start("variant_assembly.py", ELSEWHERE[name], folder, *KERNELS,
              NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="+avx512f", NUMBA_CACHE_DIR=str(folder / "cache"))
        for name, folder in folders.items()
    ])  # fmt: skip
    return {
        (name, kernel): innermost_loops((folder / f"{kernel}.s").read_text(encoding="utf-8"))
        for name, folder in folders.items()
        for kernel in KERNELS
    }


PRODUCTS = {"znver5": r"vpdpwssd .*%zmm", "skylake-avx512": r"vpmaddwd .*%zmm"}
"""Two products of int16 to a lane, added to an int32: where the processor does both at once (VNNI) LLVM says so."""


@slow
@pytest.mark.parametrize("processor", ELSEWHERE)
def test_integers_are_multiplied_in_whole_registers(loops: dict[tuple[str, str], list[Loop]], processor: str) -> None:
    """Eight positions of a tile take four look-ups and, for each row, four products; nothing is spilt."""
    product = PRODUCTS[processor]
    multiplying = [loop for loop in loops[processor, "_nf4_kernel"] if loop.count(r"vp(maddwd|dpwssd)")]
    for loop in multiplying:
        assert loop.count(r"vp(maddwd|dpwssd)") == loop.count(r"vp(maddwd|dpwssd) .*%zmm")
        assert not [one for one in loop.stack if re.search(r"%[xyz]mm", one)]
    fused = [loop for loop in multiplying if loop.count(r"vpshufb .*%zmm")]
    # LLVM unrolls a loop for few rows, and then may give its first product another form.
    assert {loop.count(product) for loop in fused} >= {4 * rows for rows in (5, 6, 7, 8)}
    assert not [loop for loop in multiplying if loop not in fused]
    for loop in multiplying:
        rows_of_eight = max(loop.count(r"vpshufb .*%zmm") // 4, 1)
        assert len(loop.instructions) <= 4 * loop.count(r"vp(maddwd|dpwssd)") + 20 * rows_of_eight


@slow
def test_bytes_are_multiplied_in_whole_registers(loops: dict[tuple[str, str], list[Loop]]) -> None:
    """A span of a tile takes eight products for each row, all of whose operands one register and constants address; of
    two tiles, a word is read once for both. Nothing is spilt."""
    multiplying = [loop for loop in loops["znver5", "_nf4_bytes_kernel"] if loop.count("vpdpbusd")]
    tile, pair = ([one for one in multiplying if one.count("vpshufb") == count] for count in (8, 16))
    assert len(tile) + len(pair) == len(multiplying)
    assert {loop.count(r"vpdpbusd .*%zmm") for loop in tile} == {8 * rows for rows in range(1, 13)}
    assert {loop.count(r"vpdpbusd .*%zmm") for loop in pair} == {16 * rows for rows in (5, 6)}
    for loop in multiplying:
        assert not loop.count("lea|mov[a-z]* %r|imul")
        assert not loop.stack
        words = loop.count(r"vp?broadcast") + loop.count(r".*\{1to16\}")
        rows = loop.count("vpdpbusd") // (8 if loop in tile else 16)
        assert words == 10 * rows


@slow
@pytest.mark.parametrize("processor", ELSEWHERE)
def test_products_use_whole_registers_and_spill_none(loops: dict[tuple[str, str], list[Loop]], processor: str) -> None:
    # What stores its sums is a loop over groups or tiles, which LLVM has laid out around its inner one.
    storing = r"vmov\w+ %zmm\d+, -?\d*\((?!%rsp)"
    attending = loops[processor, "_attend_kernel"]
    products = [loop for loop in attending if loop.count("vfmadd.*%zmm") and not loop.count(storing)]
    assert len(products) >= 13  # 8 micro-kernels for one tile, 5 and more for several
    assert max(loop.count("vfmadd") for loop in products) >= 16
    for loop in products:
        assert loop.count("vfmadd") == loop.count(r"vfmadd.*%zmm")
        assert not [one for one in loop.stack if re.search(r"%[xyz]mm", one)]
        assert loop.count("prefetch") >= 1
        assert len(loop.instructions) <= 3 * (loop.count("vfmadd") + loop.count("prefetch")) + 8


@slow
@pytest.mark.parametrize("processor", ELSEWHERE)
def test_the_softmax_takes_whole_registers(loops: dict[tuple[str, str], list[Loop]], processor: str) -> None:
    assert [loop for loop in loops[processor, "_attend_kernel"] if loop.count(r"vpslld .*%zmm")]


def _computed(name: str, kind: Any, *arguments: tuple[Any, Sequence[int]]) -> list[int]:
    """LLVM knows what its intrinsics mean: with constant arguments it computes the result."""
    from llvmlite import binding, ir

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    types = [type_ for type_, _ in arguments]
    intrinsic = ir.Function(module, ir.FunctionType(kind, types), name)
    function = ir.Function(module, ir.FunctionType(kind, []), "computed")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(builder.call(intrinsic, [ir.Constant(type_, list(values)) for type_, values in arguments]))
    parsed = binding.parse_assembly(str(module))
    machine = binding.Target.from_default_triple().create_target_machine(cpu="skylake-avx512")
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    (returned,) = re.findall(r"ret <\d+ x i\d+> <(.*)>", str(parsed))
    return [int(one.split()[-1]) for one in returned.split(",")]


def test_the_wide_instructions_are_what_the_kernels_take_them_for() -> None:
    """A byte is looked up in its own 128 bits by the low four bits of its index; products are added in pairs."""
    from llvmlite import ir

    random = np.random.default_rng(5)
    as_bytes, words = ir.VectorType(ir.IntType(8), 64), ir.VectorType(ir.IntType(16), 32)
    table, index = random.integers(-128, 128, 64), random.integers(0, 16, 64)
    found = _computed("llvm.x86.avx512.pshuf.b.512", as_bytes, (as_bytes, table.tolist()), (as_bytes, index.tolist()))
    assert found == [int(table[16 * (i // 16) + index[i]]) for i in range(64)]
    left, right = (random.integers(-8383, 8384, 32) for _ in range(2))
    integers = ir.VectorType(ir.IntType(32), 16)
    found = _computed("llvm.x86.avx512.pmaddw.d.512", integers, (words, left.tolist()), (words, right.tolist()))
    assert found == (left * right).reshape(16, 2).sum(1).tolist()


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
