"""Reading compiled kernels: the disassembler's text, its loops, and what a kernel occupies.

SASS is the machine code that a GPU runs; PTX, which Triton hands to the assembler, shows neither registers nor spills
nor what the assembler made of a loop. The tools for it come with triton. Nothing here needs a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_RESOURCE = re.compile(r"\b(REG|STACK):(\d+)")


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions in the order of their addresses: ``opcodes`` without modifiers (``LOP3`` for
    ``LOP3.LUT``), and the place each one may jump to, by its index in ``opcodes`` (None: to no label)."""

    opcodes: tuple[str, ...]
    targets: tuple[int | None, ...]

    def count(self, names: tuple[str, ...], span: range | None = None) -> int:
        """How many instructions have one of these names, in ``span`` or everywhere."""
        found = Counter(self.opcodes if span is None else self.opcodes[span.start : span.stop])
        return sum(found[name] for name in names)

    def loops(self) -> list[range]:
        """From the target of each backward jump to that jump. Blocks that the compiler laid outside of a loop's
        addresses (rare paths) are not counted in it."""
        jumps = [
            (target, source) for source, target in enumerate(self.targets) if target is not None and target <= source
        ]
        return [range(target, source + 1) for target, source in jumps]

    def main_loop(self, name: str) -> range:
        """The innermost loop with most instructions of that name. ValueError if there is none."""
        loops = self.loops()
        innermost = [one for one in loops if not any(_inside(other, one) for other in loops)]
        best = max(innermost, key=lambda one: (self.count((name,), one), -len(one)), default=range(0))
        if not self.count((name,), best):
            raise ValueError(f"no loop with {name}")
        return best


def _inside(inner: range, outer: range) -> bool:
    return inner != outer and inner.start >= outer.start and inner.stop <= outer.stop


@dataclass(frozen=True)
class Resources:
    """What the assembler says a thread needs: registers, and bytes of stack."""

    registers: int
    stack: int


def parse(text: str) -> Listing:
    """The output of ``nvdisasm -c`` for one kernel. ValueError for a jump to a label that is not there."""
    opcodes: list[str] = []
    jumps: list[str | None] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            opcodes.append(instruction[1])
            # BSSY and the like name labels too, but do not jump there.
            target = _TARGET.search(instruction[2]) if instruction[1] == "BRA" else None
            jumps.append(None if target is None else target[1])
    if missing := {jump for jump in jumps if jump is not None} - set(labels):
        raise ValueError(f"jumps to unknown labels {sorted(missing)}")
    return Listing(tuple(opcodes), tuple(None if jump is None else labels[jump] for jump in jumps))


def parse_resources(text: str) -> Resources:
    """The output of ``cuobjdump -res-usage`` for one kernel."""
    found = {name: int(value) for name, value in _RESOURCE.findall(text)}
    if len(found) != 2:
        raise ValueError(f"expected registers and stack in {text!r}")
    return Resources(found["REG"], found["STACK"])


def read(cubin: bytes) -> tuple[Listing, Resources]:
    """Both, of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = parse(_run("nvdisasm", "-c", "-ndf", str(path)))  # without data flow analysis: faster, same text
        return listing, parse_resources(_run("cuobjdump", "-res-usage", str(path)))


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool}: {done.stderr.strip()}")
    return done.stdout + done.stderr
