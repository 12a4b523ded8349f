"""Tools over HTTP: what is asked of the model, what of its output is calls, streamed and whole."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema_rs
import pytest
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.api.state import Serving
from manylora.server.api.tools.formats import FORMATS
from manylora.server.config import ApiConfig, ConfigError, ToolCallParser
from manylora.server.engine.constraint import Grammar
from manylora.server.engine.errors import GrammarQueueFull
from manylora.server.engine.grammar.grammars import GrammarCompiler
from manylora.server.engine.grammar.sources import GrammarSpec, InvalidGrammar
from manylora.server.engine.grammar.token_rules import TokenRules
from manylora.server.engine.grammar.vocabulary import GrammarVocabulary
from manylora.server.engine.request import Request, TokenEvent
from tests.api.fakes import EOS, FakeEngine, FakeTokenizer, Step, finish, make_serving, token
from tests.api.tool_grammars import drawn, spelled

USER = {"role": "user", "content": "What is the weather in Paris?"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS},
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
SCHEMAS = {"get_weather": PARAMETERS, "now": {"type": "object", "additionalProperties": False}}
TOOLS = [WEATHER, NOW]
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCompiler]:
    table = FakeTokenizer()
    tokens = [table.token_bytes(i) for i in range(table.vocab_size)]
    compiler = GrammarCompiler(GrammarVocabulary(tokens, sorted(table.special_ids), [EOS]).trie())
    yield compiler
    compiler.close()


@pytest.fixture
def serving(tmp_path: Path, grammars: GrammarCompiler) -> Serving:
    return replace(make_serving(tmp_path), grammars=grammars)


@pytest.fixture
def templates(serving: Serving) -> list[dict[str, Any]]:
    assert isinstance(serving.tokenizer, FakeTokenizer)
    return serving.tokenizer.templates


def says(*texts: str, reason: str = "stop", stop_reason: Any = None) -> Callable[[Request], list[Step]]:
    """A model that says this, one step for each text."""

    def script(request: Request) -> list[Step]:
        k = request.params.logprobs
        return [*([token(text, logprobs=k)] for text in texts), [finish(request, reason, n=7, stop_reason=stop_reason)]]

    return script


def obeys(seed: int) -> Callable[[Request], list[Step]]:
    """A model that draws its output from the request's grammar and knows nothing else."""

    def script(request: Request) -> list[Step]:
        assert request.constraint is not None
        rng = random.Random(f"{seed} {request.request_id[-1]}")
        texts = spelled(drawn(request.constraint, rng, hints=("<tool_call>", "\n")))
        return [[TokenEvent(text, tuple(text.encode()))] for text in texts] + [[finish(request, "stop", n=len(texts))]]

    return script


def post(client: TestClient, **fields: Any) -> Any:
    body = {"model": "base", "messages": [USER], "tools": TOOLS, **fields}
    return client.post("/v1/chat/completions", json=body)


