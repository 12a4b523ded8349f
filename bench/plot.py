"""Pictures of one run of bench/gpu_kernels.py, from its JSON lines alone.

Needs matplotlib: ``pip install -e '.[bench]'``.

    python -P bench/plot.py                              # the latest run of bench/results/kernels.jsonl
    python -P bench/plot.py --run 2026-12-01T10:00:00 --out docs/pictures

Writes kernels-linear.png (GB/s over the number of rows, for each shape) and kernels-adapters.png (time of a step's
linears over the number of distinct adapters, beside the floor of their bytes). Exit code 2: no such run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "kernels.jsonl"
OURS = "manylora"
# Okabe and Ito's colours, which people of every colour vision can tell apart; the markers repeat the distinction.
BLACK, GREY = "#000000", "#777777"
SYSTEM_STYLES = {
    OURS: ("#0072B2", "o"),
    "bitsandbytes": ("#D55E00", "s"),
    "bitsandbytes, separate": ("#E69F00", "^"),
    "dequantize + cuBLAS": ("#009E73", "D"),
    "cuBLAS, 16-bit weight": ("#CC79A7", "v"),
}
VARIANT_STYLES = {"fused": ("#0072B2", "o", "fused into the linear"), "unfused": ("#D55E00", "s", "separate kernels")}
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The lines that were measured on a GPU; none if there is no such file."""
    if not path.exists():
        return []
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]
    return [line for line in lines if "gpu" in line and "run" in line]


def choose(lines: Sequence[Line], run: str | None) -> list[Line]:
    """Those of one run: the last in the file that has times, unless named."""
    if run is None:
        run = next((ln["run"] for ln in reversed(lines) if ln["kind"] in ("linear", "adapters")), None)
    return [line for line in lines if line["run"] == run]


def title(lines: Sequence[Line]) -> str:
    one = next(line for line in lines if line["kind"] in ("linear", "adapters"))
    return (
        f"{one['gpu']}, {one['dtype']}, run {one['run']} "
        f"(driver {one['driver']}, torch {one['torch']}, triton {one['triton']})"
    )


def figure_grid(count: int, what: str, lines: Sequence[Line]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns + 0.6, 3.5 * rows + 1.5), layout="constrained", dpi=130)
    figure.suptitle(f"{what}\n{title(lines)}", fontsize=11)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def legend(figure: Any, panels: Sequence[Any]) -> None:
    """One for all panels, below them."""
    handles = {label: h for panel in panels for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def draw_linear(lines: Sequence[Line], target: Path, nested: bool) -> None:
    """A system's height is its speed: for all of them the NF4 bytes of the weight over the time, whatever bytes it
    reads itself, so that twice as high is twice as fast."""
    chosen = [line for line in lines if line["kind"] == "linear" and line["nested"] == nested and "us" in line]
    shapes = list(dict.fromkeys((ln["layer"], ln["n"], ln["k"]) for ln in chosen))
    nf4 = {(ln["n"], ln["k"]): ln["bytes"] for ln in chosen if ln["system"] != "cuBLAS, 16-bit weight"}
    scales = "nested scales" if nested else "fp32 scales"
    figure, panels = figure_grid(
        len(shapes), f"One NF4 linear layer (Llama-3.1-8B shapes, {scales}), cold cache", lines
    )
    copy = lines[0]["copy_gbps"]
    for panel, (layer, n, k) in zip(panels, shapes, strict=True):
        panel.axhline(copy, color=BLACK, linestyle="--", linewidth=1, label=f"copy bandwidth, {copy:.0f} GB/s")
        for system, (colour, marker) in SYSTEM_STYLES.items():
            points = sorted(
                (ln["m"], nf4.get((n, k), ln["bytes"]) / ln["us"] / 1e3)
                for ln in chosen
                if (ln["n"], ln["k"], ln["system"]) == (n, k, system)
            )
            if points:
                width = 2.2 if system == OURS else 1.4
                panel.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=width, label=system
                )
        rows = sorted({ln["m"] for ln in chosen})
        panel.set_xscale("log", base=2)
        panel.set_xticks(rows, [str(m) for m in rows])
        panel.minorticks_off()
        panel.set_ylim(0, max(copy, panel.get_ylim()[1] / 1.05) * 1.08)
        panel.set_title(f"{layer}: N {n}, K {k}", fontsize=10)
        panel.set_xlabel("rows M")
        panel.set_ylabel("NF4 weight bytes / time, GB/s")
        panel.grid(alpha=0.3)
    legend(figure, panels)
    figure.savefig(target)


