"""Drafts in the tokens of a step that nobody wants (rule 10 in scheduler.py), and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from manylora.server.engine.request import Request, ScheduledRow
from manylora.server.engine.scheduling.block_pool import BlockPool
from manylora.server.engine.scheduling.queue_entry import Entry
from manylora.server.engine.scheduling.step_draft import StepDraft


def add_drafts(step: StepDraft, running: Iterable[Entry], pool: BlockPool) -> None:
    """Give drafts to decoding rows of a step that is otherwise complete. Rows share what there is equally; what one
    does not use is left to those after it. Pages are taken only if they hold nothing: a guess is not worth
    a cached one."""
    speculating = [entry for entry in running if entry.request.drafter is not None]
    if not speculating:
        return
    room = step.room_for_drafts
    if room <= 0:
        return
    proposals: list[tuple[Entry, Sequence[int]]] = []
    for entry in speculating:
        tokens = _proposed(entry, room)
        if tokens:
            proposals.append((entry, tokens))
    for i, (entry, tokens) in enumerate(proposals):
        request = entry.request
        # One place of its pages is the known token's.
        places = (len(request.pages) + pool.num_empty) * pool.page_size - request.num_computed - 1
        tokens = tokens[: min(room // (len(proposals) - i), places)]
        if not tokens:
            continue
        pages = pool.allocate(max(pool.pages_for(request.num_computed + 1 + len(tokens)) - len(request.pages), 0))
        if pages is None:
            raise RuntimeError(f"{pool.num_empty} empty KV pages do not hold {len(tokens)} drafts")
        request.pages.extend(pages)
        step.speculate(entry, tokens)
        room -= len(tokens)


def _proposed(entry: Entry, room: int) -> Sequence[int]:
    """Drafts of a row that decodes, none of which would be beyond its last token."""
    request = entry.request
    if request.drafter is None or entry.num_left != 1:
        return ()
    limit = min(room, request.params.max_tokens - len(request.output_token_ids) - 1)
    return request.drafter.propose(request.prompt_token_ids, request.output_token_ids, limit) if limit > 0 else ()


def settle_drafts(row: ScheduledRow, num_accepted: int, pool: BlockPool) -> None:
    """After ``num_computed`` has been set to what was accepted: tell the drafter, and give back the pages that hold
    nothing else than what was not."""
    request: Request = row.request
    if request.drafter is not None:
        request.drafter.judge(len(row.drafts), num_accepted)
    kept = pool.pages_for(request.num_computed)
    pool.free(request.pages[kept:])
    del request.pages[kept:]
