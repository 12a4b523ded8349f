"""One simulated replica, in cases that were worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from scaling import routing
from scaling.costs import Costs
from scaling.replica import Sizes
from scaling.simulation import Cluster
from scaling.tiers import Lookups
from scaling.traffic import BASE, Traffic

TENTH = Costs(((1, 0.1), (2, 0.1)), 0.0, 0.0, 0.03, 0.5, 1.0)
"""Every step takes 0.1 s, whatever is in it."""


def served(traffic: Traffic, costs: Costs, sizes: Sizes, *, in_host: range | None = None) -> Cluster:
    cluster = Cluster(traffic, routing.at_random, costs, sizes, 1)
    cluster.hold_in_host(in_host or ())
    cluster.run()
    return cluster


def test_a_request_alone_takes_what_its_steps_take() -> None:
    costs = Costs(((1, 0.011), (2, 0.012)), 0.001, 0.002, 0.03, 0.5, 1.0)
    traffic = Traffic([1.0, 3.0], [0, 0], [300, 10], [5, 5], 1)
    cluster = Cluster(traffic, routing.at_random, costs, Sizes(), 1)
    cluster.run()
    # From the disk, to the device, then 256 and 44 tokens in two steps of no row (10 ms); then four steps of one.
    prompt = 0.5 + 0.03 + 2 * (0.010 + 0.002) + 300 * 0.001
    assert cluster.answers.first_token_s[0] == pytest.approx(1.0 + prompt)
    assert cluster.answers.end_s[0] == pytest.approx(1.0 + prompt + 4 * (0.011 + 0.002))
    # On the device already.
    assert cluster.answers.first_token_s[1] == pytest.approx(3.0 + 0.010 + 0.002 + 10 * 0.001)
    assert cluster.replicas[0].counts == Lookups(slot_hits=1, slot_misses=1, uploads=1, reads=1)
    assert list(cluster.answers.missed) == [1, 0]
    # Waiting for the disk is not work.
    assert cluster.replicas[0].busy_s == pytest.approx(2 * 0.012 + 0.3 + 4 * 0.013 + 0.012 + 0.01 + 4 * 0.013)


def test_who_comes_during_a_step_begins_with_the_next() -> None:
    costs = Costs(((1, 0.1), (2, 0.2)), 0.0, 0.0, 0.0, 0.0, 1.0)
    traffic = Traffic([0.0, 0.25, 0.26], [-1, -1, -1], [1, 1, 1], [10, 2, 1], 0)
    cluster = Cluster(traffic, routing.at_random, costs, Sizes(), 1)
    cluster.run()
    # Steps of one row: 0 (its prompt, of no row: 0), then 0.1 each. The one that runs at 0.25 ends at 0.3, and the next
    # has one row and two prompts; then one step of two rows, and seven of one: 10 tokens in all.
    assert cluster.answers.first_token_s == pytest.approx([0.0, 0.4, 0.4])
    assert cluster.answers.end_s == pytest.approx([0.6 + 4 * 0.1, 0.6, 0.4])


def test_rows_are_taken_up_to_their_number() -> None:
    traffic = Traffic([0.0] * 3, [BASE] * 3, [1] * 3, [3, 4, 1], 0)
    cluster = served(traffic, TENTH, Sizes(rows=2))
    # The first begins at once, alone; the third when the first has ended, after its prompt and two more tokens.
    assert cluster.answers.first_token_s == pytest.approx([0.1, 0.2, 0.4])


def test_prompts_share_a_step_up_to_its_tokens() -> None:
    traffic = Traffic([0.0] * 3, [BASE] * 3, [100, 100, 50], [1] * 3, 0)
    cluster = served(traffic, TENTH, Sizes(step_tokens=150))
    assert cluster.answers.first_token_s == pytest.approx([0.1, 0.2, 0.2])
    traffic = Traffic([0.0, 0.05], [BASE] * 2, [1, 8], [9, 1], 0)
    cluster = served(traffic, TENTH, Sizes(rows=4, step_tokens=4))
    # A row that decodes takes one of the four tokens of each step: 3, 3 and 2 of the prompt.
    assert cluster.answers.first_token_s == pytest.approx([0.1, 0.4])


def test_adapters_take_turns() -> None:
    """A flood of one, then a request for another: it is the second to be served."""
    traffic = Traffic([0.0] * 5 + [0.01], [0] * 5 + [1], [1] * 6, [1] * 6, 2)
    cluster = served(traffic, TENTH, Sizes(rows=1), in_host=range(2))
    order = sorted(range(6), key=lambda i: cluster.answers.first_token_s[i])
    # After the first of the flood, one more has the same turn as the other adapter, and came before.
    assert order == [0, 1, 5, 2, 3, 4]


def test_reads_run_side_by_side_up_to_three() -> None:
    traffic = Traffic([0.0] * 4, [0, 1, 2, 3], [1] * 4, [1] * 4, 4)
    first = served(traffic, TENTH, Sizes()).answers.first_token_s
    # At 0.5 three are read; the first is uploaded by 0.53 and runs till 0.63, and the next step begins the next upload.
    assert first[0] == pytest.approx(0.63)
    assert min(first[1:3]) > first[0]
    assert 1.0 < first[3] < 1.3


def test_several_requests_wait_for_one_read_and_one_upload() -> None:
    traffic = Traffic([0.0, 0.1, 0.2], [0] * 3, [1] * 3, [1] * 3, 1)
    cluster = served(traffic, TENTH, Sizes())
    assert cluster.answers.first_token_s == pytest.approx([0.63] * 3)
    assert cluster.replicas[0].counts == Lookups(slot_misses=3, uploads=1, reads=1)


def test_who_needs_no_slot_passes_who_waits_for_the_disk_or_a_slot() -> None:
    traffic = Traffic([0.0, 1.0, 1.0, 1.0], [0, 1, 0, BASE], [1] * 4, [20, 1, 1, 1], 2)
    cluster = served(traffic, TENTH, Sizes(slots=2), in_host=range(1))
    first = cluster.answers.first_token_s
    # A step of the first, which was uploaded by 0.03, ends at 1.03; the second is read until 1.5 and uploaded by 1.56
    # (begun after the step that ends at 1.53), and begins after the step that ends at 1.63.
    assert first[2:] == pytest.approx([1.13, 1.13])
    assert first[1] == pytest.approx(1.73)
    assert list(cluster.answers.missed) == [1, 1, 0, 0]


def test_who_waits_for_a_slot_is_passed_by_a_few_rounds_only() -> None:
    count = 20
    traffic = Traffic([0.0, 0.05] + [0.06] * count, [0, 1] + [0] * count, [1] * (count + 2), [9] * (count + 2), 2)
    cluster = served(traffic, TENTH, Sizes(slots=1, rows=32), in_host=range(2))
    first = cluster.answers.first_token_s
    before = [i for i in range(2, count + 2) if first[i] < first[1]]
    # The other's turn is the second; the flood's turns 2 to 6 pass it, and no more.
    assert len(before) == 5
    assert cluster.replicas[0].counts.uploads == 3


def test_adapters_cost_their_step() -> None:
    costs = Costs(((1, 0.1), (2, 0.1)), 0.0, 1.0, 0.0, 0.0, 1.0)
    traffic = Traffic([0.0, 10.0, 10.0, 10.0, 10.0], [0, 0, 1, 1, BASE], [1] * 5, [1] * 5, 2)
    cluster = served(traffic, costs, Sizes(), in_host=range(2))
    # One adapter. Then the second is uploaded, which takes no time but is seen after a step: the base's, of no adapter.
    assert cluster.answers.first_token_s == pytest.approx([1.1, 11.1, 12.3, 12.3, 11.2])


def test_steps_beside_reads_and_uploads_take_longer() -> None:
    costs = Costs(((1, 0.1), (2, 0.1)), 0.0, 0.0, 0.25, 0.25, 1.0, drag=1.0)
    traffic = Traffic([0.0, 0.05], [BASE, 0], [1, 1], [6, 1], 1)
    cluster = served(traffic, costs, Sizes())
    # Read from 0.05 to 0.3: the step that begins at 0.1 takes 0.2. Uploaded from 0.3 to 0.55: so do those that begin at
    # 0.3 and 0.5. At 0.7 its prompt is in the step; then there is one more.
    assert cluster.answers.first_token_s == pytest.approx([0.1, 0.8])
    assert cluster.answers.end_s[0] == pytest.approx(0.9)
