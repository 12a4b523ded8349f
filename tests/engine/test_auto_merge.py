"""When an adapter is merged by itself: the policy with times of its own, then the thread's looks over a scripted
manager."""

from __future__ import annotations

import pytest

from manylora.adapters.versions import AdapterRef
from manylora.server.engine.auto_merge import (
    AutoMerge,
    AutoMergePolicy,
    AutoMerger,
    Decision,
    Demote,
    Promote,
    TokenShares,
)
from manylora.server.engine.errors import MergeRefused
from manylora.server.engine.merges import Difference, Measured, MergeInfo
from manylora.server.engine.request import AdapterUse, Request, SamplingParams, ScheduledRow

SETTINGS = AutoMerge(0.5, 10.0)
NOTHING = Measured(Difference(0.0, 0.0), Difference(0.0, 0.0))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def told(policy: AutoMergePolicy, start: int, seconds: int, merged: str | None = None, **tokens: int) -> list[Decision]:
    """One observation a second of the same tokens ("base" for what cannot be merged)."""
    counts = {"" if version == "base" else version: n for version, n in tokens.items()}
    return [policy.observe(float(second), counts, merged) for second in range(start, start + seconds)]


def test_a_whole_window_is_seen_first() -> None:
    assert told(AutoMergePolicy(SETTINGS), 0, 11, a=9, base=1) == [None] * 10 + [Promote("a")]


@pytest.mark.parametrize(
    ("a", "base", "expected"), [(50, 50, None), (51, 49, Promote("a")), (0, 0, None), (0, 9, None)]
)
def test_more_than_the_share(a: int, base: int, expected: Decision) -> None:
    assert told(AutoMergePolicy(SETTINGS), 0, 11, a=a, base=base)[-1] == expected


def test_what_is_older_than_the_window_does_not_count() -> None:
    policy = AutoMergePolicy(SETTINGS)
    assert told(policy, 0, 20, base=100) == [None] * 20
    decisions = told(policy, 20, 10, a=10)
    # The window is (now - 10, now]: at 29 all of it is a's; when it has over half of 100 a second is arithmetic.
    assert decisions == [None] * 9 + [Promote("a")]


def test_it_stays_merged_a_fifth_below_the_share() -> None:
    policy = AutoMergePolicy(SETTINGS)
    assert told(policy, 0, 30, merged="a", a=41, b=30, c=29) == [None] * 30
    policy = AutoMergePolicy(SETTINGS)
    assert told(policy, 0, 11, merged="a", a=39, b=31, c=30)[-1] == Demote()


def test_another_adapter_takes_over_without_a_gap() -> None:
    policy = AutoMergePolicy(SETTINGS)
    assert told(policy, 0, 11, merged="a", a=30, b=70)[-1] == Promote("b")


def test_a_window_without_tokens_changes_nothing() -> None:
    policy = AutoMergePolicy(SETTINGS)
    told(policy, 0, 5, merged="a", a=1)
    assert told(policy, 5, 100, merged="a") == [None] * 100


def test_after_a_change_another_whole_window_is_seen() -> None:
    policy = AutoMergePolicy(SETTINGS)
    assert told(policy, 0, 11, a=1)[-1] == Promote("a")
    policy.changed(10.0)
    assert told(policy, 11, 10, merged="a", b=1) == [None] * 9 + [Promote("b")]


def test_what_could_not_be_merged_is_left_for_a_while() -> None:
    policy = AutoMergePolicy(SETTINGS)
    assert told(policy, 0, 11, a=1)[-1] == Promote("a")
    policy.failed(10.0, "a")
    assert told(policy, 11, 99, a=1) == [None] * 99
    assert told(policy, 110, 1, a=1) == [Promote("a")]


