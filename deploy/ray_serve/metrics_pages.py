"""The metrics of several replicas on one page of Prometheus' text format, told apart by the label ``replica``."""

from __future__ import annotations

from collections.abc import Mapping


def one_page(pages: Mapping[str, str]) -> str:
    """Every sample of every page with ``replica="..."`` as its first label, families together as the format asks.

    Only pages that a client library wrote are read: each family begins with its HELP, and each sample is a line.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(_labelled(line, replica))
    families = dict.fromkeys([*heads, *samples])
    lines = [line for family in families for line in [*heads.get(family, ()), *samples.get(family, ())]]
    return "".join(f"{line}\n" for line in lines)


def _labelled(sample: str, replica: str) -> str:
    """A sample's line with the label."""
    escaped = replica.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    label = f'replica="{escaped}"'
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label}{'' if rest.startswith('}') else ','}{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
