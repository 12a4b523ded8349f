"""Panels that would stay empty: the dashboard and docs/metrics.md against what /metrics exposes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from manylora.server.api.observing import metrics_page as metrics_reference
from tests import dashboard

ROOT = Path(__file__).parent.parent
UNITS = {"short", "s", "bytes", "percentunit", "reqps", "ops"}
"""Grafana's, those that are used."""


def test_every_query_asks_for_what_there_is() -> None:
    samples = dashboard.exposed(metrics_reference.specimen())
    wrong = {query: found for query in dashboard.queries() if (found := dashboard.unknown(query, samples))}
    assert not wrong


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("sum(rate(a_total[5m]))", []),
        ('sum by (x) (rate(a_total{x=~"$y", instance!="b{c}"}[$__rate_interval])) / sum(b)', ["b{x}"]),
        ("histogram_quantile(0.9, sum by (le, x) (rate(h_bucket[1m])))", []),
        ("topk(10, c_total)", ["c_total"]),
        ('a_total{z="1"}', ["a_total{z}"]),
        ("1e3 * sum(a) by (q)", ["a"]),
    ],
)
def test_the_check_finds_what_is_wrong(query: str, wrong: list[str]) -> None:
    samples = {"a_total": frozenset({"x"}), "b": frozenset[str](), "h_bucket": frozenset({"x", "le"})}
    assert dashboard.unknown(query, samples) == wrong


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    for panel in dashboard.panels():
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert panel["datasource"]["uid"] == "${datasource}"


def test_panels_neither_overlap_nor_share_an_id() -> None:
    panels = dashboard.load()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_every_variable_of_a_query_is_defined() -> None:
    names = {variable["name"] for variable in dashboard.load()["templating"]["list"]}
    used = {name for query in dashboard.queries() for name in re.findall(r"\$\{?(\w+)", query)}
    assert used - {"__rate_interval"} == names - {"datasource"}


def test_the_page_of_metrics_is_current() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert text == metrics_reference.page(), "run: make docs"


def test_every_family_is_documented() -> None:
    for family in metrics_reference.families(metrics_reference.specimen()):
        assert len(family.text) > 10, family
        assert re.fullmatch(r"(vllm:|manylora_)[a-z0-9_]+", family.name), family


def test_the_example_scrapes_metrics() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == ("manylora", "/metrics")
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
