"""Structured output: what a request asks of its text, as a compiled grammar."""

from __future__ import annotations

import asyncio

from manylora.server.api.access.callers import Caller
from manylora.server.api.errors import ApiError, bad_request
from manylora.server.api.schemas import GenerationRequest
from manylora.server.api.state import AppState
from manylora.server.engine.constraint import Grammar
from manylora.server.engine.grammar.sources import GrammarSpec, InvalidGrammar


class GrammarRefused(ApiError):
    """400. ``is_costly``: what it takes to compile it is more than it may take."""

    def __init__(self, message: str, param: str, *, is_costly: bool = False) -> None:
        super().__init__(400, message, param=param)
        self.is_costly = is_costly


async def compile_grammar(state: AppState, spec: GrammarSpec, param: str, caller: Caller) -> Grammar:
    """The grammar of ``spec``; if it is new, it is compiled on a thread that neither the event loop nor the engine
    waits for, in the tenant's turn. What nobody waits for any more is not begun.

    Raises GrammarQueueFull, or GrammarRefused naming ``param``: it is malformed, not supported or too costly, or this
    model is served without grammars.
    """
    grammars = state.serving.grammars
    if grammars is None:
        raise GrammarRefused(f"`{param}`: structured output is not served with this model's tokenizer.", param)
    try:
        return await asyncio.wrap_future(grammars.submit(spec, caller.tenant.name))
    except InvalidGrammar as error:
        raise GrammarRefused(f"`{param}`: {error}", param, is_costly=error.is_costly) from None


async def grammar_of(state: AppState, body: GenerationRequest, caller: Caller) -> Grammar | None:
    """What the body's fields ask of the output; None if they ask nothing. Raises as ``compile_grammar``."""
    asked = body.grammar
    if asked is None:
        return None
    param, spec = asked
    check_ends(body, param)
    return await compile_grammar(state, spec, param, caller)


def check_ends(body: GenerationRequest, param: str) -> None:
    """Raise ApiError if the body wants tokens beyond the end of an output that ``param`` constrains."""
    # A grammar says where the output ends, and it may end before that many tokens.
    if body.ignore_eos:
        raise bad_request(
            f"`ignore_eos` cannot be kept with `{param}`: the output ends where it is complete.", "ignore_eos"
        )
    if body.min_tokens:
        raise bad_request(
            f"`min_tokens` cannot be kept with `{param}`: the output ends where it is complete.", "min_tokens"
        )
