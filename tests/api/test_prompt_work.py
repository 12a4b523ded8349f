"""What prompts cost is paid on threads, a few at a time for each tenant, and with no adapter held meanwhile."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec

import httpx
import pytest
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.api.prompt_work import JOBS_PER_TENANT, PromptWork
from manylora.server.api.state import Serving
from manylora.server.config import ApiConfig
from manylora.server.engine.constraint import Grammar
from manylora.server.engine.grammar.sources import GrammarSpec
from manylora.server.model.tokenizer import Tokenizer
from tests.api.fakes import FakeEngine, FakeTokenizer, write_adapter

Connect = Callable[..., TestClient]
P = ParamSpec("P")


def in_a_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def called(arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    return [
        USER,
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ]


class Watched(FakeTokenizer):
    """Notes on which threads it worked."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()
        self.encoded: list[int] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.threads.add(threading.get_ident())
        self.encoded.append(len(text))
        return super().encode(text, add_special_tokens)

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        self.threads.add(threading.get_ident())
        return super().decode(ids, skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        self.threads.add(threading.get_ident())
        return super().token_text(token_id)

    def render_chat_template(self, *args: Any, **kwargs: Any) -> str:
        self.threads.add(threading.get_ident())
        return super().render_chat_template(*args, **kwargs)


CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
SHORT: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [USER]}),
    (CHAT, {"messages": [USER] * 64}),
    (TOKENIZE, {"prompt": "x" * 4096, "return_token_strs": False}),
    (TOKENIZE, {"prompt": "x", "return_token_strs": True}),
    ("/v1/completions", {"prompt": ["x" * 32] * 128, "max_tokens": 1}),
    ("/v1/completions", {"prompt": [[65] * 32] * 128, "echo": True}),
    ("/detokenize", {"tokens": [65] * 100}),
]
LONG: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [USER] * 65}),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 4097}]}),
    (CHAT, {"messages": called('{"a": 1}')}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi", "name": "n"}]}),
    (CHAT, {"messages": [USER], "chat_template_kwargs": {"a": "x"}}),
    (TOKENIZE, {"messages": [USER], "tools": [TOOL]}),
    (TOKENIZE, {"prompt": "x" * 4097}),
    (TOKENIZE, {"prompt": "x" * 4097, "return_token_strs": True}),
    ("/v1/completions", {"prompt": ["x" * 33] * 128, "max_tokens": 1}),
    ("/v1/completions", {"prompt": [[65] * 33] * 128, "echo": True}),
    ("/detokenize", {"tokens": [65] * 5000}),
]


@pytest.mark.parametrize(
    ("is_short", "path", "body"), [(True, *one) for one in SHORT] + [(False, *one) for one in LONG]
)
@in_a_loop
async def test_long_work_is_done_on_other_threads(
    serving: Serving, config: ApiConfig, is_short: bool, path: str, body: dict[str, Any]
) -> None:
    tokenizer = Watched()
    serving = replace(serving, tokenizer=tokenizer, max_context=1 << 16)
    app = create_app(serving, replace(config, max_body_bytes=1 << 20, max_choices=128))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client:
        answer = await client.post(path, json={"model": "base", **body})
    assert answer.status_code == 200, answer.text
    here = threading.get_ident()
    assert tokenizer.threads <= {here} if is_short else here not in tokenizer.threads


