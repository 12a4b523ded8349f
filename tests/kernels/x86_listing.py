"""Reads assembly as LLVM writes it for x86-64: the innermost loops of a listing and what they are made of."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LABEL = re.compile(r"^([.\w$]+):")
_STACK = re.compile(r"\((%rsp|%rbp)|\[(rsp|rbp)\b")


@dataclass(frozen=True)
class Loop:
    """Instructions from a label to the jump back to it, without another such jump between."""

    instructions: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """Instructions that begin with the regular expression."""
        return sum(re.match(pattern, one) is not None for one in self.instructions)

    @property
    def stack(self) -> list[str]:
        """Those that touch the stack: where registers are spilt to."""
        return [one for one in self.instructions if _STACK.search(one)]


def innermost_loops(listing: str) -> list[Loop]:
    """Of every function in the listing, in order."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label = _LABEL.match(line)
        if label is not None:
            labels[label[1]] = len(instructions)
        elif line.startswith("\t") and not line.startswith("\t."):
            instructions.append(re.sub(r"\s+", " ", line.split("#")[0]).strip())
    spans = []
    for at, one in enumerate(instructions):
        jump = re.match(r"j\w+ ([.\w$]+)$", one)
        if jump is not None and labels.get(jump[1], at + 1) <= at:
            spans.append((labels[jump[1]], at + 1))
    inner = {
        one for one in spans if not any(one[0] <= other[0] and other[1] <= one[1] for other in spans if other != one)
    }
    return [Loop(tuple(instructions[first:last])) for first, last in sorted(inner)]
