"""The pictures of docs/scaling.md, from the last run in bench/results/scaling.jsonl. Needs matplotlib.

    python -P bench/scale_plots.py         # writes docs/pictures/{scaling-hits,scaling-swaps,scaling-ttft}.png

Each has a panel for each number of adapters, and replicas along its axis. Exit code 2 if there is no run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from readme_plots import GREY, ROOT, NoRun, figure, last_run, legend
from scale_sweep import COLUMNS
from scaling.theory import lru_hit_rate, zipf_shares

# Okabe and Ito's colours; the markers repeat the distinction.
STYLES = {
    "random": ("#D55E00", "s"),
    "round robin": ("#E69F00", "^"),
    "least loaded": ("#CC79A7", "v"),
    "bounded hashing": ("#009E73", "D"),
    "affinity": ("#0072B2", "o"),
}
ZIPF, LOAD = 1.0, 0.5
"""What is drawn."""
Cell = dict[str, Any]


def cells(line: dict[str, Any]) -> list[Cell]:
    """Those that are drawn. What one replica gives stands for every policy."""
    found = [dict(zip(COLUMNS, one, strict=True)) for one in line["cells"]]
    found = [cell for cell in found if cell["zipf"] == ZIPF and cell["load"] == LOAD]
    alone = [cell for cell in found if cell["replicas"] == 1]
    several = [cell for cell in found if cell["replicas"] > 1]
    return [*({**cell, "policy": policy} for cell in alone for policy in STYLES), *several]


def draw(line: dict[str, Any], title: str, column: str, label: str, scale: float = 1.0) -> tuple[Any, list[Any]]:
    """A line for each policy."""
    found = cells(line)
    counts = sorted({cell["adapters"] for cell in found})
    made, panels = figure(len(counts), title, [line])
    for panel, adapters in zip(panels, counts, strict=True):
        for policy, (colour, marker) in STYLES.items():
            points = sorted(
                (cell["replicas"], scale * cell[column])
                for cell in found
                if cell["adapters"] == adapters and cell["policy"] == policy
            )
            width = 2.2 if policy == "affinity" else 1.3
            panel.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=width, label=policy)
        replicas = sorted({cell["replicas"] for cell in found})
        panel.set_xscale("log")
        panel.set_xticks(replicas, [str(count) for count in replicas])
        panel.minorticks_off()
        panel.set_title(f"{adapters:,} adapters", fontsize=10)
        panel.set_xlabel("replicas")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    return made, panels


def hits(line: dict[str, Any]) -> Any:
    made, panels = draw(
        line, heading("Requests that find their adapter on the device", line), "slot_hit_rate", "%", 100
    )
    found = cells(line)
    for panel, adapters in zip(panels, sorted({cell["adapters"] for cell in found}), strict=True):
        shares = zipf_shares(adapters, ZIPF)
        replicas = sorted({cell["replicas"] for cell in found})
        slots = found[0]["slots"]
        for count_of, label in ((lambda _r: 1, "theory: each slot by itself"), (lambda r: r, "theory: slots add up")):
            rates = [100 * lru_hit_rate(shares, slots * count_of(r)) for r in replicas]
            style = ":" if label.endswith("itself") else "--"
            panel.plot(replicas, rates, color=GREY, linestyle=style, linewidth=1, label=label, zorder=0)
        panel.set_ylim(0, 103)
    return made, panels


def swaps(line: dict[str, Any]) -> Any:
    return draw(line, heading("Adapters brought to the device", line), "swap_mb_per_s", "MB/s of one replica")


def ttft(line: dict[str, Any]) -> Any:
    made, panels = draw(line, heading("Time to the first token, p95", line), "ttft_p95_ms", "ms (log)")
    for panel in panels:
        panel.set_yscale("log")
        panel.set_ylim(50, 3000)
        panel.set_yticks([100, 300, 1000, 3000], ["100", "300", "1000", "3000"])
        panel.minorticks_off()
    return made, panels


def heading(what: str, line: dict[str, Any]) -> str:
    cell = cells(line)[0]
    sizes = f"{cell['slots']} slots and {cell['host']} in host memory a replica"
    return f"{what} (simulated; Zipf {ZIPF:g}, load {LOAD:g}, {sizes})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder (default %(default)s)")
    options = parser.parse_args()
    try:
        line = last_run("scaling", lambda ln: "cells" in ln)[-1]
    except NoRun:
        print("bench/results/scaling.jsonl has no run to draw; bench/scale_sweep.py makes one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for what in (hits, swaps, ttft):
        target = options.out / f"scaling-{what.__name__}.png"
        made, panels = what(line)
        legend(made, panels)
        # Without the time of drawing and the version: the same results give the same bytes.
        made.savefig(target, metadata={"Software": None})
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
