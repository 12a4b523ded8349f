"""Prompts as token ids, within the context; and the sampling parameters that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from manylora.server.api.access.callers import Caller
from manylora.server.api.chat_schemas import ChatTemplateFields
from manylora.server.api.errors import bad_request
from manylora.server.api.messages import template_messages
from manylora.server.api.schemas import GenerationRequest, Prompt
from manylora.server.api.state import AppState, Serving
from manylora.server.engine.constraint import Grammar
from manylora.server.engine.grammar.token_rules import TokenRules
from manylora.server.engine.request import AdapterUse, SamplingParams

_INLINE_CHARACTERS: Final = 4096
"""Longer text is tokenised on another thread: about a millisecond, in which no other stream moves."""
_INLINE_MESSAGES: Final = 64

INLINE_TOKENS: Final = 4096
"""More are made into text on another thread."""

MAX_CHARACTERS_PER_TOKEN: Final = 128
"""The longest tokens that vocabularies have (runs of spaces); text of several thousand tokens has four or five."""

_SEED_RANGE: Final = 1 << 64

MAX_READ_LOGPROBS: Final = 1 << 20
"""In one answer: some 70 MB of JSON."""
MAX_STREAMED_LOGPROBS: Final = 1 << 16
"""In a stream, whose events are written where all other streams wait meanwhile."""


def check_token_ids(serving: Serving, ids: Sequence[int], param: str) -> None:
    """Raise ApiError unless every id is in the vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= serving.tokenizer.vocab_size):
        wrong = next(token for token in ids if not 0 <= token < serving.tokenizer.vocab_size)
        raise bad_request(
            f"`{param}` holds {wrong}, which is no token id: the vocabulary has {serving.tokenizer.vocab_size}.", param
        )


def check_length(serving: Serving, n_characters: int, param: str) -> None:
    """Raise ApiError for text that could not fit, before the time is spent on tokenising it."""
    limit = serving.max_context * MAX_CHARACTERS_PER_TOKEN
    if n_characters > limit:
        raise bad_request(
            f"`{param}` is too long: it has {n_characters} characters, and this model's maximum context length of "
            f"{serving.max_context} tokens never holds more than {limit}.",
            param,
        )


async def prompt_ids(
    state: AppState, prompts: Sequence[Prompt], caller: Caller, *, add_special_tokens: bool
) -> list[list[int]]:
    """Token ids of each prompt of a field `prompt`. Raises ApiError if one is too long for any tokens, or holds what is
    no token."""
    serving = state.serving

    def ids_of(prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return serving.tokenizer.encode(prompt, add_special_tokens)
        check_token_ids(serving, prompt, "prompt")
        return prompt

    for prompt in prompts:
        if isinstance(prompt, str):
            check_length(serving, len(prompt), "prompt")
    if sum(map(len, prompts)) <= _INLINE_CHARACTERS:
        return [ids_of(prompt) for prompt in prompts]
    return await state.prompt_work.run(caller.tenant.name, lambda: [ids_of(prompt) for prompt in prompts])


def template_of(state: AppState, body: ChatTemplateFields, uses: Sequence[AdapterUse]) -> str | None:
    """The chat template of a request, None for the base's own: the request's, or the adapter's if it ships one.

    Of several adapters, each was trained on its own template or on the base's: unless all have the same one, the base's
    is taken. Raises ApiError if the request brings a template and may not.
    """
    if body.chat_template is not None:
        if not state.config.allow_request_chat_template:
            raise bad_request(
                "`chat_template` in requests is off on this server (--allow-request-chat-template turns it on).",
                "chat_template",
            )
        return body.chat_template
    templates = {use.ref.chat_template for use in uses}
    return templates.pop() if len(templates) == 1 else None


async def chat_ids(state: AppState, body: ChatTemplateFields, template: str | None, caller: Caller) -> list[int]:
    """Token ids of a conversation, by the template that ``template_of`` found.

    Raises ApiError; ChatTemplateError if the template refuses the messages.
    """
    serving = state.serving
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs)
    if body.tools:
        kwargs["tools"] = [tool.for_template() for tool in body.tools]

    def ids() -> list[int]:
        try:
            messages = template_messages(body.messages)
        except RecursionError:
            raise bad_request("`messages` is nested too deeply.", "messages") from None
        check_length(serving, sum(len(message["content"]) for message in messages), "messages")
        text = serving.tokenizer.render_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=body.generation_prompt,
            continue_final_message=body.continue_final_message,
            **kwargs,
        )
        check_length(serving, len(text), "messages")
        # The template writes the special tokens itself.
        return serving.tokenizer.encode(text, add_special_tokens=False)

    # A template that the request or an adapter brought may loop for long: not on the event loop's thread.
    if template is None and not kwargs and _is_short(body.messages):
        return ids()
    return await state.prompt_work.run(caller.tenant.name, ids)