def test_what_a_template_makes_of_a_conversation_is_measured(
    connect: Connect, config: ApiConfig, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the contents of the messages are long."""
    client = connect(replace(config, max_body_bytes=1 << 20))
    encoded: list[int] = []
    encode = FakeTokenizer.encode
    monkeypatch.setattr(
        FakeTokenizer, "encode", lambda self, text, s=True: encoded.append(len(text)) or encode(self, text, s)
    )
    for path in (CHAT, TOKENIZE):
        answer = client.post(path, json={"model": "base", "messages": called({"a": "x" * 100_000})})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages"
        assert "never holds more than" in answer.json()["error"]["message"]
    assert encoded == []


class Held:
    """Grammars that are compiled when the test says so."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.futures: list[Future[Grammar]] = []

    def submit(self, spec: GrammarSpec, tenant: str = "") -> Future[Grammar]:
        self.futures.append(Future())
        self.asked.set()
        return self.futures[-1]


class Anything:
    """A grammar without bounds."""

    def start(self) -> Any:
        return None


MODEL = "org/bob"
COMPILED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": MODEL, "prompt": "Hi", "guided_regex": "a"}),
    (CHAT, {"model": MODEL, "messages": [USER], "guided_regex": "a"}),
    (CHAT, {"model": "alice", "messages": [USER], "tools": [TOOL], "tool_choice": "required"}),
]


@pytest.mark.parametrize(("path", "body"), COMPILED)
@in_a_loop
async def test_nothing_is_held_while_a_grammar_is_compiled(
    serving: Serving, config: ApiConfig, path: str, body: dict[str, Any]
) -> None:
    """An adapter that is replaced meanwhile would stay in memory, for as long as a client likes."""
    grammars = Held()
    serving = replace(serving, grammars=grammars)
    app = create_app(serving, config)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client:
        asking = asyncio.create_task(client.post(path, json=body))
        await asyncio.wait_for(grammars.asked.wait(), 5)
        assert serving.registry.counts().requests_in_flight == 0  # type: ignore[attr-defined]
        for future in grammars.futures:
            future.set_result(Anything())
        assert (await asking).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
@in_a_loop
async def test_names_are_looked_up_before_a_grammar_is_compiled(serving: Serving, config: ApiConfig, path: str) -> None:
    grammars = Held()
    app = create_app(replace(serving, grammars=grammars), config)
    body = {"model": "nobody", "guided_regex": "a", "prompt": "x", "messages": [USER]}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client:
        assert (await asyncio.wait_for(client.post(path, json=body), 5)).status_code == 404
    assert grammars.futures == []


@pytest.mark.parametrize("n_changes", [1, 100])
def test_a_template_that_is_replaced_while_a_prompt_is_made(
    client: TestClient,
    serving: Serving,
    engine: FakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_changes: int,
) -> None:
    """What is generated on a version follows its own template, or there is an error to come again after."""
    render = FakeTokenizer.render_chat_template
    seen: list[str | None] = []

    def replacing(self: FakeTokenizer, *args: Any, **kwargs: Any) -> str:
        seen.append(kwargs["chat_template"])
        if len(seen) <= n_changes:
            content = json.dumps({"template" if len(seen) % 2 == 0 else "plain": len(seen)})
            serving.registry.load(MODEL, str(write_adapter(tmp_path / f"next{len(seen)}", content)), replace=True)
        return render(self, *args, **kwargs)

    monkeypatch.setattr(FakeTokenizer, "render_chat_template", replacing)
    body = {"model": MODEL, "messages": [USER], "chat_template_kwargs": {"a": 1}}
    answer = client.post(CHAT, json=body)
    if n_changes == 100:
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert engine.requests == []
        return
    assert answer.status_code == 200
    assert seen == ["[own template]", None]
    (request,) = engine.requests
    assert b"own template" not in bytes(token for token in request.prompt_token_ids if token < 256)
    assert request.adapters[0].ref.chat_template is None


def test_half_a_surrogate_pair_in_the_arguments_of_a_call(client: TestClient) -> None:
    for path in (CHAT, TOKENIZE):
        answer = client.post(path, json={"model": "base", "messages": called('{"a": "\\ud800"}')})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "messages.1.tool_calls.0.function.arguments"
    assert client.post(CHAT, json={"model": "base", "messages": called('{"a": "\\ud83d\\ude00"}')}).status_code == 200


