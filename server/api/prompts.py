"""Prompts as token ids, within the context; and the sampling parameters that go with them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from manylora.server.api.errors import bad_request
from manylora.server.api.messages import template_messages
from manylora.server.api.schemas import ChatTemplateFields, GenerationRequest, Prompt
from manylora.server.api.state import AppState, Serving
from manylora.server.engine.request import AdapterUse, SamplingParams

_INLINE_CHARACTERS: Final = 4096
"""Longer text is tokenised on another thread: about a millisecond, in which no other stream moves."""

_SEED_RANGE: Final = 1 << 64


def check_token_ids(serving: Serving, ids: Sequence[int], param: str) -> None:
    """Raise ApiError unless every id is in the vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= serving.tokenizer.vocab_size):
        wrong = next(token for token in ids if not 0 <= token < serving.tokenizer.vocab_size)
        raise bad_request(
            f"`{param}` holds {wrong}, which is no token id: the vocabulary has {serving.tokenizer.vocab_size}.", param
        )


async def encode(serving: Serving, text: str, *, add_special_tokens: bool) -> list[int]:
    if len(text) <= _INLINE_CHARACTERS:
        return serving.tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(serving.tokenizer.encode, text, add_special_tokens)


async def prompt_ids(serving: Serving, prompt: Prompt, *, add_special_tokens: bool) -> list[int]:
    """Token ids of one prompt of ``/v1/completions``."""
    if isinstance(prompt, str):
        return await encode(serving, prompt, add_special_tokens=add_special_tokens)
    check_token_ids(serving, prompt, "prompt")
    return prompt


async def chat_ids(state: AppState, body: ChatTemplateFields, uses: Sequence[AdapterUse]) -> list[int]:
    """Token ids of a conversation, by the adapter's own template if it ships one, else the base's.

    Of several adapters, each was trained on its own template or on the base's: unless all have the same one, the base's
    is taken. Raises ApiError; ChatTemplateError if the template refuses the messages.
    """
    templates = {use.ref.chat_template for use in uses}
    template = templates.pop() if len(templates) == 1 else None
    if body.chat_template is not None:
        if not state.config.allow_request_chat_template:
            raise bad_request(
                "`chat_template` in requests is off on this server (--allow-request-chat-template turns it on).",
                "chat_template",
            )
        template = body.chat_template
    messages = template_messages(body.messages)
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs)
    if body.tools:
        kwargs["tools"] = body.tools

    def render() -> list[int]:
        return state.serving.tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=body.generation_prompt,
            continue_final_message=body.continue_final_message,
            **kwargs,
        )

    # A template that the request or an adapter brought may loop for long: not on the event loop's thread.
    is_short = sum(len(message["content"]) for message in messages) <= _INLINE_CHARACTERS
    return render() if is_short and template is None else await asyncio.to_thread(render)


def fit(serving: Serving, body: GenerationRequest, ids: list[int], max_tokens: int | None, param: str) -> list[int]:
    """The prompt, cut if ``truncate_prompt_tokens`` asks for it, after checking that it fits with its completion.

    The last tokens are kept, as vLLM does; -1 keeps as many as leave room for ``max_tokens`` (for one, if not given).
    """
    wanted = max_tokens or 1
    if body.truncate_prompt_tokens is not None:
        keep = body.truncate_prompt_tokens
        if keep == -1:
            keep = max(serving.max_context - wanted, 1)
        ids = ids[-keep:]
    if not ids:
        raise bad_request(f"`{param}` has no tokens.", param)
    limit = serving.max_context
    if len(ids) >= limit:
        raise bad_request(
            f"The prompt is too long: it has {len(ids)} tokens, and this model's maximum context length is {limit} "
            "tokens, prompt and completion together.",
            param,
        )
    if len(ids) + wanted > limit:
        raise bad_request(
            f"`max_tokens` is too large: {wanted}. This model's maximum context length is {limit} tokens, and the "
            f"prompt has {len(ids)}, so at most {limit - len(ids)} fit.",
            "max_tokens",
        )
    return ids


def sampling_params(
    serving: Serving, body: GenerationRequest, *, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """The engine's parameters for choice 0; see ``for_choice``."""
    check_token_ids(serving, body.stop_token_ids, "stop_token_ids")
    check_token_ids(serving, list(body.logit_bias), "logit_bias")
    if body.min_tokens > max_tokens:
        raise bad_request(
            f"`min_tokens` ({body.min_tokens}) must not be above the {max_tokens} tokens that may be generated.",
            "min_tokens",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        seed=body.seed,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=body.logit_bias,
        logprobs=logprobs,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
    )


def choice_seed(seed: int | None, choice: int) -> int | None:
    """A seed of its own for each of a prompt's ``n`` choices, or they would all be the same text.

    ``seed + choice``, as in vLLM, kept within 64 bits.
    """
    if seed is None:
        return None
    return (seed + choice + _SEED_RANGE // 2) % _SEED_RANGE - _SEED_RANGE // 2
