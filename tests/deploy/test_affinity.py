from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.deploy.ray_serve.affinity import AffinityPolicy, Placements, RandomPolicy, Replica

POLICY = AffinityPolicy(full=1.0, margin=0.5, slack=0.25)
IDS = [f"r{i}" for i in range(8)]


def first(adapters: list[str], *replicas: Replica) -> str:
    return POLICY.order(adapters, replicas)[0].id


def test_who_holds_the_adapter_is_first_however_busy_short_of_full() -> None:
    assert first(["a"], Replica("idle", 0, 8), Replica("holder", 7, 8, {"a"})) == "holder"


def test_of_several_holders_the_least_loaded_is_first() -> None:
    assert first(["a"], Replica("x", 5, 8, {"a"}), Replica("y", 4, 8, {"a"}), Replica("z", 0, 8)) == "y"


def test_an_overloaded_holder_gives_way_to_the_least_loaded() -> None:
    order = POLICY.order(["a"], [Replica("holder", 8, 8, {"a"}), Replica("busy", 6, 8), Replica("idle", 3, 8)])
    assert [replica.id for replica in order] == ["idle", "busy", "holder"]


def test_a_full_holder_is_not_overloaded_where_everybody_is_full() -> None:
    full = [Replica("holder", 10, 8, {"a"}), Replica("other", 8, 8)]
    assert first(["a"], *full) == "holder"
    assert first(["a"], Replica("holder", 12, 8, {"a"}), full[1]) == "other"


def test_a_composition_goes_where_all_of_it_is_held() -> None:
    half, whole = Replica("half", 0, 8, {"a"}), Replica("whole", 5, 8, {"a", "b"})
    assert first(["a", "b"], half, whole) == "whole"


def test_a_request_for_the_base_goes_to_the_least_loaded() -> None:
    assert first([], Replica("x", 3, 8, {"a"}), Replica("y", 1, 8), Replica("z", 2, 8)) == "y"


def test_loads_count_by_the_rows_that_a_replica_has() -> None:
    assert first([], Replica("small", 3, 4), Replica("large", 8, 16)) == "large"


def test_an_adapter_that_nobody_holds_is_at_home_somewhere_while_loads_differ_little() -> None:
    homes = {first([f"adapter-{i}"], *(Replica(id, 0, 8) for id in IDS)) for i in range(100)}
    assert homes == set(IDS)
    for i in range(20):
        home = first([f"adapter-{i}"], *(Replica(id, 0, 8) for id in IDS))
        assert first([f"adapter-{i}"], *(Replica(id, 2 if id == home else 0, 8) for id in reversed(IDS))) == home
        assert first([f"adapter-{i}"], *(Replica(id, 3 if id == home else 0, 8) for id in IDS)) != home


def test_the_parts_of_a_composition_make_one_home_in_whatever_order() -> None:
    replicas = [Replica(id, 0, 8) for id in IDS]
    assert POLICY.order(["a", "b"], replicas) == POLICY.order(["b", "a"], replicas)


def test_a_replica_that_goes_moves_only_what_was_at_home_there() -> None:
    everyone = [Replica(id, 0, 8) for id in IDS]
    for i in range(50):
        before = POLICY.order([f"adapter-{i}"], everyone)
        after = POLICY.order([f"adapter-{i}"], [replica for replica in everyone if replica.id != "r3"])
        assert after == [replica for replica in before if replica.id != "r3"]


replicas_strategy = st.lists(
    st.builds(
        Replica,
        id=st.uuids().map(str),
        load=st.integers(0, 40),
        rows=st.integers(1, 16),
        held=st.frozensets(st.sampled_from("abc")),
    ),
    max_size=12,
    unique_by=lambda replica: replica.id,
)


@given(replicas_strategy, st.lists(st.sampled_from("abcd"), max_size=3, unique=True))
def test_any_order_is_of_everybody_and_keeps_the_rule(replicas: list[Replica], adapters: list[str]) -> None:
    order = POLICY.order(adapters, replicas)
    assert Counter(order) == Counter(replicas)
    assert Counter(RandomPolicy(1).order(adapters, replicas)) == Counter(replicas)
    if not order:
        return
    least = min(replica.pressure for replica in replicas)
    chosen = order[0]
    fit = [
        replica
        for replica in replicas
        if all(name in replica.held for name in adapters)
        and not (replica.pressure >= 1.0 and replica.pressure - least >= 0.5)
    ]
    if fit:
        assert chosen in fit
        assert chosen.pressure == min(replica.pressure for replica in fit)
    else:
        assert chosen.pressure - least <= 0.25


def test_random_routing_goes_everywhere() -> None:
    policy = RandomPolicy(seed=5)
    replicas = [Replica("x", 0, 8, {"a"}), Replica("y", 100, 8), Replica("z", 0, 8)]
    chosen = Counter(policy.order(["a"], replicas)[0].id for _ in range(300))
    assert min(chosen.values()) > 70, chosen


@pytest.mark.parametrize("name", ["full", "margin", "slack"])
def test_a_threshold_below_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected 0 or more, got -0.1"):
        AffinityPolicy(**{name: -0.1})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_was_sent_is_held_until_reports_have_had_time_to_say_so() -> None:
    clock = Clock()
    placements = Placements(ttl_s=5, clock=clock)
    placements.sent("x", ["a"], slots=4)
    clock.now = 4.9
    assert "a" in placements.held("x", {"b"})
    assert "b" in placements.held("x", {"b"})
    assert "a" not in placements.held("y", {"b"})
    placements.sent("x", ["c"], slots=4)
    clock.now = 5.0
    assert "a" not in placements.held("x", {"b"})
    assert "c" in placements.held("x", ())


def test_no_more_is_remembered_than_there_are_slots_the_latest_stay() -> None:
    placements = Placements(ttl_s=5, clock=Clock())
    for name in ("a", "b", "a", "c"):
        placements.sent("x", [name], slots=2)
    held = placements.held("x", ())
    assert [name for name in "abc" if name in held] == ["a", "c"]


def test_replicas_that_are_gone_are_forgotten() -> None:
    placements = Placements(ttl_s=5, clock=Clock())
    placements.sent("x", ["a"], slots=2)
    placements.sent("y", ["a"], slots=2)
    placements.forget({"y"})
    assert "a" not in placements.held("x", ())
    assert "a" in placements.held("y", ())
