"""``POST /v1/chat/completions``."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from manylora.server.api.body import parse
from manylora.server.api.chunks import ChatChunks
from manylora.server.api.context import context_of
from manylora.server.api.errors import bad_request
from manylora.server.api.generation import Envelope, PromptPlan, results, submit_all, usage
from manylora.server.api.logprobs import LogprobNames, chat_logprobs
from manylora.server.api.on_demand import lease as lease_of
from manylora.server.api.openapi import describes
from manylora.server.api.prompts import chat_ids, fit, sampling_params
from manylora.server.api.schemas import ChatRequest
from manylora.server.api.state import state_of
from manylora.server.api.streaming import EventStreamResponse
from manylora.server.api.targets import fingerprint, target_of

router = APIRouter(tags=["inference"])


@router.post("/v1/chat/completions", openapi_extra=describes(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """Continue a conversation."""
    state, context = state_of(request), context_of(request)
    serving = state.serving
    body = await parse(request, ChatRequest, state.config.max_body_bytes)
    if body.n > state.config.max_choices:
        raise bad_request(f"`n` is {body.n}; at most {state.config.max_choices} choices are taken.", "n")
    target = target_of(serving, body)
    with await lease_of(state, target, body.n, context.caller) as lease:
        wanted = body.max_completion_tokens or body.max_tokens
        ids = fit(serving, body, await chat_ids(state, body, lease.uses), wanted, "messages")
        top = (body.top_logprobs or 0) if body.logprobs else None
        params = sampling_params(serving, body, max_tokens=wanted or serving.max_context - len(ids), logprobs=top)
        envelope = Envelope.new("chatcmpl", target.model, fingerprint(serving, lease))
        streams = submit_all(serving, lease, body, [PromptPlan(ids, params)], envelope.id, context)
    logprobs = partial(chat_logprobs, LogprobNames(serving.tokenizer)) if body.logprobs else None
    if body.stream:
        chunks = ChatChunks(
            envelope,
            len(ids),
            body.n,
            include_usage=body.include_usage,
            continuous_usage=body.continuous_usage,
            logprobs=logprobs,
        )
        return EventStreamResponse(streams, chunks, context)

    ended = await results(request.receive, streams, context)
    choices: list[dict[str, Any]] = [
        {
            "index": index,
            "message": {"role": "assistant", "content": tokens.text, "refusal": None},
            "logprobs": logprobs(tokens.logprobs) if logprobs else None,
            "finish_reason": finish.reason,
            "stop_reason": finish.stop_reason,
        }
        for index, (tokens, finish) in enumerate(ended)
    ]
    return JSONResponse(
        {
            "id": envelope.id,
            "object": "chat.completion",
            "created": envelope.created,
            "model": envelope.model,
            "system_fingerprint": envelope.fingerprint,
            "choices": choices,
            "usage": usage(len(ids), sum(finish.completion_tokens for _, finish in ended)),
        }
    )
