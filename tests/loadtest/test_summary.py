"""Figures against cases worked out by hand, and thresholds on them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from loadgen.errors import ThresholdError
from loadgen.generator_health import bottlenecks
from loadgen.records import Record
from loadgen.settings import Targets
from loadgen.summary import block, distribution, failures, is_good, percentile
from loadgen.thresholds import OF_ADAPTER, OF_RUN, Threshold
from loadgen.traces import TracedRequest

TARGETS = Targets(ttft_ms=500, itl_ms=100)


def record(
    due: float,
    events: Sequence[float],
    *,
    tokens: int | None = None,
    end: float | None = None,
    sent: float | None = None,
    failure: str = "",
    model: str = "a",
) -> Record:
    """Times in seconds of the run."""
    made = Record(TracedRequest(due, model, 8, prompt="x"), due, due if sent is None else sent)
    made.events = list(events)
    made.tokens = len(events) if tokens is None else tokens
    made.tokens_counted = True
    made.end_s = end if end is not None else (events[-1] if events else due)
    made.failure = failure
    return made


@pytest.mark.parametrize("p", [50, 90, 95, 99])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(p: int, n: int) -> None:
    values = sorted(random.Random(n).random() for _ in range(n))
    assert percentile(values, p) == pytest.approx(float(np.percentile(values, p)), rel=1e-12)


def test_percentiles_by_hand() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert distribution([0.004, 0.001, 0.003, 0.002]) == {
        "n": 4, "mean": 2.5, "p50": 2.5, "p90": 3.7, "p95": 3.85, "p99": 3.97, "max": 4.0,
    }  # fmt: skip
    assert distribution([]) is None


def test_latencies_of_one_request() -> None:
    one = record(1.0, [1.3, 1.4, 1.7], tokens=5, sent=1.1)
    assert one.ttft_s == pytest.approx(0.3)  # from when it was due, not from when it was sent
    assert one.itl_s == pytest.approx([0.1, 0.3])
    assert one.tpot_s == pytest.approx(0.1)  # 0.4 s for the four tokens after the first
    assert one.total_s == pytest.approx(0.7)


def test_tokens_are_spread_over_events_and_each_counted_once() -> None:
    one = record(0, [0.5, 1.0, 1.5, 2.0], tokens=8)
    assert [one.tokens_between(a, b) for a, b in ((0, 1), (1, 2), (2, 3), (0, 9))] == [2, 4, 2, 8]


def test_a_block_by_hand() -> None:
    records = [
        record(0.0, [0.1, 0.2], tokens=4),  # in the warm-up: its tokens of the window alone count
        record(0.9, [1.1, 1.19], tokens=4),  # due in the warm-up, answered in the window
        record(1.0, [1.2, 1.25, 1.3], tokens=6),  # good
        record(2.0, [2.6, 2.7]),  # first token late
        record(3.0, [3.1, 3.15, 3.65]),  # a gap too long
        record(4.0, [4.1], failure="broken_stream"),
        record(4.5, [4.7, 5.5], model="b"),  # good but for its last gap; ends after the window
        record(4.9, [5.1]),  # good, ends after the window
    ]
    found = block(records, (1.0, 5.0), TARGETS)
    assert found["requests"] == {"due": 6, "answered": 5, "failed": 1, "failed_share": 0.166667}
    assert found["requests_per_s"] == 4 / 4  # the second to the fifth
    # 4 of the second, 6, 2, 3, the broken one's 1, and one of the last but one: 17 tokens in four seconds.
    assert found["tokens_per_s"] == 17 / 4
    assert found["goodput"] == {"requests_per_s": 2 / 4, "share": round(2 / 6, 6)}
    assert found["ttft_ms"]["n"] == 5
    assert found["ttft_ms"]["p50"] == pytest.approx(200)
    assert found["itl_ms"]["n"] == 2 + 1 + 2 + 1
    assert found["output_tokens"] == 6 + 2 + 3 + 2 + 1
    assert found["tokens_per_event"] == round(14 / 11, 3)


@pytest.mark.parametrize(
    ("made", "good"),
    [
        (record(0, [0.5, 0.6]), True),
        (record(0, [0.501, 0.6]), False),
        (record(0, [0.4], sent=0.3), True),
        (record(0.0, [0.6, 0.7], sent=0.55), False),  # it had to wait in the generator: that is no excuse
        (record(0, [0.1, 0.2, 0.35]), False),
        (record(0, [0.1, 0.15, 0.2, 0.25, 0.4]), False),
        (record(0, [0.09 * i for i in range(1, 41)] + [4.3]), True),  # one gap of forty is outside the 95th percentile
        (record(0, [0.1], failure="no_done"), False),
        (record(0, []), False),
    ],
)
def test_goodput(made: Record, good: bool) -> None:
    assert is_good(made, TARGETS) is good


def test_no_requests_have_no_figures() -> None:
    found = block([], (0.0, 1.0), TARGETS)
    assert (found["tokens_per_s"], found["ttft_ms"], found["goodput"]["share"]) == (0, None, None)
    assert block([], (1.0, 1.0), TARGETS)["tokens_per_s"] is None


def test_failures_by_kind() -> None:
    records = [
        record(0, [], failure=kind, model=m) for kind, m in (("timeout", "a"), ("http_429", "b"), ("http_429", "c"))
    ]
    records[1].message = "later"
    found = failures([*records, record(0, [0.1])])
    assert list(found) == ["http_429", "timeout"]
    assert found["http_429"] == {"count": 2, "models": {"b": 1, "c": 1}, "example": "later"}


def test_what_makes_a_bottleneck() -> None:
    fine = {"cpu_share": 0.5, "lag_p99_ms": 5.0, "send_p95_ms": 5.0, "reached_max_open": 0}
    assert bottlenecks(**fine) == []  # type: ignore[arg-type]
    for name, value, says in (
        ("cpu_share", 0.9, "90%"), ("lag_p99_ms", 300.0, "300 ms late"), ("send_p95_ms", 900.0, "900 ms after"),
        ("reached_max_open", 3, "--max-open"),
    ):  # fmt: skip
        (reason,) = bottlenecks(**{**fine, name: value})  # type: ignore[arg-type]
        assert says in reason


# --- thresholds ------------------------------------------------------------------------------------------------------

SUMMARY = {
    "total": block([record(0, [0.2, 0.3]), record(0, [], failure="timeout")], (0.0, 1.0), TARGETS),
    "adapters": {"org/a:1": block([record(0, [0.2, 0.3])], (0.0, 1.0), TARGETS), "b": block([], (0.0, 1.0), TARGETS)},
    "swaps": None,
    "generator": {"cpu_share": 0.25, "bottleneck": True, "loop_lag_ms": None, "send_delay_ms": None},
}


@pytest.mark.parametrize(
    ("text", "value", "passed"),
    [
        ("failures>0", 1, False),
        ("failures > 1", 1, True),
        ("failures>=1", 1, False),
        ("ttft_p95_ms>199", 200, False),
        ("ttft_p95_ms>200", 200, True),
        ("tokens_per_s<2", 2, True),
        ("tokens_per_s<=2", 2, False),
        ("goodput_share<0.9", 0.5, False),
        ("org/a:1:goodput_share<0.9", 1, True),
        ("org/a:1:failures>0", 0, True),
        ("b:ttft_p95_ms>500", None, False),  # nothing was answered: no success
        ("nobody:ttft_p95_ms>500", None, False),
        ("swap_failures>0", None, False),
        ("generator_cpu_share>0.8", 0.25, True),
        ("generator_bottleneck>0", 1, False),
        ("send_delay_p95_ms>1e3", None, False),
    ],
)
def test_thresholds(text: str, value: float | None, passed: bool) -> None:
    checked = Threshold.parse(text).check(SUMMARY)
    assert checked["value"] == (None if value is None else pytest.approx(value))
    assert checked["passed"] is passed
    assert checked["fail_if"].split(">")[0].split("<")[0] == text.replace(" ", "").split(">")[0].split("<")[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ttft_p95_ms", "expected e.g."),
        ("ttft_p95_ms=5", "expected e.g."),
        ("ttft_p96_ms>5", "no figure 'ttft_p96_ms'; there are ttft_p50_ms"),
        ("a:swap_failures>5", "no figure 'swap_failures'"),
        ("failures>1e", "no number"),
    ],
)
def test_conditions_that_are_none(text: str, says: str) -> None:
    with pytest.raises(ThresholdError, match=f"--fail-if: .*{says}"):
        Threshold.parse(text)


def test_every_figure_is_in_a_summary() -> None:
    """A name that leads nowhere would fail each run that uses it. (Those of the run: tests/loadtest/test_run.py.)"""
    full = {"total": block([record(0, [0.1, 0.2, 0.3])], (0.0, 1.0), TARGETS), "adapters": {}}
    assert [name for name in OF_ADAPTER if Threshold(name, ">", 1e9).check(full)["value"] is None] == []
    assert not OF_ADAPTER.keys() & OF_RUN.keys()