def draw_adapters(lines: Sequence[Line], target: Path) -> None:
    chosen = [line for line in lines if line["kind"] == "adapters"]
    batches = sorted({line["m"] for line in chosen})
    rank, layers = chosen[0]["rank"], chosen[0]["layers"]
    what = f"Linear layers of one decode step ({layers} layers, rank {rank} on all seven projections)"
    figure, panels = figure_grid(len(batches), what, lines)
    for panel, m in zip(panels, batches, strict=True):
        of_batch = [line for line in chosen if line["m"] == m]
        base = of_batch[0]["base_step_ms"]
        ideal = of_batch[0]["base_bytes"] / lines[0]["copy_gbps"] / 1e6
        for variant, (colour, marker, label) in VARIANT_STYLES.items():
            points = [(ln["adapters"], ln["step_ms"]) for ln in of_batch if ln["variant"] == variant]
            points = [(0, base), *sorted(points)]
            if len(points) > 1:
                panel.plot(
                    *zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=2, label=label
                )
        floors = sorted({(ln["adapters"], ln["floor_ms"]) for ln in of_batch})
        counts = [count for count, _ in floors]
        panel.plot(
            counts, [base + floor for _, floor in floors], color=BLACK, linestyle="--", linewidth=1.2,
            label="without adapters + their bytes at copy bandwidth",
        )  # fmt: skip
        panel.plot(
            counts, [ideal + floor for _, floor in floors], color=GREY, linestyle=":", linewidth=1.2,
            label="all bytes at copy bandwidth",
        )  # fmt: skip
        panel.set_xticks(counts)
        panel.set_ylim(bottom=0)
        panel.set_title(f"{m} row{'s' if m > 1 else ''}", fontsize=10)
        panel.set_xlabel("distinct adapters in the batch")
        panel.set_ylabel("ms a step")
        panel.grid(alpha=0.3)
    legend(figure, panels)
    figure.savefig(target)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="JSON lines of bench/gpu_kernels.py (default %(default)s)"
    )
    parser.add_argument("--run", help="which run, by its time; default: the latest with results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder (default %(default)s)")
    parser.add_argument("--fp32-scales", action="store_true", help="weights with fp32 scales, instead of nested ones")
    options = parser.parse_args(arguments)
    everything = read(options.results)
    lines = choose(everything, options.run)
    if not any(line["kind"] in ("linear", "adapters") for line in lines):
        runs = ", ".join(dict.fromkeys(line["run"] for line in everything)) or "none"
        asked = "no GPU results" if options.run is None else f"no results of run {options.run}"
        print(
            f"bench/plot.py: {options.results} has {asked} (runs: {runs}); bench/gpu_kernels.py makes them",
            file=sys.stderr,
        )
        return 2
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("bench/plot.py: matplotlib is missing: pip install -e '.[bench]'", file=sys.stderr)
        return 2
    print(f"plotting run {lines[0]['run']}: {title(lines)}, {len(lines)} lines of {options.results}")
    options.out.mkdir(parents=True, exist_ok=True)
    nested = not options.fp32_scales
    if any(ln["kind"] == "linear" and ln["nested"] == nested and "us" in ln for ln in lines):
        draw_linear(lines, options.out / "kernels-linear.png", nested)
        print(options.out / "kernels-linear.png")
    if any(line["kind"] == "adapters" for line in lines):
        draw_adapters(lines, options.out / "kernels-adapters.png")
        print(options.out / "kernels-adapters.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
