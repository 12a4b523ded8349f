"""Prompts of a known length, made from a seed: common words, each one token in most vocabularies.

The generator has no tokenizer, since it may face any server. So lengths are about right, never exact: a summary's
``prompt_tokens`` are the server's own count.
"""

from __future__ import annotations

import random
from typing import Final

_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea body information
back parent face others level office door health person art war history party result change morning reason
research girl guy moment air teacher force education old new good high small large next early young important few
public bad same able great long little own other big different local sure low late hard major better economic
strong possible whole free military true federal international full special easy clear recent certain personal
open red difficult available likely short single medical current wrong private past foreign fine common poor
natural significant similar hot dead central happy serious ready simple left physical general environmental
financial blue democratic dark various entire close legal religious cold final main green nice huge popular
traditional cultural
"""
WORDS: Final = tuple(_TEXT.split())


def words(count: int, seed: str) -> str:
    """``count`` random words, the same for the same ``seed``."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def prompt_text(tokens: int, *, prefix_tokens: int, model: str, seed: int) -> str:
    """About ``tokens`` tokens. The first ``prefix_tokens`` are the same in all prompts for ``model``, as in a system
    prompt, which a prefix cache can reuse; the rest depends on ``seed``."""
    prefix = words(min(prefix_tokens, tokens), f"prefix {model}")
    rest = words(max(tokens - prefix_tokens, 0), f"prompt {seed}")
    return f"{prefix} {rest}".strip()
