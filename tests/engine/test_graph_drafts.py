"""Rows with drafts among decode graphs: as many rows of one token, with the bits of a row without drafts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from manylora.server.engine.request import Request, SampledToken, ScheduledRow, StepPlan
from tests.engine.test_decode_graphs import Runner, prompt
from tests.kernels.ordered_dot import ordered_dot  # noqa: F401 - a fixture
from tests.model.cuda_model import by_slot, last_token, request


@pytest.fixture
def runner() -> Runner:
    return Runner()


def drafting(r: Request, *drafts: int) -> ScheduledRow:
    return ScheduledRow(r, r.num_tokens - 1, 1 + len(drafts), drafts)


def draft_logits(runner: Runner, *rows: ScheduledRow) -> dict[str, torch.Tensor]:
    """Of each row with drafts, the logits behind its drafts."""
    runner.runner.execute(StepPlan(by_slot(rows)))
    return {request_id: logits.cpu() for request_id, (_, logits) in runner.runner._drafted.items()}


@pytest.mark.usefixtures("ordered_dot")
def test_the_bits_are_those_of_single_steps(runner: Runner) -> None:
    """A row with two drafts beside a row without, then the same tokens one at a time."""
    one, other = request(1, 15, 0), request(2, 3, 2)  # the drafts lie in another page than the prompt
    runner.step(*map(prompt, (one, other)))
    found = draft_logits(runner, drafting(one, 7, 9), last_token(other))["r1"]
    assert runner.seen == [], "there are graphs for three rows, and these are four"
    for i, draft in enumerate((7, 9)):
        one.output_token_ids.append(draft)
        assert torch.equal(runner.decode_logits(one)[0], found[i])


@pytest.mark.usefixtures("ordered_dot")
def test_they_are_replayed_if_the_graphs_have_room(runner: Runner) -> None:
    one = request(1, 15, 0)
    runner.step(prompt(one))
    found = draft_logits(runner, drafting(one, 7, 9))["r1"]
    assert runner.seen == [3]
    one.output_token_ids.append(7)
    assert torch.equal(runner.decode_logits(one)[0], found[0])


def test_what_is_drawn_on_is_what_single_steps_draw(runner: Runner) -> None:
    """Greedy, the drafts right: three tokens of one step; and beside them a prompt that begins."""
    slow, fast, new = request(1, 5, 0), request(2, 5, 0), request(0, 4, None)
    fast.prompt_token_ids = list(slow.prompt_token_ids)
    runner.step(prompt(slow), prompt(fast))
    for _ in range(3):
        runner.step(last_token(slow))
    first = slow.output_token_ids[0]
    assert fast.output_token_ids == [first]
    row = drafting(fast, *slow.output_token_ids[1:3])
    plan = StepPlan(by_slot([row, prompt(new)]))
    tokens = runner.runner.execute(plan)
    assert set(tokens) == {"r2", "r0"}
    drawn = tokens["r2"]
    for _ in range(2):
        assert isinstance(drawn, SampledToken)
        fast.output_token_ids.append(drawn.token_id)
        drawn = runner.runner.draw_on([fast])["r2"]
    assert isinstance(drawn, SampledToken)
    assert [*fast.output_token_ids, drawn.token_id] == slow.output_token_ids
    assert runner.seen == [1, 1, 1, 3]
