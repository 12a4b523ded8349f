"""``POST /tokenize`` and ``POST /detokenize``, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from manylora.server.api.body import parse, read_json, validate
from manylora.server.api.chat_schemas import TokenizeChatRequest
from manylora.server.api.context import RequestContext, context_of
from manylora.server.api.on_demand import lease as lease_of
from manylora.server.api.openapi.document import describes, json_of
from manylora.server.api.openapi.responses import Detokenized, Tokenized
from manylora.server.api.prompts import INLINE_TOKENS, chat_ids, check_token_ids, prompt_ids, template_of
from manylora.server.api.schemas import DetokenizeRequest, ModelChoice, TokenizeRequest
from manylora.server.api.state import AppState, state_of
from manylora.server.api.targets import Lease, target_of
from manylora.server.api.tools.calls import tools_shown

router = APIRouter(tags=["tokens"])


async def _lease(state: AppState, model: str | None, context: RequestContext) -> Lease:
    """Takes hold of the model that was named, if only so that a name that does not exist is an error here as well."""
    serving = state.serving
    context.model = model or serving.base_name
    return await lease_of(state, target_of(serving, ModelChoice(model=context.model)), 1, context.caller)


@router.post(
    "/tokenize",
    openapi_extra=describes(
        TokenizeRequest, TokenizeChatRequest, answers={200: [json_of(Tokenized)]}, errors={403, 404, 503}
    ),
)
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of a conversation as the model's chat template writes it."""
    state = state_of(request)
    serving = state.serving
    caller = context_of(request).caller
    raw = await read_json(request, state.config.max_body_bytes)
    body: TokenizeRequest | TokenizeChatRequest
    if raw.get("messages") is not None:
        body = validate(TokenizeChatRequest, raw)
        with await _lease(state, body.model, context_of(request)) as lease:
            template = template_of(state, body, lease.uses)
        if body.tools:
            await tools_shown(state, template)
        ids = await chat_ids(state, body, template, caller)
    else:
        body = validate(TokenizeRequest, raw)
        (await _lease(state, body.model, context_of(request))).close()
        (ids,) = await prompt_ids(state, [body.prompt], caller, add_special_tokens=body.add_special_tokens)

    def answer() -> Response:
        strings = [serving.tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
        return JSONResponse(
            {"count": len(ids), "max_model_len": serving.max_context, "tokens": ids, "token_strs": strings}
        )

    return answer() if len(ids) <= INLINE_TOKENS else await state.prompt_work.run(caller.tenant.name, answer)


@router.post(
    "/detokenize",
    openapi_extra=describes(DetokenizeRequest, answers={200: [json_of(Detokenized)]}, errors={403, 404, 503}),
)
async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens included."""
    state = state_of(request)
    body = await parse(request, DetokenizeRequest, state.config.max_body_bytes)
    context = context_of(request)
    (await _lease(state, body.model, context)).close()

    def answer() -> Response:
        check_token_ids(state.serving, body.tokens, "tokens")
        return JSONResponse({"prompt": state.serving.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    is_short = len(body.tokens) <= INLINE_TOKENS
    return answer() if is_short else await state.prompt_work.run(context.caller.tenant.name, answer)