def _is_short(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether they are few, and plain and short texts all of them."""
    if len(messages) > _INLINE_MESSAGES or any(message.keys() != {"role", "content"} for message in messages):
        return False
    contents = [message["content"] for message in messages]
    return all(isinstance(one, str) for one in contents) and sum(map(len, contents)) <= _INLINE_CHARACTERS


def fit(serving: Serving, body: GenerationRequest, ids: list[int], max_tokens: int | None, param: str) -> list[int]:
    """The prompt, cut if ``truncate_prompt_tokens`` asks for it, after checking that it fits with its completion.

    The last tokens are kept, as vLLM does; -1 keeps as many as leave room for ``max_tokens`` (for one, if not given).
    """
    wanted = 1 if max_tokens is None else max_tokens
    if body.truncate_prompt_tokens is not None:
        keep = body.truncate_prompt_tokens
        if keep == -1:
            keep = max(serving.max_context - wanted, 1)
        ids = ids[-keep:]
    if not ids:
        raise bad_request(f"`{param}` has no tokens.", param)
    limit = serving.max_context
    if len(ids) + min(wanted, 1) > limit:
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
    """The engine's parameters for choice 0; see ``choice_seed``."""
    check_token_ids(serving, body.stop_token_ids, "stop_token_ids")
    check_token_ids(serving, list(body.logit_bias), "logit_bias")
    are_joined = body.skip_special_tokens or not serving.tokenizer.spaces_special_tokens
    if not body.spaces_between_special_tokens and not are_joined:
        raise bad_request(
            "`spaces_between_special_tokens` = false is not served for this model: its tokenizer puts spaces there.",
            "spaces_between_special_tokens",
        )
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
        prompt_logprobs=body.read_logprobs,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        skip_special_tokens=body.skip_special_tokens,
    )


def check_speculation(limit: int, body: GenerationRequest) -> None:
    """Raise ApiError if the request asks for more than ``limit`` (``--max-speculative-tokens``) drafts at once."""
    wanted = body.speculative_config
    if wanted is None:
        return
    if limit == 0:
        raise bad_request(
            "`speculative_config`: speculation is off on this server (--max-speculative-tokens 0).",
            "speculative_config",
        )
    if wanted.num_speculative_tokens > limit:
        raise bad_request(
            f"`speculative_config.num_speculative_tokens` is {wanted.num_speculative_tokens}; at most {limit} are "
            "taken on this server (--max-speculative-tokens).",
            "speculative_config.num_speculative_tokens",
        )


def check_read_logprobs(body: GenerationRequest, n_prompt_tokens: int) -> None:
    """Raise ApiError if the log-probabilities of prompts of so many tokens together would be too large an answer."""
    if body.read_logprobs is None:
        return
    # Every choice computes its prompt, and carries it.
    param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
    n_values = n_prompt_tokens * body.n_drawn * (body.read_logprobs + 1)
    limit = MAX_STREAMED_LOGPROBS if body.stream else MAX_READ_LOGPROBS
    if n_values > limit:
        raise bad_request(
            f"`{param}` asks for {n_values} log-probabilities of prompt tokens (tokens x choices x those listed at "
            f"each); at most {limit} are given in one {'stream' if body.stream else 'answer'}. Send fewer prompts, or "
            "ask for fewer.",
            param,
        )


async def token_rules(
    state: AppState, body: GenerationRequest, grammar: Grammar | None, caller: Caller
) -> Grammar | None:
    """``grammar``, narrowed down to what ``allowed_token_ids`` and ``bad_words`` leave."""
    if body.allowed_token_ids is None and not body.bad_words:
        return grammar
    serving = state.serving
    check_token_ids(serving, body.allowed_token_ids or (), "allowed_token_ids")
    if sum(map(len, body.bad_words)) <= _INLINE_CHARACTERS:
        banned = _sequences(serving, body.bad_words)
    else:
        banned = await state.prompt_work.run(caller.tenant.name, _sequences, serving, body.bad_words)
    return TokenRules(allowed=body.allowed_token_ids, banned=banned, grammar=grammar)


def _sequences(serving: Serving, words: Sequence[str]) -> list[list[int]]:
    """The tokens of ``bad_words``, however they are spelled."""
    found: list[list[int]] = []
    for word in words:
        # At the beginning of a text, and after another word: those are different tokens.
        spellings = {word, word.lstrip(), " " + word.lstrip()}
        sequences = [serving.tokenizer.encode(spelling, add_special_tokens=False) for spelling in sorted(spellings)]
        if not any(sequences):
            raise bad_request(
                f"`bad_words` holds {word!r}, which this model's tokenizer reads as nothing.", "bad_words"
            )
        found += sequences
    return found


def choice_seed(seed: int | None, choice: int) -> int | None:
    """A seed of its own for each of a prompt's ``n`` choices, or they would all be the same text.

    ``seed + choice``, as in vLLM, kept within 64 bits.
    """
    if seed is None:
        return None
    return (seed + choice + _SEED_RANGE // 2) % _SEED_RANGE - _SEED_RANGE // 2