def test_no_flapping_about_the_share() -> None:
    """Shares that swing about the border, with changes carried out: one merge, never undone."""
    policy, merged, changes = AutoMergePolicy(SETTINGS), None, 0
    for second in range(400):
        a = 54 if second // 10 % 2 else 46
        decision = policy.observe(float(second), {"a": a, "": 100 - a}, merged)
        if decision is not None:
            merged = decision.version if isinstance(decision, Promote) else None
            policy.changed(float(second))
            changes += 1
    assert (merged, changes) == ("a", 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.8:60", AutoMerge(0.8, 60.0)), ("0.5:2.5:compact", AutoMerge(0.5, 2.5, "compact"))],
)
def test_parsing(text: str, expected: AutoMerge) -> None:
    assert AutoMerge.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.8", "expected SHARE:SECONDS"),
        ("a:b", "expected numbers"),
        ("1.0:60", "between 0 and 1, got 1"),
        ("nan:60", "between 0 and 1"),
        ("0.5:0.5", "must be 1 to 86400"),
        ("0.5:60:fast", "exact, compact, got 'fast'"),
        ("0.5:60:exact:x", "expected SHARE:SECONDS"),
    ],
)
def test_bad_settings_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoMerge.parse(text)


def row(*uses: AdapterUse, sample: bool = True) -> ScheduledRow:
    request = Request("r", [1, 2, 3], SamplingParams(), tuple(uses))
    return ScheduledRow(request, 0, 3 if sample else 2)


A, B = AdapterRef("a", "1" * 64), AdapterRef("b", "2" * 64)


def test_tokens_are_counted_by_what_could_be_merged() -> None:
    shares = TokenShares()
    rows = [row(AdapterUse(A)), row(AdapterUse(A)), row(AdapterUse(A), sample=False), row(AdapterUse(B, 0.5))]
    shares.count([*rows, row(AdapterUse(A), AdapterUse(B)), row()])
    counts, refs = shares.take()
    assert counts == {A.version: 2, "": 3}
    assert refs == {A.version: A}
    assert shares.take()[0] == {}


class Merges:
    def __init__(self) -> None:
        self.current: MergeInfo | None = None
        self.calls: list[str] = []
        self.refuses = False

    def merge(self, name: str, mode: str, *, version: str | None, automatic: bool) -> MergeInfo:
        self.calls.append(f"merge {name} {mode} {str(version)[:1]} {automatic}")
        if self.refuses:
            raise MergeRefused("it does not fit")
        self.current = MergeInfo(name, str(version), "compact", 1, NOTHING, 0.0, automatic)
        return self.current

    def unmerge(self, *, only: MergeInfo | None) -> MergeInfo:
        assert self.current is not None
        assert only is self.current
        self.calls.append(f"unmerge {self.current.name}")
        info, self.current = self.current, None
        return info


class Auto:
    def __init__(self) -> None:
        self.merges, self.shares, self.clock = Merges(), TokenShares(), Clock()
        settings = AutoMerge(0.5, 10.0, "compact")
        self.merger = AutoMerger(settings, self.merges, self.shares, clock=self.clock)

    def run(self, seconds: int, *uses: AdapterUse) -> list[str]:
        self.merges.calls.clear()
        for _ in range(seconds):
            self.shares.count([row(*uses)] * 5)
            self.merger.look()
            self.clock.now += 1.0
        return list(self.merges.calls)


def test_it_merges_and_unmerges() -> None:
    auto = Auto()
    assert auto.run(11, AdapterUse(A)) == ["merge a compact 1 True"]
    assert auto.run(40, AdapterUse(A)) == []
    assert auto.run(20) == ["unmerge a"]


def test_it_leaves_alone_what_was_merged_by_hand() -> None:
    auto = Auto()
    auto.merges.current = MergeInfo("b", B.version, "exact", 1, NOTHING, 0.0, automatic=False)
    assert auto.run(40, AdapterUse(A)) == []
    assert auto.run(40) == []


def test_a_refusal_is_not_repeated_at_every_look() -> None:
    auto = Auto()
    auto.merges.refuses = True
    assert auto.run(60, AdapterUse(A)) == ["merge a compact 1 True"]


def test_the_thread_looks_and_ends() -> None:
    auto = Auto()
    looked = []
    auto.merger.look = lambda: looked.append(len(looked))  # type: ignore[method-assign]
    auto.merger.start()
    auto.merger.close()
    auto.merger._thread.join(10)
    assert not auto.merger._thread.is_alive()
