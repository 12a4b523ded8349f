"""What completions and chat share: submit one engine request for each choice, and see all of them to their end."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.types import Receive

from manylora.server.api.access.deadlines import timed_out
from manylora.server.api.context import RequestContext
from manylora.server.api.errors import ApiError, aborted, failed
from manylora.server.api.prompts import choice_seed
from manylora.server.api.schemas import GenerationRequest
from manylora.server.api.state import EventStream, Serving
from manylora.server.api.targets import Lease
from manylora.server.engine.constraint import Grammar
from manylora.server.engine.request import FinishEvent, Request, SamplingParams, TokenEvent

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Envelope:
    """What every object and chunk of one response repeats."""

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def new(cls, prefix: str, model: str, fingerprint: str) -> Envelope:
        return cls(f"{prefix}-{uuid.uuid4().hex}", model, fingerprint)


@dataclass(frozen=True)
class PromptPlan:
    """One prompt and how to continue it."""

    ids: list[int]
    params: SamplingParams
    grammar: Grammar | None = None


def submit_all(
    serving: Serving,
    lease: Lease,
    body: GenerationRequest,
    plans: Sequence[PromptPlan],
    request_id: str,
    context: RequestContext,
) -> list[EventStream]:
    """One engine request for each choice, in the order of the choices' indices: all of them, or none.

    Raises EngineRefusal; those submitted before it are aborted.
    """
    streams: list[EventStream] = []
    context.prompt_tokens = sum(len(plan.ids) for plan in plans)
    try:
        for plan in plans:
            for choice in range(body.n_drawn):
                request = Request(
                    # The client's id, for the log, and ours, as clients may use theirs twice at a time.
                    request_id=f"{context.request_id}/{request_id}-{len(streams)}",
                    prompt_token_ids=list(plan.ids),
                    params=replace(plan.params, seed=choice_seed(plan.params.seed, choice)),
                    adapters=lease.uses,
                    merged=lease.merged,
                    priority=body.priority,
                    tenant=context.caller.tenant,
                    cache_salt=body.cache_salt,
                    drafter=None if body.speculative_config is None else body.speculative_config.drafter(),
                    constraint=None if plan.grammar is None else plan.grammar.start(),
                    arrival_time=time.monotonic(),
                )
                streams.append(serving.engine.submit(request))
                lease.handed_over()
                context.submitted.append(len(plan.ids) + plan.params.max_tokens)
    except BaseException:
        context.submitted.clear()
        abort_all(streams)
        raise
    return streams


def abort_all(streams: Sequence[EventStream]) -> None:
    """Abort what has not ended; nothing happens to the rest."""
    for stream in streams:
        stream.abort()


@asynccontextmanager
async def aborting(receive: Receive, streams: Sequence[EventStream], context: RequestContext) -> AsyncIterator[None]:
    """Abort the requests as soon as their client is gone, or their time is up, and at the end of the block if they have
    not ended.

    An aborted request still ends with its FinishEvent, so the block needs no cancelling.
    """

    def late() -> None:
        context.is_late = True
        abort_all(streams)

    watcher = asyncio.create_task(_abort_on_disconnect(receive, streams))
    timer = None if context.deadline is None else asyncio.get_running_loop().call_at(context.deadline, late)
    try:
        yield
    finally:
        watcher.cancel()
        if timer is not None:
            timer.cancel()
        abort_all(streams)


async def _abort_on_disconnect(receive: Receive, streams: Sequence[EventStream]) -> None:
    message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()
    abort_all(streams)


def failure(finish: FinishEvent, context: RequestContext) -> ApiError | None:
    """The error that a final event stands for; None if the request ended as it should."""
    if finish.reason == "error" and finish.is_unavailable and not context.caller.may_use_all:
        # What is wrong with an adapter names files of this machine.
        _log.warning("an adapter that a tenant asked for is not available: %s", finish.error)
        return failed(None, is_unavailable=True)
    if finish.reason == "error":
        return failed(finish.error, is_unavailable=finish.is_unavailable, is_refusal=finish.is_refusal)
    if finish.reason == "abort":
        return timed_out() if context.is_late else aborted()
    return None


async def results(
    receive: Receive, streams: Sequence[EventStream], context: RequestContext
) -> list[tuple[TokenEvent, FinishEvent]]:
    """Everything, by choice. Raises ApiError if a choice failed; the others are then aborted, not waited for. Raises
    ApiError 504 if that takes until after the request's deadline."""

    async def one(stream: EventStream) -> tuple[TokenEvent, FinishEvent]:
        tokens, finish = await stream.result()
        if finish.reason in ("error", "abort"):
            abort_all(streams)
        return tokens, finish

    async with aborting(receive, streams, context):
        if len(streams) == 1:
            ended = [await one(streams[0])]
        else:
            ended = await asyncio.gather(*(one(stream) for stream in streams))
    context.finished += [finish for _, finish in ended]
    # The one that failed, not those that were aborted because of it.
    for finish in sorted((finish for _, finish in ended), key=lambda finish: finish.reason != "error"):
        error = failure(finish, context)
        if error is not None:
            raise error
    return ended


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's ``usage``. ``prompt_tokens_details`` is there, as with vLLM, if some of the prompt was cached."""
    made: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if cached_tokens:
        made["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return made


def usage_of(prompt_tokens: Sequence[int], finishes: Sequence[FinishEvent]) -> dict[str, Any]:
    """The ``usage`` of a response: ``finishes`` has as many choices of each prompt, one prompt's after the other's. A
    prompt is counted once, however many choices continue it, with what was cached when its first choice began."""
    n = len(finishes) // len(prompt_tokens)
    completion_tokens = sum(finish.completion_tokens for finish in finishes)
    return usage(sum(prompt_tokens), completion_tokens, sum(finish.cached_tokens for finish in finishes[::n]))
