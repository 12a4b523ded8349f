"""``POST /v1/completions``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from manylora.server.api.body import parse
from manylora.server.api.chunks import CompletionChunks
from manylora.server.api.context import context_of
from manylora.server.api.errors import bad_request
from manylora.server.api.generation import Envelope, PromptPlan, results, submit_all, usage
from manylora.server.api.logprobs import CompletionLogprobs, LogprobNames
from manylora.server.api.on_demand import lease as lease_of
from manylora.server.api.openapi import describes
from manylora.server.api.prompts import fit, prompt_ids, sampling_params
from manylora.server.api.schemas import CompletionRequest
from manylora.server.api.state import Serving, state_of
from manylora.server.api.streaming import EventStreamResponse
from manylora.server.api.targets import fingerprint, target_of

router = APIRouter(tags=["inference"])

_DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", openapi_extra=describes(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts."""
    state, context = state_of(request), context_of(request)
    serving = state.serving
    body = await parse(request, CompletionRequest, state.config.max_body_bytes)
    n_choices = len(body.prompt) * body.n
    if n_choices > state.config.max_choices:
        raise bad_request(
            f"{len(body.prompt)} prompts times n = {body.n} are {n_choices} choices; at most "
            f"{state.config.max_choices} are taken in one request.",
            "n" if body.n > 1 else "prompt",
        )
    target = target_of(serving, body)
    with await lease_of(state, target, n_choices, context.caller) as lease:
        plans = await _plans(serving, body)
        envelope = Envelope.new("cmpl", target.model, fingerprint(serving, lease))
        streams = submit_all(serving, lease, body, plans, envelope.id, context)
    prompt_tokens = [len(plan.ids) for plan in plans]
    echo = _echo(serving, body, plans)
    logprobs = _logprobs(serving, body, n_choices)
    if body.stream:
        chunks = CompletionChunks(
            envelope,
            prompt_tokens,
            body.n,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            echo=echo,
            logprobs=[one.piece for one in logprobs],
        )
        return EventStreamResponse(streams, chunks, context)

    ended = await results(request.receive, streams, context)
    choices: list[dict[str, Any]] = [
        {
            "index": index,
            "text": (echo[index] if echo else "") + tokens.text,
            "logprobs": logprobs[index].piece(tokens.logprobs) if logprobs else None,
            "finish_reason": finish.reason,
            "stop_reason": finish.stop_reason,
        }
        for index, (tokens, finish) in enumerate(ended)
    ]
    return JSONResponse(
        {
            "id": envelope.id,
            "object": "text_completion",
            "created": envelope.created,
            "model": envelope.model,
            "system_fingerprint": envelope.fingerprint,
            "choices": choices,
            "usage": usage(sum(prompt_tokens), sum(finish.completion_tokens for _, finish in ended)),
        }
    )


async def _plans(serving: Serving, body: CompletionRequest) -> list[PromptPlan]:
    max_tokens = body.max_tokens or _DEFAULT_MAX_TOKENS
    plans = []
    for prompt in body.prompt:
        ids = await prompt_ids(serving, prompt, add_special_tokens=body.add_special_tokens)
        ids = fit(serving, body, ids, body.max_tokens, "prompt")
        # The default is cut to what is left; a number that was asked for is honoured or refused (by `fit`).
        allowed = min(max_tokens, serving.max_context - len(ids))
        plans.append(PromptPlan(ids, sampling_params(serving, body, max_tokens=allowed, logprobs=body.logprobs)))
    return plans


def _echo(serving: Serving, body: CompletionRequest, plans: list[PromptPlan]) -> list[str]:
    """By choice, the text its completion follows; empty if not asked for."""
    if not body.echo:
        return []
    is_whole = body.truncate_prompt_tokens is None
    texts = [
        prompt if isinstance(prompt, str) and is_whole else serving.tokenizer.decode(plan.ids, body.skip_special_tokens)
        for prompt, plan in zip(body.prompt, plans, strict=True)
    ]
    return [text for text in texts for _ in range(body.n)]


def _logprobs(serving: Serving, body: CompletionRequest, n_choices: int) -> list[CompletionLogprobs]:
    """By choice, what renders its log-probabilities; empty if not asked for."""
    if body.logprobs is None:
        return []
    names = LogprobNames(serving.tokenizer)
    return [
        CompletionLogprobs(serving.tokenizer, names, skip_special_tokens=body.skip_special_tokens)
        for _ in range(n_choices)
    ]
