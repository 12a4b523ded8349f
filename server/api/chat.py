"""``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from manylora.server.api.access.callers import Caller
from manylora.server.api.body import parse
from manylora.server.api.chat_schemas import ChatRequest
from manylora.server.api.chunks import ChatChunks, Chunks, LogprobsPiece, ToolChatChunks
from manylora.server.api.context import context_of
from manylora.server.api.errors import ApiError, bad_request
from manylora.server.api.generation import Envelope, PromptPlan, results, submit_all, usage_of
from manylora.server.api.logprobs import LogprobNames, chat_logprobs, prompt_logprobs
from manylora.server.api.on_demand import admit
from manylora.server.api.on_demand import lease as lease_of
from manylora.server.api.openapi.document import GENERATING, describes, events_of, json_of
from manylora.server.api.openapi.responses import ChatCompletion, ChatCompletionChunk
from manylora.server.api.prompts import (
    chat_ids,
    check_read_logprobs,
    check_speculation,
    fit,
    sampling_params,
    template_of,
    token_rules,
)
from manylora.server.api.state import AppState, state_of
from manylora.server.api.streaming import EventStreamResponse
from manylora.server.api.structured import grammar_of
from manylora.server.api.targets import fingerprint, target_of
from manylora.server.api.tools.calls import CallReader, ToolCalling, tool_calling
from manylora.server.engine.request import FinishEvent

router = APIRouter(tags=["inference"])

_ATTEMPTS: Final = 3
"""To make the prompt before its adapter is replaced by a version with another template."""


@router.post(
    "/v1/chat/completions",
    openapi_extra=describes(
        ChatRequest, answers={200: [json_of(ChatCompletion), events_of(ChatCompletionChunk)]}, errors=GENERATING
    ),
)
async def create_chat_completion(request: Request) -> Response:
    """Continue a conversation."""
    state, context = state_of(request), context_of(request)
    serving = state.serving
    body = await parse(request, ChatRequest, state.config.max_body_bytes)
    if body.n > state.config.max_choices:
        raise bad_request(f"`n` is {body.n}; at most {state.config.max_choices} choices are taken.", "n")
    context.model = body.model
    target = await admit(state, target_of(serving, body), body.n, context.caller)
    for _ in range(_ATTEMPTS):
        with await lease_of(state, target, 1, context.caller) as lease:
            template = template_of(state, body, lease.uses)
        plan, calling = await _plan(state, body, template, context.caller)
        # From here to the requests nothing is waited for. The names may mean other versions by now.
        with await lease_of(state, target, body.n, context.caller) as lease:
            if template_of(state, body, lease.uses) == template:
                envelope = Envelope.new("chatcmpl", target.model, fingerprint(serving, lease))
                streams = submit_all(serving, lease, body, [plan], envelope.id, context)
                break
    else:
        raise ApiError(
            503,
            "The adapter asked for was replaced again and again, by versions with other chat templates; try again.",
            param=target.param,
            headers={"Retry-After": "1"},
        )
    ids = plan.ids
    names = LogprobNames(serving.tokenizer, as_ids=body.return_tokens_as_token_ids)
    logprobs = partial(chat_logprobs, names) if body.logprobs else None
    readers = [None if calling is None else calling.reader() for _ in range(body.n)]
    if body.stream:
        return EventStreamResponse(streams, _chunks(body, envelope, len(ids), readers, logprobs), context)

    ended = await results(request.receive, streams, context)
    choices: list[dict[str, Any]] = [
        {
            "index": index,
            "message": _message(tokens.text, readers[index]),
            "logprobs": logprobs(tokens.logprobs) if logprobs else None,
            "finish_reason": _finish_reason(finish, readers[index]),
            "stop_reason": finish.stop_reason,
        }
        for index, (tokens, finish) in enumerate(ended)
    ]
    answer = {
        "id": envelope.id,
        "object": "chat.completion",
        "created": envelope.created,
        "model": envelope.model,
        "system_fingerprint": envelope.fingerprint,
        "choices": choices,
        "usage": usage_of([len(ids)], [finish for _, finish in ended]),
    }
    if body.prompt_logprobs is None:
        return JSONResponse(answer)
    # Every choice has read the same prompt. There may be many values: they are written on another thread.
    read = ended[0][0].prompt_logprobs
    answer["prompt_logprobs"] = await asyncio.to_thread(prompt_logprobs, serving.tokenizer, read, body.prompt_logprobs)
    return await asyncio.to_thread(JSONResponse, answer)


async def _plan(
    state: AppState, body: ChatRequest, template: str | None, caller: Caller
) -> tuple[PromptPlan, ToolCalling | None]:
    """What a conversation is by ``template``. Takes as long as a template and a grammar may take."""
    serving = state.serving
    check_speculation(state.config.max_speculative_tokens, body)
    wanted = body.max_completion_tokens or body.max_tokens
    calling = await tool_calling(state, body, template, caller)
    grammar = await grammar_of(state, body, caller) if calling is None else calling.grammar
    grammar = await token_rules(state, body, grammar, caller)
    ids = fit(serving, body, await chat_ids(state, body, template, caller), wanted, "messages")
    check_read_logprobs(body, len(ids))
    top = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling_params(serving, body, max_tokens=wanted or serving.max_context - len(ids), logprobs=top)
    if calling is not None:
        params = replace(params, shown_special_ids=calling.shown_special_ids)
    return PromptPlan(ids, params, grammar), calling


def _chunks(
    body: ChatRequest,
    envelope: Envelope,
    prompt_tokens: int,
    readers: Sequence[CallReader | None],
    logprobs: LogprobsPiece | None,
) -> Chunks:
    usage_wanted = {"include_usage": body.include_usage, "continuous_usage": body.continuous_usage}
    callers = [reader for reader in readers if reader is not None]
    if callers:
        return ToolChatChunks(envelope, prompt_tokens, callers, logprobs=logprobs, **usage_wanted)
    return ChatChunks(envelope, prompt_tokens, body.n, logprobs=logprobs, **usage_wanted)


def _message(text: str, reader: CallReader | None) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "refusal": None} if reader is None else reader.message(text)


def _finish_reason(finish: FinishEvent, reader: CallReader | None) -> str:
    return finish.reason if reader is None else reader.finish_reason(finish)
