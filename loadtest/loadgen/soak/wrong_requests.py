"""Requests that are wrong, and the status with which each must be refused: none may be answered, none may be a 5xx.

``docs/api.md`` has the reasons. Broken adapters are the cases of ``tests/e2e/bad_content.py``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from tests.e2e.adapters import write_adapter
from tests.e2e.bad_content import CONTENT

MAX_BODY: Final = 64 << 10
"""--max-body of the soak's server."""
JSON: Final = "application/json"
NEVER_LOADED: Final = "soak-broken"
_SLOW = ("catastrophic", "hundred thousand", "nested deeply")
"""Cases that cost a second or more of a core each, as they are meant to: too much for a machine with two."""


@dataclass(frozen=True)
class Wrong:
    """``status`` is the only right answer, but for ``also``, which depends on what else is going on."""

    name: str
    status: int
    method: str
    path: str
    content: bytes
    content_type: str = JSON
    also: int | None = None

    def send(self, client: httpx.Client) -> httpx.Response:
        """httpx.HTTPError if there is no answer."""
        return client.request(self.method, self.path, content=self.content, headers={"Content-Type": self.content_type})


_FIELDS: Final[dict[str, dict[str, Any]]] = {
    "temperature below 0": {"temperature": -1},
    "temperature as a text": {"temperature": "1"},
    "top_p of 0": {"top_p": 0},
    "no choices": {"n": 0},
    "too many choices": {"n": 129},
    "best_of below n": {"n": 3, "best_of": 2},
    "a negative max_tokens": {"max_tokens": -1},
    "max_tokens beyond the context": {"max_tokens": 100_000},
    "an empty prompt": {"prompt": ""},
    "a token id out of the vocabulary": {"prompt": [1, 2, 1 << 30]},
    "a prompt longer than the context": {"prompt": "word " * 2000},
    "logprobs beyond the limit": {"logprobs": 21},
    "a seed of 70 bits": {"seed": 1 << 70},
    "a bias for no token": {"logit_bias": {"999999999": 1}},
    "too many stops": {"stop": ["x"] * 17},
    "a field that does not exist": {"temprature": 1},
    "stream_options without a stream": {"stream_options": {"include_usage": True}},
    "an unfinished regex": {"guided_regex": "("},
    "a regex that looks around": {"guided_regex": "(?=a)b"},
    "a schema of an unknown type": {"guided_json": {"type": "nonsense"}},
    "a schema that cannot be kept": {"guided_json": {"type": "array", "uniqueItems": True}},
    "a broken grammar": {"guided_grammar": "root ::= ("},
    "two grammars": {"guided_regex": "a", "guided_choice": ["a"]},
    "no choice to choose": {"guided_choice": []},
    "guesses beyond the limit": {"speculative_config": {"num_speculative_tokens": 64}},
    "an unknown drafter": {"speculative_config": {"method": "oracle"}},
    "a scale out of range": {"adapters": [{"name": "sql", "scale": 1000}]},
    "nine adapters": {"adapters": [{"name": "sql", "scale": 0.1}] * 9},
}
"""By what is wrong: fields laid over a good completion, all refused with 400."""


def wrong_requests(base: str) -> tuple[Wrong, ...]:
    """Those that are the same each time."""
    good = {"model": base, "prompt": "Hi", "max_tokens": 2}
    chat = {"model": base, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}

    def to(path: str, name: str, status: int, body: Any, method: str = "POST") -> Wrong:
        return Wrong(name, status, method, path, json.dumps(body).encode())

    def raw(name: str, status: int, content: bytes, content_type: str = JSON) -> Wrong:
        return Wrong(name, status, "POST", "/v1/completions", content, content_type)

    return (
        *(to("/v1/completions", name, 400, good | fields) for name, fields in _FIELDS.items()),
        to("/v1/completions", "an unknown model", 404, good | {"model": "nobody"}),
        to("/v1/completions", "an unknown adapter", 404, good | {"adapters": [{"name": "nobody"}]}),
        to("/v1/chat/completions", "an unknown model, in a chat", 404, chat | {"model": f"{base}:nobody"}),
        to("/v1/chat/completions", "no messages", 400, chat | {"messages": []}),
        to(
            "/v1/chat/completions", "a role that nobody has", 400, chat | {"messages": [{"role": "cat", "content": ""}]}
        ),
        to("/v1/chat/completions", "a prompt in a chat", 400, chat | {"prompt": "Hi"}),
        raw("no JSON", 400, b"{'model': 1}"),
        raw("half a body", 400, json.dumps(good).encode()[:-9]),
        raw("JSON that is a list", 400, b"[]"),
        raw("no body", 400, b""),
        raw("half a character", 400, b'{"model": "\xff"}'),
        raw("a body that is too large", 413, b'{"model": "' + b"x" * MAX_BODY + b'"}'),
        raw("a form", 415, b"model=base", "application/x-www-form-urlencoded"),
        to("/v1/no/such/path", "a path that does not exist", 404, good),
        to("/v1/models", "a method that the path does not have", 405, good, "PATCH"),
        to(f"/v1/adapters/{NEVER_LOADED}", "an adapter from nowhere", 400, {"source": "/nowhere/at/all"}, "PUT"),
        to(f"/v1/adapters/{NEVER_LOADED}", "an alias of nothing", 404, {"alias_of": "nobody"}, "PUT"),
        to(f"/v1/adapters/{NEVER_LOADED}", "a source and an alias", 400, {"source": "a", "alias_of": "b"}, "PUT"),
        to(f"/v1/adapters/{base}", "the base's own name", 400, {"alias_of": "sql"}, "PUT"),
        to("/v1/adapters/nobody", "unloading nothing", 404, {}, "DELETE"),
        to("/v1/adapters/nobody", "pinning nothing", 404, {"pinned": True}, "PATCH"),
        # 409 while another merge is being made: that is looked at first.
        Wrong("merging nothing", 404, "POST", "/v1/adapters/nobody/merge", b"{}", also=409),
        to("/v1/adapters/sql/merge", "merging in an unknown mode", 400, {"mode": "approximate"}),
        to("/v1/load_lora_adapter", "vLLM's load without a path", 400, {"lora_name": NEVER_LOADED}),
    )


def broken_adapters(folder: Path) -> tuple[Wrong, ...]:
    """Adapters below ``folder`` that must be refused when they are loaded, one directory a case."""
    made = []
    cases: Iterator[str] = (case for case in CONTENT if not any(word in case for word in _SLOW))
    for number, case in enumerate(cases):
        path = write_adapter(folder / f"broken-{number}", seed=number)
        CONTENT[case][0](path)
        body = json.dumps({"source": str(path)}).encode()
        made.append(Wrong(f"a broken adapter: {case}", 400, "PUT", f"/v1/adapters/{NEVER_LOADED}", body))
    return tuple(made)


def problem_of(wrong: Wrong, response: httpx.Response) -> str:
    """What is wrong with how it was refused; "" if nothing."""
    if response.status_code not in (wrong.status, wrong.also):
        return f"HTTP {response.status_code}, not {wrong.status}"
    try:
        error = response.json()["error"]
        said = error["code"] == response.status_code and bool(error["message"])
    except (ValueError, LookupError, TypeError):
        said = False
    return "" if said else "no error in the documented shape"


def choose(rng: random.Random, simple: tuple[Wrong, ...], broken: tuple[Wrong, ...]) -> Wrong:
    """One in eight is a broken adapter: those cost the server most."""
    return rng.choice(broken if rng.random() < 0.125 else simple)
