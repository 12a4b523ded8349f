"""Every shipped Triton configuration compiled for sm_80 and sm_90, on any machine: what the machine code says of it.

The compiling happens in a process of its own, as this one may have imported triton for its interpreter. Figures must be
those of kernels/cuda/compiled.json with the pinned version of triton; the properties hold with any.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from manylora.kernels.cuda import sass

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ROOT / "bench" / "compile_table.py"
RECORDED = json.loads((ROOT / "kernels" / "cuda" / "compiled.json").read_text(encoding="utf-8"))
ARCHITECTURES = ("sm_80", "sm_90")
PRODUCTS = ("nf4_linear", "dense_linear_kernel", "shrink", "expand", "decode_kernel", "prefill_kernel")

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""What one program can have (CUDA C programming guide, "Compute capabilities")."""
DECODE_CEILING = 4.0
LOOP_CEILING = {
    "sm_80": {16: 4.1, 32: 5.2, 64: 8.6},
    "sm_90": {16: 3.8, 32: 3.9, 64: 5.7},
}
"""Instructions a weight, by rows of the tile: what was reached, a little rounded up."""
UNEVEN = 0.6
"""What the masks of a K that is no multiple of an iteration may add."""

Row = dict[str, Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures as they are now: one regeneration for all tests of this module."""
    path = tmp_path_factory.mktemp("compiled") / "figures.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-P", str(COMMAND), "--figures", str(path)],
        env=environment, capture_output=True, text=True, timeout=850, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def after_compiling(test: Any) -> Any:
    """Whichever test comes first waits for the compiler."""
    return pytest.mark.slow(pytest.mark.timeout(900)(test))


@after_compiling
def test_figures_are_the_recorded_ones(compiled: dict[str, Any]) -> None:
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    if triton.__version__ != pinned[1]:
        pytest.skip(f"triton {triton.__version__} is not the pinned {pinned[1]}, and compiles differently")
    assert RECORDED["triton"] == pinned[1]
    changed = [
        f"{arch} {label}: recorded {RECORDED[arch].get(label)}, now {compiled[arch].get(label)}"
        for arch in ARCHITECTURES
        for label in sorted(RECORDED[arch].keys() | compiled[arch].keys())
        if RECORDED[arch].get(label) != compiled[arch].get(label)
    ]
    assert not changed, "\n".join([*changed, "If this is intended, run: python -P bench/compile_table.py"])


def test_no_kernel_is_missing() -> None:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "kernels" / "cuda").glob("*.py"))
    names = {name for source in sources for name in re.findall(r"^def (\w+)_kernel\(", source, re.MULTILINE)}
    assert "nf4_linear" in names
    for arch in ARCHITECTURES:
        assert names == {label.split()[0].removesuffix("_kernel") for label in RECORDED[arch]}


@after_compiling
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_is_spilt_and_it_fits(arch: str, compiled: dict[str, Any]) -> None:
    rows: dict[str, Row] = compiled[arch]
    assert not [label for label, row in rows.items() if row["spills"] or row["stack"]]
    assert not [label for label, row in rows.items() if row["shared"] > SHARED[arch] or row["programs"] < 1]
    assert not [label for label, row in rows.items() if label.startswith("nf4_linear 16 rows") and row["programs"] < 2]


@after_compiling
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_products_use_the_matrix_units(arch: str, compiled: dict[str, Any]) -> None:
    rows: dict[str, Row] = {label: row for label, row in compiled[arch].items() if label.startswith(PRODUCTS)}
    assert {label.split()[0] for label in rows} == set(PRODUCTS)
    assert not [label for label, row in rows.items() if row["hgmma"] + row["hmma"] == 0]
    if arch == "sm_90":
        # HMMA has half the rate there: left to products of few rows and those that wait for memory.
        wide = [label for label in rows if label.startswith(("nf4_linear", "dense_linear", "prefill"))]
        assert not [label for label in wide if rows[label]["hgmma"] == 0]


@after_compiling
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_weight_takes_few_instructions(arch: str, compiled: dict[str, Any]) -> None:
    linear: dict[str, Row] = {label: row for label, row in compiled[arch].items() if label.startswith("nf4_linear")}
    assert {int(label.split()[1]) for label in linear} == set(LOOP_CEILING[arch])
    assert not [label for label, row in linear.items() if row["decode_per_weight"] > DECODE_CEILING]
    ceilings = {
        label: LOOP_CEILING[arch][int(label.split()[1])] + (UNEVEN if "K uneven" in label else 0) for label in linear
    }
    assert not [(label, row["per_weight"]) for label, row in linear.items() if row["per_weight"] > ceilings[label]]


def test_the_readable_table_is_of_these_figures() -> None:
    """Of the recorded ones: what differs from the compiler's is the test above's matter."""
    read = "import json, sys; sys.path.insert(0, 'bench'); import compile_table as c; print(c.markdown(json.loads("
    read += "c.FIGURES.read_text(encoding='utf-8'))))"
    run = subprocess.run([sys.executable, "-P", "-c", read], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "compiled-kernels.md").read_text(encoding="utf-8") + "\n" == run.stdout


LISTING = """
	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R4 ;
        /*0020*/              @!P0 BRA `(.L_x_4) ;
.L_x_1:
        /*0030*/                   MOV R9, RZ ;
.L_x_2:
        /*0040*/                   PRMT R5, R6, 0x5140, R7 ;
        /*0050*/                   LOP3.LUT R5, R5, R6, RZ, 0x3c, !PT ;
        /*0060*/                   BSSY B0, `(.L_x_1) ;
        /*0070*/             @!UP1 UPRMT UR5, UR6, 0x5140, UR7 ;
        /*0080*/                   HGMMA.64x16x16.F32.BF16 R8, R4, gdesc[UR4], R8 ;
        /*0090*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   LOP3.LUT R5, R5, R6, RZ, 0x3c, !PT ;
        /*00b0*/               @P3 BRA `(.L_x_3) ;
        /*00c0*/               @P2 BRA `(.L_x_1) ;
.L_x_4:
        /*00d0*/                   LDL.LU R4, [R1] ;
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_5) ;
        /*0100*/                   NOP;
"""


def test_sass_is_read_as_it_is() -> None:
    listing = sass.parse(LISTING)
    assert len(listing.opcodes) == 17
    assert listing.opcodes[:5] == ("LDC", "STL", "BRA", "MOV", "PRMT")
    assert listing.count(("LDL", "STL")) == 2
    assert listing.targets[2] == 13  # forward, so no loop
    assert listing.loops() == [range(4, 10), range(10, 12), range(3, 13), range(15, 16)]
    loop = listing.main_loop("PRMT")
    assert loop == range(4, 10)
    assert listing.count(("PRMT", "LOP3", "SHF"), loop) == 2
    assert listing.count(("HGMMA",), loop) == 1
    assert listing.main_loop("LOP3") == range(10, 12)  # of equals the shorter one
    with pytest.raises(ValueError, match="no loop with HMMA"):
        listing.main_loop("HMMA")
    with pytest.raises(ValueError, match="unknown labels"):
        sass.parse(LISTING.replace(".L_x_4:", ""))


def test_resources_are_read_as_they_are() -> None:
    text = "Fatbin elf code:\n Function k:\n  REG:140 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:768 TEXTURE:0 SURFACE:0\n"
    assert sass.parse_resources(text) == sass.Resources(registers=140, stack=8)
    with pytest.raises(ValueError, match="expected registers and stack"):
        sass.parse_resources("")
