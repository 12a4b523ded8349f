"""The report's pictures, as SVG to be put into the page. They need matplotlib (extra ``load``); without them the
report is otherwise whole.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from loadgen.records import Record

MISSING = "No pictures: matplotlib is not installed (pip install 'manylora[load]')."
# Okabe and Ito's colours, which people of every colour vision can tell apart.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
_MOST_POINTS = 4000
_MOST_ADAPTERS = 40


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(summary: Mapping[str, Any], records: Sequence[Record]) -> tuple[list[tuple[str, str]], str]:
    """(title, SVG) of each picture that there is something to show in, and what is missing (nothing)."""
    made = [
        ("Load and throughput", _throughput(summary)),
        ("Time to first token, by when it was due", _first_tokens(summary, records)),
        ("How many are how fast", _distributions(summary, records)),
        ("By adapter", _adapters(summary)),
    ]
    return [(title, svg) for title, svg in made if svg], ""


def _figure(height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False).flat)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _svg(figure: Any, name: str) -> str:
    """As an element of the page: no XML head, which names a file on another host, and no metadata."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # The salt makes ids that differ between the pictures of one page, and are the same for the same figures.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)


def _throughput(summary: Mapping[str, Any]) -> str:
    line = summary["timeline"]
    figure, (panel,) = _figure(3.4)
    panel.plot(line["t_s"], line["tokens_per_s"], color=BLUE, drawstyle="steps-post", label="tokens/s")
    panel.set_xlabel("seconds")
    panel.set_ylabel("tokens/s", color=BLUE)
    panel.set_ylim(bottom=0)
    other = panel.twinx()
    other.plot(line["t_s"], line["in_flight"], color=ORANGE, drawstyle="steps-post", label="requests in flight")
    other.plot(line["t_s"], line["due_per_s"], color=GREY, drawstyle="steps-post", linewidth=1, label="requests due/s")
    other.set_ylabel("requests", color=ORANGE)
    other.set_ylim(bottom=0)
    other.spines[["top"]].set_visible(False)
    start, end = summary["window_s"]
    panel.axvspan(start, end, color=GREY, alpha=0.08, label="measured")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return _svg(figure, "throughput")


def _first_tokens(summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    start = summary["window_s"][0]
    answered = [
        (r.scheduled_s, r.ttft_s * 1e3) for r in records if r.ok and r.ttft_s is not None and r.scheduled_s >= start
    ]
    failed = [r.scheduled_s for r in records if not r.ok and r.scheduled_s >= start]
    if not answered and not failed:
        return ""
    figure, (panel,) = _figure(3.2)
    shown = answered[:: -(-len(answered) // _MOST_POINTS)] if answered else []
    if shown:
        panel.plot(*zip(*shown, strict=True), ".", color=BLUE, markersize=4, alpha=0.7, label="answered")
        panel.set_yscale("log")
    if failed:
        panel.plot(
            failed, [0.02] * len(failed), "x", color=ORANGE, transform=panel.get_xaxis_transform(), label="failed"
        )
    panel.axhline(summary["targets"]["ttft_ms"], color=GREY, linestyle="--", linewidth=1, label="target")
    panel.set_xlabel("seconds")
    panel.set_ylabel("ms")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return _svg(figure, "first-tokens")


def _distributions(summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    answered = [r for r in records if r.ok and r.scheduled_s >= summary["window_s"][0]]
    sets = (
        ("first token, ms", [r.ttft_s * 1e3 for r in answered if r.ttft_s is not None], summary["targets"]["ttft_ms"]),
        ("between tokens, ms", [gap * 1e3 for r in answered for gap in r.itl_s], summary["targets"]["itl_ms"]),
        ("whole request, ms", [r.total_s * 1e3 for r in answered if r.total_s is not None], None),
    )
    if not answered:
        return ""
    figure, panels = _figure(3.0, columns=3)
    for panel, (label, values, target) in zip(panels, sets, strict=True):
        ordered = sorted(values)
        shown = ordered[:: -(-len(ordered) // _MOST_POINTS)] if ordered else []
        panel.plot(shown, [(i + 1) / len(shown) for i in range(len(shown))], color=BLUE)
        if target is not None:
            panel.axvline(target, color=GREY, linestyle="--", linewidth=1)
        panel.set_xlabel(label)
        panel.set_ylim(0, 1.02)
        panel.set_xlim(left=0)
    panels[0].set_ylabel("share as fast or faster")
    return _svg(figure, "distributions")


def _adapters(summary: Mapping[str, Any]) -> str:
    found = [(name, one) for name, one in summary["adapters"].items() if one["ttft_ms"]][:_MOST_ADAPTERS]
    if len(found) < 2:
        return ""
    figure, panels = _figure(0.9 + 0.3 * len(found), columns=2)
    places = range(len(found))
    for panel, name, label in zip(
        panels, ("ttft_ms", "itl_ms"), ("first token, ms", "between tokens, ms"), strict=True
    ):
        for statistic, marker, colour in (("p50", "o", BLUE), ("p95", "s", ORANGE), ("p99", "d", PINK)):
            values = [one[name][statistic] if one[name] else float("nan") for _, one in found]
            panel.plot(values, places, marker, color=colour, label=statistic)
        panel.set_yticks(places, [model for model, _ in found])
        panel.set_ylim(len(found) - 0.5, -0.5)
        panel.set_xlim(left=0)
        panel.set_xlabel(label)
    panels[1].set_yticklabels([])
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9
    )
    return _svg(figure, "adapters")
