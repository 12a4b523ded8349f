"""A variant's kernels as numba compiles them on another processor: ``variant_assembly.py NAME FOLDER KERNEL...``;
``NAME+FEATURE``: which has more than the variant asks for.

The environment says for which (``NUMBA_CPU_NAME``); nothing that is compiled here is run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from manylora.kernels import cpu


def main(name: str, folder: str, *kernels: str) -> None:
    name, *more = name.split("+")
    variant = next(one for one in cpu.VARIANTS if one.name == name)
    cpu._host_features = lambda: frozenset({*variant.features, *more})  # type: ignore[assignment]
    cpu.choose(variant)
    from manylora.kernels.cpu import compiling

    for one in compiling.all_kernels():
        if one.name in kernels:
            Path(folder, f"{one.name}.s").write_text(one._compiled._library.get_asm_str(), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
