"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from manylora.server.api.access.callers import Caller
from manylora.server.api.body import parse
from manylora.server.api.chunks import CompletionChunks
from manylora.server.api.context import context_of
from manylora.server.api.errors import bad_request
from manylora.server.api.generation import Envelope, PromptPlan, results, submit_all, usage_of
from manylora.server.api.logprobs import CompletionLogprobs, Echo, LogprobNames, prompt_logprobs
from manylora.server.api.on_demand import admit
from manylora.server.api.on_demand import lease as lease_of
from manylora.server.api.openapi.document import GENERATING, describes, events_of, json_of
from manylora.server.api.openapi.responses import Completion, CompletionChunk
from manylora.server.api.prompts import (
    INLINE_TOKENS,
    check_read_logprobs,
    check_speculation,
    fit,
    prompt_ids,
    sampling_params,
    token_rules,
)
from manylora.server.api.schemas import CompletionRequest
from manylora.server.api.state import AppState, Serving, state_of
from manylora.server.api.streaming import EventStreamResponse
from manylora.server.api.structured import grammar_of
from manylora.server.api.targets import fingerprint, target_of
from manylora.server.engine.request import FinishEvent, TokenEvent

router = APIRouter(tags=["inference"])

_DEFAULT_MAX_TOKENS: Final = 16

_INLINE_LOGPROBS: Final = 4096
"""Answers with more log-probabilities of prompt tokens are written on another thread: some ten milliseconds."""

Ended = tuple[TokenEvent, FinishEvent]


@router.post(
    "/v1/completions",
    openapi_extra=describes(
        CompletionRequest, answers={200: [json_of(Completion), events_of(CompletionChunk)]}, errors=GENERATING
    ),
)
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts."""
    state, context = state_of(request), context_of(request)
    serving = state.serving
    body = await parse(request, CompletionRequest, state.config.max_body_bytes)
    n_choices = len(body.prompt) * body.n_drawn
    if n_choices > state.config.max_choices:
        name = "n" if body.n == body.n_drawn else "best_of"
        raise bad_request(
            f"{len(body.prompt)} prompts times {name} = {body.n_drawn} are {n_choices} choices; at most "
            f"{state.config.max_choices} are taken in one request.",
            name if body.n_drawn > 1 else "prompt",
        )
    context.model = body.model
    target = await admit(state, target_of(serving, body), n_choices, context.caller)
    plans = await _plans(state, body, context.caller)
    echo = await _echo(state, body, plans, context.caller)
    logprobs = _logprobs(serving, body, plans, echo)
    # From here to the requests nothing is waited for.
    with await lease_of(state, target, n_choices, context.caller) as lease:
        envelope = Envelope.new("cmpl", target.model, fingerprint(serving, lease))
        streams = submit_all(serving, lease, body, plans, envelope.id, context)
    prompt_tokens = [len(plan.ids) for plan in plans]
    if body.stream:
        chunks = CompletionChunks(
            envelope,
            prompt_tokens,
            body.n,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            echo=echo,
            logprobs=[one.piece for one in logprobs],
            prompt_ids=[plan.ids for plan in plans for _ in range(body.n)] if body.return_token_ids else (),
        )
        return EventStreamResponse(streams, chunks, context)

    ended = await results(request.receive, streams, context)

    def choice(index: int, tokens: TokenEvent, finish: FinishEvent) -> dict[str, Any]:
        made: dict[str, Any] = {
            "index": index,
            "text": (echo[index] if echo else "") + tokens.text,
            "logprobs": logprobs[index].piece(tokens) if logprobs else None,
            "finish_reason": finish.reason,
            "stop_reason": finish.stop_reason,
        }
        if body.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs(serving.tokenizer, tokens.prompt_logprobs, body.prompt_logprobs)
        if body.return_token_ids:
            made |= {"prompt_token_ids": plans[index // body.n].ids, "token_ids": tokens.token_ids}
        return made

    def answer() -> Response:
        return JSONResponse(
            {
                "id": envelope.id,
                "object": "text_completion",
                "created": envelope.created,
                "model": envelope.model,
                "system_fingerprint": envelope.fingerprint,
                "choices": [choice(index, *one) for index, one in enumerate(_best(ended, body))],
                "usage": usage_of(prompt_tokens, [finish for _, finish in ended]),
            }
        )

    n_logprobs = sum(len(tokens.prompt_logprobs) for tokens, _ in ended) * (1 + (body.read_logprobs or 0))
    return answer() if n_logprobs <= _INLINE_LOGPROBS else await asyncio.to_thread(answer)


async def _plans(state: AppState, body: CompletionRequest, caller: Caller) -> list[PromptPlan]:
    serving = state.serving
    check_speculation(state.config.max_speculative_tokens, body)
    grammar = await token_rules(state, body, await grammar_of(state, body, caller), caller)
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    plans = []
    for read in await prompt_ids(state, body.prompt, caller, add_special_tokens=body.add_special_tokens):
        ids = fit(serving, body, read, body.max_tokens, "prompt")
        # The default is cut to what is left; a number that was asked for is honoured or refused (by `fit`).
        allowed = min(max_tokens, serving.max_context - len(ids))
        params = sampling_params(serving, body, max_tokens=allowed, logprobs=body.drawn_logprobs)
        plans.append(PromptPlan(ids, params, grammar))
    check_read_logprobs(body, sum(len(plan.ids) for plan in plans))
    return plans


def _best(ended: Sequence[Ended], body: CompletionRequest) -> list[Ended]:
    """Of each prompt's choices those to answer: all of them or, with ``best_of``, the likeliest, the best first."""
    if body.n_drawn == body.n:
        return list(ended)
    best: list[Ended] = []
    for first in range(0, len(ended), body.n_drawn):
        # A stable sort: of equals the first drawn, so that the same seed gives the same answer.
        best += sorted(ended[first : first + body.n_drawn], key=_mean_logprob, reverse=True)[: body.n]
    return best


def _mean_logprob(one: Ended) -> float:
    """Of a token, so that long answers do not lose by being long."""
    steps = one[0].logprobs
    return sum(step.sampled.logprob for step in steps) / len(steps) if steps else 0.0


async def _echo(state: AppState, body: CompletionRequest, plans: list[PromptPlan], caller: Caller) -> list[str]:
    """By choice, the text its completion follows; empty if not asked for."""
    if not body.echo:
        return []
    is_whole = body.truncate_prompt_tokens is None
    decode = state.serving.tokenizer.decode

    def decoded() -> list[str]:
        return [
            prompt if isinstance(prompt, str) and is_whole else decode(plan.ids, body.skip_special_tokens)
            for prompt, plan in zip(body.prompt, plans, strict=True)
        ]

    is_short = sum(len(plan.ids) for plan in plans) <= INLINE_TOKENS
    texts = decoded() if is_short else await state.prompt_work.run(caller.tenant.name, decoded)
    return [text for text in texts for _ in range(body.n)]


def _logprobs(
    serving: Serving, body: CompletionRequest, plans: list[PromptPlan], echo: list[str]
) -> list[CompletionLogprobs]:
    """By choice, what renders its log-probabilities; empty if not asked for."""
    if body.logprobs is None:
        return []
    names = LogprobNames(serving.tokenizer, as_ids=body.return_tokens_as_token_ids)
    return [
        CompletionLogprobs(
            serving.tokenizer,
            names,
            top=body.logprobs,
            skip_special_tokens=body.skip_special_tokens,
            echo=Echo(echo[index], plans[index // body.n].ids) if echo else None,
        )
        for index in range(len(plans) * body.n)
    ]
