"""Compiles every shipped Triton configuration for sm_80 and sm_90, without a GPU, and tabulates what came out.

    python -P bench/compile_table.py            # writes docs/compiled-kernels.md and kernels/cuda/compiled.json
    python -P bench/compile_table.py --check    # compares with both; a difference is printed, and the exit status is 1

Takes two to five minutes, less when triton's cache has the kernels. To be run after a change of a kernel, of
kernels/cuda/configs.json or of triton's version; tests/kernels/test_compiled_kernels.py holds the figures to the table.
What each figure means: ``kernels/cuda/compiled.py``, ``CompiledFigures``.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TABLE, FIGURES = ROOT / "docs" / "compiled-kernels.md", ROOT / "kernels" / "cuda" / "compiled.json"
PROCESSES = 2
COMMAND = "python -P bench/compile_table.py"

HEAD = f"""# What the shipped kernels compile to

Written by `{COMMAND}` with triton {{version}}; needs no GPU, and nothing here ran on one. All but
shared memory is read from the machine code (SASS) of each configuration of `kernels/cuda/configs.json` and of each
kernel's launcher.

- **Programs**: how many a processor can hold at once, by registers, shared memory and threads.
- **HGMMA**, **HMMA**: matrix products of four warps together (Hopper) and of one warp.
- **Loop**: instructions of the main loop, by the weights decoded in it. Streaming NF4 at 3.0 TB/s leaves an H100 about
  5.6 (estimated). An instruction count is a bound on the speed, not a prediction of it.
- **Decode**: PRMT, LOP3 and SHF of that loop, by weight: the look-up, and the address arithmetic that uses the same
  instructions.

Spills are instructions that load or store local memory; the stack is in bytes a thread, shared memory in KiB a program.
"""

COLUMNS = {
    "warps": "num_warps",
    "stages": "num_stages",
    "registers": "registers",
    "spills": "spills",
    "stack": "stack",
    "shared": "shared",
    "programs": "programs",
    "HGMMA": "hgmma",
    "HMMA": "hmma",
    "instructions": "instructions",
}
LOOP_COLUMNS = {"loop": "per_weight", "decode": "decode_per_weight"}

Row = dict[str, Any]


def compile_one(arch: str, label: str) -> Row:
    """In a process of its own, where triton is not in interpreter mode."""
    from triton.errors import TritonError

    from manylora.kernels.cuda.compiled import compile_ahead, variants

    variant = next(one for one in variants(arch) if one.label == label)
    try:
        figures = compile_ahead(variant, int(arch.removeprefix("sm_")))
    except (TritonError, RuntimeError, ValueError) as error:
        # Not all of the compiler's own exceptions survive the way to another process.
        raise RuntimeError(f"{arch} {label}: {type(error).__name__}: {error}") from None
    return {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **asdict(figures)}


def compile_all() -> dict[str, Any]:
    """``{"triton": version, "sm_80": {label: row}, ...}``, sorted."""
    import triton

    from manylora.kernels.cuda.compiled import ARCHITECTURES, variants

    jobs = [(arch, variant.label) for arch in ARCHITECTURES for variant in variants(arch)]
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = tqdm(pool.map(compile_one, *zip(*jobs, strict=True)), total=len(jobs), unit="kernel", smoothing=0)
        found = dict(zip(jobs, rows, strict=True))
    table: dict[str, Any] = {"triton": triton.__version__}
    for arch, label in sorted(jobs, key=_natural):
        table.setdefault(arch, {})[label] = found[arch, label]
    return table


def _natural(job: tuple[str, str]) -> list[tuple[int, str]]:
    # 64 rows before 128 rows
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", " ".join(job))]


def markdown(found: dict[str, Any]) -> str:
    """The readable table."""
    lines = [HEAD.format(version=found["triton"])]
    for arch in (key for key in found if key != "triton"):
        linear = {label: row for label, row in found[arch].items() if row["per_weight"] is not None}
        others = {label: row for label, row in found[arch].items() if row["per_weight"] is None}
        lines += [f"## {arch}: the linear kernel", "", *_rows(linear, {**COLUMNS, **LOOP_COLUMNS}), ""]
        lines += [f"## {arch}: the others", "", *_rows(others, COLUMNS), ""]
    return "\n".join(lines)


def _rows(rows: dict[str, Row], columns: dict[str, str]) -> list[str]:
    lines = [f"| kernel | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for label, row in rows.items():
        values = [row[name] / 1024 if name == "shared" else row[name] for name in columns.values()]
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in values]
        lines.append(f"| {label.replace('_kernel', '')} | {' | '.join(cells)} |")
    return lines


def differences(path: Path, new: str) -> str:
    """A diff of a file with what should be in it, empty if they agree."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    name = str(path.relative_to(ROOT))
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), name, f"{name}, compiled now", n=2, lineterm="")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="What every shipped Triton configuration compiles to; needs no GPU.")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with what is there")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="write only the figures, and to this file")
    arguments = parser.parse_args()
    # Read when triton is imported, which is later, here and in the processes that compile.
    os.environ.pop("TRITON_INTERPRET", None)
    found = compile_all()
    figures = json.dumps(found, indent=1) + "\n"
    if arguments.figures is not None:
        arguments.figures.write_text(figures, encoding="utf-8")
        return 0
    wanted = {FIGURES: figures, TABLE: markdown(found)}
    if arguments.check:
        changed = [text for path, new in wanted.items() if (text := differences(path, new))]
        print("\n".join(changed) or "As the table says.")
        if changed:
            print(f"\nIf this is intended, run: {COMMAND}", file=sys.stderr)
        return 1 if changed else 0
    for path, new in wanted.items():
        path.write_text(new, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