def chat(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = post(client, **fields)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def refused(client: TestClient, **fields: Any) -> tuple[str, str]:
    response = post(client, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


def frames(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    response = post(client, stream=True, **fields)
    assert response.status_code == 200, response.text
    *lines, done = [line for line in response.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def choices(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    return [frame["choices"][0] for frame in frames(client, **fields)]


def put_together(chunks: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The message and the finish reason of one choice's chunks, as clients accumulate them."""
    message: dict[str, Any] = {"role": chunks[0]["delta"]["role"], "content": chunks[0]["delta"]["content"]}
    calls: list[dict[str, Any]] = []
    for chunk in chunks[1:]:
        delta = chunk["delta"]
        assert set(delta) <= {"content", "tool_calls"}, "the role comes once"
        if "content" in delta:
            assert delta["content"]
            message["content"] = (message["content"] or "") + delta["content"]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(calls)
                assert call["function"]["arguments"] == ""
                calls.append({key: value for key, value in call.items() if key != "index"})
                calls[-1]["function"] = dict(call["function"])
            else:
                assert set(call) == {"index", "function"}
                assert call["function"]["arguments"]
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    assert [chunk["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return message | ({"tool_calls": calls} if calls else {}), chunks[-1]["finish_reason"]


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{key: value for key, value in call.items() if key != "id"} for call in message.get("tool_calls", ())]
    content = message["content"]
    return {"content": content, "calls": calls}


# --- what the model chooses -------------------------------------------------------------------------------------------


def test_a_call_has_openais_shape(client: TestClient, engine: FakeEngine, templates: list[dict[str, Any]]) -> None:
    engine.script = says("Let me see.\n", CALL)
    choice = chat(client)
    [call] = choice["message"].pop("tool_calls")
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "get_weather", "arguments": PARIS}}
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Let me see.", "refusal": None},
        "logprobs": None,
        "finish_reason": "tool_calls",
        "stop_reason": None,
    }
    assert templates[-1]["tools"] == TOOLS
    assert engine.requests[0].constraint is None  # the model chose, and nothing was asked to be strict


def test_content_is_null_beside_calls_alone(client: TestClient, engine: FakeEngine) -> None:
    engine.script = says(CALL, "\n", CALL)
    choice = chat(client)
    assert choice["message"]["content"] is None
    calls = choice["message"]["tool_calls"]
    assert len({call["id"] for call in calls}) == 2


def test_an_answer_without_calls_is_a_message(client: TestClient, engine: FakeEngine) -> None:
    bad = CALL.replace("get_weather", "get_wether")
    for text in ("Sunny.", bad, " \n"):
        engine.script = says(text)
        choice = chat(client)
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert choice["finish_reason"] == "stop"


def test_none_is_not_read_for_calls(client: TestClient, engine: FakeEngine, templates: list[dict[str, Any]]) -> None:
    engine.script = says(CALL)
    choice = chat(client, tool_choice="none")
    assert choice["message"]["content"] == CALL
    assert templates[-1]["tools"] == TOOLS


def test_without_parallel_calls_there_is_one(client: TestClient, engine: FakeEngine) -> None:
    engine.script = says(CALL, CALL)
    assert len(chat(client, parallel_tool_calls=False)["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(("reason", "expected"), [("stop", "tool_calls"), ("length", "length")])
def test_the_finish_reason(client: TestClient, engine: FakeEngine, reason: str, expected: str) -> None:
    engine.script = says(CALL, reason=reason)
    assert chat(client)["finish_reason"] == expected
    assert choices(client)[-1]["finish_reason"] == expected


def test_what_templates_see_of_a_tool(client: TestClient, templates: list[dict[str, Any]]) -> None:
    chat(client, tools=[{"function": {"parameters": {}, "strict": False, "name": "f"}, "type": "function"}])
    assert json.dumps(templates[-1]["tools"]) == json.dumps(
        [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    )


def test_tokenize_shows_the_tools_to_the_template(client: TestClient, templates: list[dict[str, Any]]) -> None:
    response = client.post("/tokenize", json={"model": "base", "messages": [USER], "tools": TOOLS})
    assert response.status_code == 200, response.text
    assert templates[-1]["tools"] == TOOLS


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_streamed_call_is_framed_as_openai_does(client: TestClient, engine: FakeEngine) -> None:
    engine.script = says(*CALL)
    role, start, arguments, end = choices(client)
    assert role["delta"] == {"role": "assistant", "content": None}
    [call] = start["delta"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"index": 0, "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    assert arguments["delta"] == {"tool_calls": [{"index": 0, "function": {"arguments": PARIS}}]}
    assert (end["delta"], end["finish_reason"]) == ({}, "tool_calls")


def test_text_before_a_call_is_streamed_as_content(client: TestClient, engine: FakeEngine) -> None:
    engine.script = says("Let ", "me see", " <", "b>.", "\n", *CALL)
    deltas = [choice["delta"] for choice in choices(client)]
    assert deltas[:5] == [
        {"role": "assistant", "content": ""},
        {"content": "Let"},
        {"content": " me see"},
        {"content": " <b>."},
        deltas[4],
    ]
    assert deltas[4]["tool_calls"][0]["function"]["name"] == "get_weather"


TEXTS = [
    "",
    "Sunny.",
    CALL,
    f"See: {CALL}\n{CALL} done",
    CALL[:-20],
    CALL.replace("}}", "}"),
    "a <tool_call",
    f" {CALL} ",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_stream_is_the_whole_answer_in_pieces(client: TestClient, engine: FakeEngine, text: str, reason: str) -> None:
    engine.script = says(text, reason=reason)
    whole = chat(client)
    for texts in ([text], [*text]):
        engine.script = says(*texts, reason=reason)
        message, finish_reason = put_together(choices(client))
        assert without_ids(message) == without_ids(whole["message"])
        assert finish_reason == whole["finish_reason"]


def test_usage_and_logprobs_in_a_stream(client: TestClient, engine: FakeEngine) -> None:
    engine.script = says("Hm. ", CALL)
    fields = {"logprobs": True, "top_logprobs": 1, "stream_options": {"include_usage": True}}
    *chunks, last = frames(client, **fields)
    assert last["usage"]["completion_tokens"] == 7
    told = [one["token"] for f in chunks for one in (f["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert "".join(told) == "Hm. " + CALL


def test_choices_are_read_apart(client: TestClient, engine: FakeEngine) -> None:
    def script(request: Request) -> list[Step]:
        return says(*(CALL if request.request_id.endswith("-1") else "Sunny."))(request)

    engine.script = script
    [first, second] = post(client, n=2).json()["choices"]
    assert (first["finish_reason"], second["finish_reason"]) == ("stop", "tool_calls")
    by_index: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for frame in frames(client, n=2):
        by_index[frame["choices"][0]["index"]].append(frame["choices"][0])
    assert put_together(by_index[0])[0]["content"] == "Sunny."
    assert put_together(by_index[1])[0]["tool_calls"][0]["function"]["arguments"] == PARIS


# --- what the request forces ------------------------------------------------------------------------------------------


def checked_calls(message: dict[str, Any]) -> list[str]:
    """The names, after checking each call's arguments against its schema."""
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    for call in message.get("tool_calls", ()):
        jsonschema_rs.validate(SCHEMAS[call["function"]["name"]], json.loads(call["function"]["arguments"]))
    return names


@pytest.mark.parametrize("seed", range(3))
def test_required_calls_are_always_valid(client: TestClient, engine: FakeEngine, seed: int) -> None:
    engine.script = obeys(seed)
    choice = chat(client, tool_choice="required")
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert checked_calls(choice["message"])
    assert len(checked_calls(chat(client, tool_choice="required", parallel_tool_calls=False)["message"])) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_named_function_is_the_one_called(client: TestClient, engine: FakeEngine, seed: int) -> None:
    engine.script = obeys(seed)
    choice = chat(client, tool_choice=NAMED)
    assert checked_calls(choice["message"]) == ["get_weather"]
    assert choice["finish_reason"] == "stop"  # the model had no choice, so there is nothing to tell of one


@pytest.mark.parametrize("seed", range(2))
def test_a_strict_function_is_called_strictly(client: TestClient, engine: FakeEngine, seed: int) -> None:
    engine.script = obeys(seed)
    whole = chat(client, tools=[STRICT, NOW])
    checked_calls({"tool_calls": [c for c in whole["message"].get("tool_calls", ()) if "get_w" in str(c)]})
    message, reason = put_together(choices(client, tools=[STRICT, NOW]))
    assert without_ids(message) == without_ids(whole["message"]) | {"content": message["content"]}
    assert (message["content"] or None) == (whole["message"]["content"] or None)
    assert reason == whole["finish_reason"]


def test_forced_arguments_are_streamed_as_they_come(client: TestClient, engine: FakeEngine) -> None:
    engine.script = says(*CALL)
    chunks = choices(client, tool_choice="required")
    pieces = [chunk["delta"]["tool_calls"][0]["function"]["arguments"] for chunk in chunks[2:-1]]
    assert pieces == [*PARIS]
    assert put_together(chunks)[1] == "tool_calls"


def test_a_forced_call_that_is_cut_off(client: TestClient, engine: FakeEngine) -> None:
    """What there is of the arguments is given, as OpenAI does; and the reason says that it is not all."""
    for reason, cut in (("length", CALL[:-20]), ("stop", CALL[: CALL.index("ris")])):
        engine.script = says(cut, reason=reason, stop_reason="ris" if reason == "stop" else None)
        choice = chat(client, tool_choice="required")
        assert choice["finish_reason"] == reason
        [call] = choice["message"]["tool_calls"]
        assert PARIS.startswith(call["function"]["arguments"])
        message, streamed = put_together(choices(client, tool_choice="required"))
        assert message["tool_calls"][0]["function"] == call["function"]
        assert streamed == reason
    engine.script = says(CALL[:20], reason="length")
    assert chat(client, tool_choice="required")["message"]["content"] == ""


# --- refusals ---------------------------------------------------------------------------------------------------------


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": function(name="f g")}, "tools.0.function.name"),
        ({"tools": function(name="")}, "tools.0.function.name"),
        ({"tools": [NOW, NOW]}, "tools.1.function.name"),
        ({"tools": function(parameters=[])}, "tools.0.function.parameters"),
        ({"tools": function(mood=1)}, "tools.0.function.mood"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [NOW] * 129}, "tools"),
        ({"tools": []}, None),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "now"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "tool_choice": "none"}, None),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tool_choice": "required", "min_tokens": 3}, "min_tokens"),
        ({"tools": function(strict=True), "ignore_eos": True}, "ignore_eos"),
        ({"ignore_eos": True, "min_tokens": 3}, None),
        (
            {"tools": [NOW, *function(parameters={"type": "array"})], "tool_choice": "required"},
            "tools.1.function.parameters.type",
        ),
        (
            {"tools": [NOW, *function(parameters={"properties": {"x": {"type": "thing"}}}, strict=True)]},
            "tools.1.function.parameters",
        ),
        (
            {"tools": function(parameters={"x-guidance": {"lenient": True}}), "tool_choice": "required"},
            "tools.0.function.parameters",
        ),
        ({"tools": function(parameters={"properties": {"x": {"type": "thing"}}})}, None),
    ],
)
def test_what_is_refused_is_named(client: TestClient, fields: dict[str, Any], param: str | None) -> None:
    if param is None:
        assert post(client, **fields).status_code == 200
    else:
        named, message = refused(client, **fields)
        assert named == param
        assert param.partition(".")[0] in message


@pytest.mark.parametrize("kind", ["properties", "const"])
def test_a_deep_schema_is_the_clients_error(client: TestClient, kind: str) -> None:
    """As deep as JSON may come in here at all, whichever part of the way it is too deep for."""
    opening = '{"properties":{"x":' if kind == "properties" else '{"x":{"x":'
    statuses = set()
    for depth in (40, 150, 300, 440, 480):
        deep = opening * depth + "{}" + "}}" * depth
        parameters = deep if kind == "properties" else f'{{"properties":{{"x":{{"const":{deep}}}}}}}'
        body = json.dumps(
            {"model": "base", "messages": [USER], "tool_choice": "required", "tools": function(parameters={})}
        )
        response = client.post(
            "/v1/chat/completions",
            content=body.replace('"parameters": {}', f'"parameters": {parameters}'),
            headers={"Content-Type": "application/json"},
        )
        statuses.add(response.status_code)
        if response.status_code == 400:
            assert response.json()["error"]["param"] in ("tools", "tools.0.function.parameters", None)
    assert statuses <= {200, 400}
    assert 400 in statuses


def test_an_adapters_template_decides(client: TestClient) -> None:
    param, message = refused(client, model="org/bob")  # its template shows no tools
    assert param == "tools"
    assert "template" in message
    assert post(client, model="org/bob", tool_choice="none").status_code == 200
    assert post(client, model="alice").status_code == 200


def test_the_flag_sets_the_format_or_turns_tools_off(
    connect: Callable[..., TestClient], config: ApiConfig, engine: FakeEngine
) -> None:
    param, message = refused(connect(replace(config, tool_call_parser="none")))
    assert param == "tools"
    assert "--tool-call-parser" in message
    engine.script = says(f'{{"name": "get_weather", "parameters": {PARIS}}}')
    choice = chat(connect(replace(config, tool_call_parser="llama3_json")))
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": PARIS}


def test_an_unknown_format_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="--tool-call-parser: expected one of auto, hermes"):
        ApiConfig(tool_call_parser="latin")  # type: ignore[arg-type]
    assert {"auto", "none", *FORMATS} == set(get_args(ToolCallParser))


def test_without_grammars_nothing_can_be_forced(
    connect: Callable[..., TestClient], config: ApiConfig, serving: Serving
) -> None:
    object.__setattr__(serving, "grammars", None)
    client = connect(config)
    assert refused(client, tool_choice="required")[0] == "tool_choice"
    assert post(client).status_code == 200


# --- marks that are special tokens ------------------------------------------------------------------------------------


def test_special_marks_are_shown_to_the_parser(
    client: TestClient, engine: FakeEngine, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = serving.tokenizer
    assert isinstance(tokenizer, FakeTokenizer)
    encode = tokenizer.encode

    def special(text: str, add_special_tokens: bool = True) -> list[int]:
        return [256] if text == "<tool_call>" else encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", special)
    engine.script = says(CALL)
    chat(client)
    assert engine.requests[0].params.shown_special_ids == {256}
    assert engine.requests[0].params.skip_special_tokens
    chat(client, tool_choice="none")
    assert engine.requests[1].params.shown_special_ids == frozenset()


class Refusing:
    """Refuses every grammar of more than one function; those of one are compiled, or take for ever."""

    def __init__(self, *, is_costly: bool = False, hangs: bool = False, queue_full: bool = False) -> None:
        self.is_costly, self.hangs, self.queue_full = is_costly, hangs, queue_full
        self.single: list[Future[Grammar]] = []

    def submit(self, spec: GrammarSpec, tenant: str = "") -> Future[Grammar]:
        future: Future[Grammar] = Future()
        if spec.kind == "lark":
            future.set_exception(InvalidGrammar("all together are refused", is_costly=self.is_costly))
            return future
        self.single.append(future)
        if self.queue_full:
            raise GrammarQueueFull(32, 32, 3, tenant)
        if not self.hangs:
            future.set_result(TokenRules())
        return future


@pytest.mark.parametrize(
    ("refusing", "asked"),
    [
        (Refusing(), 2),  # none of them is at fault
        (Refusing(is_costly=True), 0),  # to look for the one would cost as much again
        (Refusing(hangs=True), 1),
        (Refusing(queue_full=True), 1),
    ],
)
def test_the_search_for_the_function_at_fault_is_bounded(
    serving: Serving, config: ApiConfig, refusing: Refusing, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manylora.server.api.tools.calls._BLAME_S", 0.2)
    app = create_app(replace(serving, grammars=refusing), config)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        body = {"model": "base", "messages": [USER], "tools": TOOLS, "tool_choice": "required"}
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tool_choice"
    assert "all together are refused" in answer.json()["error"]["message"]
    assert len(refusing.single) == asked
    assert all(future.cancelled() for future in refusing.single if refusing.hangs), "nobody waits for it any more"