def test_variables_that_are_the_names_of_arguments(client: TestClient, tokenizer: Tokenizer) -> None:
    answer = client.post(CHAT, json={"model": "base", "messages": [USER], "chat_template_kwargs": {"self": 1}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template_kwargs"
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.render_chat_template([USER], self=1)


@pytest.fixture
def tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(tokenizer_object=Backend(models.WordLevel({"a": 0}, unk_token="a")))
    hf.chat_template = "{{ messages[0].content }}"
    return Tokenizer(hf)


NESTED = [
    ("/v1/completions", '"prompt": "a", "guided_json": {}', True),
    ("/v1/completions", '"prompt": "a", "response_format": {{"type": {}}}', True),
    ("/v1/completions", '"prompt": "a", "n": {}', True),
    ("/v1/completions", '"prompt": "a", "suffix": {}', True),
    (CHAT, '"messages": [{{"role": {}}}]', True),
    (CHAT, '"messages": [{{"role": "user", "content": "x"}}], "chat_template_kwargs": {{"q": {}}}', False),
    (TOKENIZE, '"messages": [{{"role": [{}]}}]', True),
    (TOKENIZE, '"prompt": {}', True),
]


@pytest.mark.parametrize(("path", "fields", "is_refused"), NESTED)
def test_nesting_up_to_every_limit(
    connect: Connect, config: ApiConfig, path: str, fields: str, is_refused: bool
) -> None:
    client = connect(config, raise_bugs=False)
    seen = set()
    for depth in (*range(100, 700, 50), *range(700, 1000, 4)):
        content = '{"model": "base", ' + fields.format('{"a":' * depth + "{}" + "}" * depth) + "}"
        answer = client.post(path, content=content, headers={"content-type": "application/json"})
        seen.add(answer.status_code)
    assert seen <= {200, 400}
    assert not (is_refused and 200 in seen)


def test_messages_with_the_type_that_lm_eval_gives_them(client: TestClient, serving: Serving) -> None:
    assert client.post(CHAT, json={"model": "base", "messages": [USER | {"type": "text"}]}).status_code == 200
    assert isinstance(serving.tokenizer, FakeTokenizer)
    assert serving.tokenizer.templates[-1]["messages"] == [USER]
    for wrong in ("message", 1, ["text"]):
        answer = client.post(CHAT, json={"model": "base", "messages": [USER | {"type": wrong}]})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages.0.type"


@pytest.mark.parametrize("as_list", [False, True])
def test_long_stop_strings(client: TestClient, as_list: bool) -> None:
    """All that may become one is looked through again with each token."""
    for length, status in ((1024, 200), (1025, 400)):
        stop = "x" * length
        body = {"model": "base", "prompt": "a", "stop": ["b", stop] if as_list else stop}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == status
    assert answer.json()["error"]["param"] == "stop"
    assert "1024 characters" in answer.json()["error"]["message"]


def test_tools_that_no_template_shows_are_not_tokenised(client: TestClient) -> None:
    body = {"model": MODEL, "messages": [USER], "tools": [TOOL]}
    refused = [client.post(path, json=body) for path in (CHAT, TOKENIZE)]
    assert [answer.status_code for answer in refused] == [400, 400]
    assert refused[0].json() == refused[1].json()
    assert client.post(TOKENIZE, json=body | {"model": "base"}).status_code == 200


@in_a_loop
async def test_a_tenant_leaves_threads_to_the_others() -> None:
    work, release = PromptWork(), threading.Event()
    running = {"a": 0, "b": 0}

    def job(tenant: str) -> None:
        running[tenant] += 1
        release.wait(10)

    jobs = [asyncio.create_task(work.run("a", job, "a")) for _ in range(40)]
    await asyncio.sleep(0.05)
    jobs.append(asyncio.create_task(work.run("b", job, "b")))
    await asyncio.sleep(0.05)
    try:
        assert running == {"a": JOBS_PER_TENANT, "b": 1}
        for gone in jobs[2:20]:
            gone.cancel()
    finally:
        release.set()
    await asyncio.gather(*jobs, return_exceptions=True)
    assert running == {"a": 40 - 18, "b": 1}
    assert work.n_tenants == 0
