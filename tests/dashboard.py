"""The Grafana dashboard as its tests see it: panels, and what their queries ask of ``/metrics``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

FILE = Path(__file__).parent.parent / "deploy" / "grafana" / "manylora.json"

SCRAPED = frozenset({"instance", "job"})
"""Labels that Prometheus adds to what it scrapes."""

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"(?<![A-Za-z0-9_:])([A-Za-z_:][A-Za-z0-9_:]*)\s*(?:\{([^}]*)\})?(?!\s*\()(?![A-Za-z0-9_:])")
_RANGE = re.compile(r"\[[^\]]*\]")


@dataclass(frozen=True)
class Asked:
    """One metric of a query, with the labels it is selected and grouped by."""

    metric: str
    labels: frozenset[str]


def load() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(FILE.read_text())
    return loaded


def panels() -> list[dict[str, Any]]:
    """All but the rows' headings."""
    return [panel for panel in load()["panels"] if panel["type"] != "row"]


def queries() -> Iterator[str]:
    """Every PromQL expression, those of the variables included."""
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"]
    for variable in load()["templating"]["list"]:
        if variable["type"] == "query":
            inside = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert inside is not None, variable
            yield f"count by ({inside[2]}) ({inside[1]})"


def asked(query: str) -> list[Asked]:
    """The metrics of ``query``."""
    bare = _RANGE.sub("", _STRING.sub('""', query))
    grouped = {label.strip() for found in _GROUPING.findall(bare) for label in found.split(",") if label.strip()}
    bare = _GROUPING.sub(" ", bare)
    metrics = []
    for name, selectors in _SELECTOR.findall(bare):
        labels = {part.partition("=")[0].rstrip("!").strip() for part in selectors.split(",") if part.strip()}
        metrics.append(Asked(name, frozenset(labels | grouped)))
    return metrics


def exposed(text: str) -> dict[str, frozenset[str]]:
    """The labels of each sample name in an answer of ``/metrics``."""
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return {name: frozenset(found) for name, found in labels.items()}


def unknown(query: str, samples: dict[str, frozenset[str]]) -> list[str]:
    """What ``query`` asks for and ``samples`` does not have."""
    wrong = []
    for one in asked(query):
        if one.metric not in samples:
            wrong.append(one.metric)
        else:
            wrong += [f"{one.metric}{{{label}}}" for label in one.labels - samples[one.metric] - SCRAPED]
    return sorted(wrong)
