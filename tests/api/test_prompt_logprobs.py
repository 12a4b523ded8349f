"""/v1/completions: echo with log-probabilities, ``prompt_logprobs``, scoring without generating, ``best_of`` and the
small fields beside them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.api.logprobs import CompletionLogprobs, Echo, LogprobNames
from manylora.server.api.state import Serving
from manylora.server.engine.request import Request, TokenEvent, TokenLogprob, TokenLogprobs
from tests.api.fakes import BOS, EOS, FakeEngine, FakeTokenizer, Step, finish, token
from tests.api.test_completions import complete
from tests.api.test_streaming import frames


def refused(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "base", "prompt": "Hi", **fields})
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def read(tokens: str, *, first: int = 0) -> list[float | None]:
    """What the fake engine reads for a prompt of so many tokens."""
    return [None if i == 0 else -0.25 * i for i in range(first, first + len(tokens))]


# --- echo ------------------------------------------------------------------------------------------------------------


def test_echo_with_logprobs_has_the_prompts_tokens_first(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [[token("ab", logprobs=1), finish(request, "length", n=2)]]
    [choice] = complete(client, echo=True, logprobs=1)["choices"]
    assert choice["text"] == "Hiab"
    assert choice["logprobs"] == {
        "tokens": ["<s>", "H", "i", "a", "b"],
        "token_logprobs": [None, -0.25, -0.5, -0.5, -0.5],
        "top_logprobs": [
            None,
            {"\x00": -1.25, "H": -0.25},
            {"\x00": -1.5, "i": -0.5},
            {"a": -0.5},
            {"b": -0.5},
        ],
        # The token that begins every text is not part of it.
        "text_offset": [0, 0, 1, 2, 3],
    }
    [request] = engine.requests
    assert (request.params.logprobs, request.params.prompt_logprobs) == (1, 1)


def test_every_choice_of_every_prompt_echoes_its_own(client: TestClient) -> None:
    answer = complete(client, prompt=["Hi", "you"], n=2, echo=True, logprobs=0)
    assert [choice["logprobs"]["tokens"][:4] for choice in answer["choices"]] == [
        ["<s>", "H", "i", " "],
        ["<s>", "H", "i", " "],
        ["<s>", "y", "o", "u"],
        ["<s>", "y", "o", "u"],
    ]


def test_a_stream_echoes_with_logprobs_too(client: TestClient) -> None:
    got = frames(client, "/v1/completions",
                 {"model": "base", "prompt": "Hi", "stream": True, "echo": True, "logprobs": 2})  # fmt: skip
    pieces = [frame["choices"][0]["logprobs"] for frame in got]
    assert [frame["choices"][0]["text"] for frame in got] == ["Hi Hello", " world", ""]
    assert pieces[0]["tokens"] == ["<s>", *"Hi Hello"]
    assert pieces[0]["token_logprobs"] == [*read("<Hi"), *[-0.5] * 6]
    assert pieces[0]["text_offset"] == [0, 0, 1, 2, 3, 4, 5, 6, 7]
    assert pieces[1]["text_offset"] == [8, 9, 10, 11, 12, 13]
    assert pieces[2] is None
    # What a stream says, put together, is what is said at once.
    [whole] = complete(client, echo=True, logprobs=2)["choices"]
    for key, value in whole["logprobs"].items():
        assert value == pieces[0][key] + pieces[1][key]


def test_scoring_generates_nothing(client: TestClient, engine: FakeEngine) -> None:
    """As evaluation harnesses ask."""
    answer = complete(client, prompt=["Hi", "yo"], max_tokens=0, echo=True, logprobs=1)
    assert [request.params.max_tokens for request in engine.requests] == [0, 0]
    assert [choice["text"] for choice in answer["choices"]] == ["Hi", "yo"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]] == [[None, -0.25, -0.5]] * 2
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 0, "total_tokens": 6}
    body = {"model": "base", "prompt": "Hi", "stream": True, "max_tokens": 0, "echo": True, "logprobs": 0}
    got = frames(client, "/v1/completions", body)
    assert [frame["choices"][0]["text"] for frame in got] == ["Hi", ""]
    assert got[0]["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.25, -0.5]


def test_scoring_may_fill_the_context(client: TestClient, engine: FakeEngine) -> None:
    complete(client, prompt=[7] * 512, max_tokens=0, echo=True)
    complete(client, prompt=[7] * 600, max_tokens=0, echo=True, truncate_prompt_tokens=-1)
    assert [len(request.prompt_token_ids) for request in engine.requests] == [512, 512]
    assert refused(client, prompt=[7] * 513, max_tokens=0, echo=True)["param"] == "prompt"


def test_no_tokens_and_no_prompt_is_no_request(client: TestClient) -> None:
    assert refused(client, max_tokens=0)["param"] == "max_tokens"
    assert refused(client, max_tokens=0, logprobs=1)["param"] == "max_tokens"
    assert refused(client, max_tokens=0, echo=True, min_tokens=1)["param"] == "min_tokens"
    chat = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 0}
    assert client.post("/v1/chat/completions", json=chat).json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("text", "ids", "offsets", "after"),
    [
        ("Hi", [BOS, *b"Hi"], [0, 0, 1], 2),
        # A special token that is written out is part of the text.
        ("</s>Hi", [BOS, EOS, *b"Hi"], [0, 0, 4, 5], 6),
        ("H</s>i", [BOS, *b"H", EOS, *b"i"], [0, 0, 1, 5], 6),
        ("é!", [BOS, *"é!".encode()], [0, 0, 0, 1], 2),
        # A prompt that ends inside a character, as its tokens may: the rest of it is no part of the completion's.
        ("a\ufffd", [*b"a", 0xC3], [0, 1], 2),
        # SentencePiece: the tokens say " Hi", the text does not.
        ("Hi you", list(b" Hi you"), [0, 0, 1, 2, 3, 4, 5], 6),
    ],
)
def test_offsets_are_places_in_the_echoed_text(text: str, ids: list[int], offsets: list[int], after: int) -> None:
    tokenizer = FakeTokenizer()
    made = CompletionLogprobs(tokenizer, LogprobNames(tokenizer), top=0, skip_special_tokens=True, echo=Echo(text, ids))
    none: tuple[TokenLogprobs | None, ...] = (None,) * len(ids)
    steps = token("xy", logprobs=0).logprobs
    piece = made.piece(TokenEvent("xy", tuple(b"xy"), steps, none))
    assert piece["text_offset"] == [*offsets, after, after + 1]
    assert made.piece(token("z", logprobs=0))["text_offset"] == [after + 2]


# --- prompt_logprobs -------------------------------------------------------------------------------------------------


def test_prompt_logprobs_have_vllms_shape(client: TestClient, engine: FakeEngine) -> None:
    [choice] = complete(client, prompt_logprobs=2)["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            str(ord("H")): {"logprob": -0.25, "rank": 3, "decoded_token": "H"},
            "0": {"logprob": -1.25, "rank": 1, "decoded_token": "\x00"},
            "1": {"logprob": -2.25, "rank": 2, "decoded_token": "\x01"},
        },
        {
            str(ord("i")): {"logprob": -0.5, "rank": 3, "decoded_token": "i"},
            "0": {"logprob": -1.5, "rank": 1, "decoded_token": "\x00"},
            "1": {"logprob": -2.5, "rank": 2, "decoded_token": "\x01"},
        },
    ]
    assert choice["logprobs"] is None
    assert engine.requests[0].params.logprobs is None
    [choice] = complete(client, prompt_logprobs=0)["choices"]
    assert [one and len(one) for one in choice["prompt_logprobs"]] == [None, 1, 1]


def test_those_who_do_not_ask_get_none(client: TestClient, engine: FakeEngine) -> None:
    assert "prompt_logprobs" not in complete(client, logprobs=1)["choices"][0]
    assert "prompt_logprobs" not in complete(client, logprobs=1, echo=True)["choices"][0]
    assert "prompt_logprobs" not in complete(client, echo=True)["choices"][0]
    assert [request.params.prompt_logprobs for request in engine.requests] == [None, 1, None]


def test_prompt_logprobs_and_echo_each_list_what_they_were_asked_for(client: TestClient, engine: FakeEngine) -> None:
    [choice] = complete(client, prompt_logprobs=1, echo=True, logprobs=3)["choices"]
    assert engine.requests[0].params.prompt_logprobs == 3
    assert [one and len(one) for one in choice["prompt_logprobs"]] == [None, 2, 2]
    assert [one and len(one) for one in choice["logprobs"]["top_logprobs"][:3]] == [None, 4, 4]
    [choice] = complete(client, prompt_logprobs=3, echo=True, logprobs=1)["choices"]
    assert [one and len(one) for one in choice["prompt_logprobs"]] == [None, 4, 4]
    assert [one and len(one) for one in choice["logprobs"]["top_logprobs"][:3]] == [None, 2, 2]


def test_impossible_tokens_are_written_as_vllm_does(client: TestClient, engine: FakeEngine) -> None:
    def script(request: Request) -> list[Step]:
        request.prompt_logprobs.clear()
        step = TokenLogprobs(TokenLogprob(1, -float("inf"), 200), ())
        return [[TokenEvent("", (), (), (None, step, step)), finish(request, "length")]]

    engine.script = script
    [choice] = complete(client, prompt_logprobs=0, echo=True, logprobs=0, max_tokens=0)["choices"]
    assert choice["prompt_logprobs"][1]["1"]["logprob"] == -9999.0
    assert choice["logprobs"]["token_logprobs"] == [None, -9999.0, -9999.0]


def test_a_stream_has_no_place_for_prompt_logprobs(client: TestClient) -> None:
    assert refused(client, stream=True, prompt_logprobs=1)["param"] == "prompt_logprobs"
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "prompt_logprobs": 0}
    response = client.post("/v1/chat/completions", json=body)
    assert response.json()["error"]["param"] == "prompt_logprobs"


def test_a_chat_has_them_beside_its_choices(client: TestClient) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "prompt_logprobs": 1, "n": 2}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][1][str(ord("u"))] == {"logprob": -0.25, "rank": 3, "decoded_token": "u"}
    assert all("prompt_logprobs" not in choice for choice in answer["choices"])
    del body["prompt_logprobs"]
    assert "prompt_logprobs" not in client.post("/v1/chat/completions", json=body).json()


def test_an_answer_has_a_largest_size(client: TestClient, engine: FakeEngine) -> None:
    """Tokens x choices x values at each: 500 x 100 x 21 is a little more than a million."""
    error = refused(client, prompt=[7] * 500, n=100, prompt_logprobs=20, max_tokens=1)
    assert error["param"] == "prompt_logprobs"
    assert "1050000" in error["message"]
    assert "1048576" in error["message"]
    assert refused(client, prompt=[7] * 500, n=100, echo=True, logprobs=20, max_tokens=1)["param"] == "logprobs"
    # A stream's are written on the event loop.
    error = refused(client, prompt=[7] * 500, n=7, echo=True, logprobs=20, stream=True)
    assert error["param"] == "logprobs"
    assert "65536 are given in one stream" in error["message"]
    assert engine.requests == []
    complete(client, prompt=[7] * 500, n=2, prompt_logprobs=20, max_tokens=1)
    chat = {"model": "base", "messages": [{"role": "user", "content": "x" * 480}], "n": 128, "prompt_logprobs": 20}
    assert client.post("/v1/chat/completions", json=chat).json()["error"]["param"] == "prompt_logprobs"


# --- best_of ---------------------------------------------------------------------------------------------------------


def ranked(request: Request) -> list[Step]:
    """Choice i of a prompt says "i" in i + 1 tokens; the means of their log-probabilities are -3, -1, -2, -1."""
    number = int(request.request_id.rpartition("-")[2]) % 4
    mean, n = (-3.0, -1.0, -2.0, -1.0)[number], number + 1
    steps = (
        tuple(TokenLogprobs(TokenLogprob(1, mean, 0), ()) for _ in range(n))
        if request.params.logprobs is not None
        else ()
    )
    return [[TokenEvent(str(number), (1,) * n, steps), finish(request, "length", n=n)]]


def test_best_of_answers_the_likeliest(client: TestClient, engine: FakeEngine) -> None:
    engine.script = ranked
    answer = complete(client, prompt=["a", "b"], n=3, best_of=4, seed=5)
    # The best first; of equals, the first drawn; long answers do not lose by being long.
    assert [choice["text"] for choice in answer["choices"]] == ["1", "3", "2"] * 2
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert {choice["logprobs"] for choice in answer["choices"]} == {None}
    assert [request.params.seed for request in engine.requests] == [5, 6, 7, 8] * 2
    assert {request.params.logprobs for request in engine.requests} == {0}
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 20, "total_tokens": 24}


def test_best_of_with_logprobs_and_echo(client: TestClient, engine: FakeEngine) -> None:
    engine.script = ranked
    [choice] = complete(client, prompt="ab", best_of=4, logprobs=2, echo=True)["choices"]
    assert {request.params.logprobs for request in engine.requests} == {2}
    assert choice["text"] == "ab1"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.5, -1.0, -1.0]


def test_best_of_that_chooses_nothing(client: TestClient, engine: FakeEngine) -> None:
    complete(client, n=2, best_of=2)
    assert {request.params.logprobs for request in engine.requests} == {None}
    body = {"model": "base", "prompt": "Hi", "stream": True, "n": 2, "best_of": 2}
    assert client.post("/v1/completions", json=body).status_code == 200
    error = refused(client, stream=True, best_of=2)
    assert error["param"] == "best_of"
    assert "streamed" in error["message"]
    error = refused(client, prompt=["x"] * 10, best_of=101)
    assert error["param"] == "best_of"
    assert "1010" in error["message"]


# --- token ids -------------------------------------------------------------------------------------------------------


def test_tokens_may_be_named_by_their_ids(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [[token("é", logprobs=2), finish(request, "length", n=2)]]
    [choice] = complete(client, logprobs=2, echo=True, return_tokens_as_token_ids=True)["choices"]
    assert choice["logprobs"]["tokens"][0] == f"token_id:{BOS}"
    assert choice["logprobs"]["tokens"][-2:] == ["token_id:195", "token_id:169"]
    assert choice["logprobs"]["top_logprobs"][-1] == {"token_id:169": -0.5, "token_id:170": -1.5}
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "logprobs": True,
            "return_tokens_as_token_ids": True}  # fmt: skip
    content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert (content[0]["token"], content[0]["bytes"]) == ("token_id:195", [195])
    assert [one["token"] for one in content[0]["top_logprobs"]] == ["token_id:195", "token_id:196"]


def test_token_ids_come_with_the_text(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [[token("a")], [TokenEvent("", (EOS,)), finish(request, "stop", n=2)]]
    answer = complete(client, prompt=["x", "yz"], return_token_ids=True)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[BOS, *b"x"], [BOS, *b"yz"]]
    assert [choice["token_ids"] for choice in answer["choices"]] == [[ord("a"), EOS]] * 2
    got = frames(client, "/v1/completions",
                 {"model": "base", "prompt": "x", "stream": True, "return_token_ids": True})  # fmt: skip
    choices = [frame["choices"][0] for frame in got]
    assert [choice.get("prompt_token_ids") for choice in choices] == [[BOS, ord("x")], None, None]
    # The token that ends it has no text, and is told all the same.
    assert [choice["token_ids"] for choice in choices] == [[ord("a")], [EOS], []]


# --- the rest --------------------------------------------------------------------------------------------------------


def test_the_salt_reaches_the_engine(client: TestClient, engine: FakeEngine) -> None:
    complete(client, cache_salt="salt", n=2)
    complete(client)
    assert [request.cache_salt for request in engine.requests] == ["salt", "salt", None]


def allowed_by(request: Request) -> set[int]:
    import numpy as np

    assert request.constraint is not None
    mask = np.zeros(9, np.int32)
    request.constraint.allow(mask)
    return {t for t in range(258) if mask[t // 32] >> (t % 32) & 1}


def test_token_rules_reach_the_engine(client: TestClient, engine: FakeEngine) -> None:
    complete(client, allowed_token_ids=[1, 40, EOS], n=2)
    complete(client, bad_words=["a", " b", "cd"])
    complete(client, bad_words=["a"], allowed_token_ids=[97, 98])
    complete(client)
    first, second, banning, both, free = engine.requests
    assert first.constraint is not second.constraint
    assert allowed_by(first) == {1, 40, EOS}
    assert allowed_by(banning) == {*range(258)} - {ord("a")} - {ord("b")}
    assert banning.constraint is not None
    banning.constraint.accept(ord("c"))
    assert ord("d") not in allowed_by(banning)
    assert allowed_by(both) == {98}
    assert free.constraint is None
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "allowed_token_ids": [3]}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert allowed_by(engine.requests[-1]) == {3}


def test_spaces_between_special_tokens(client: TestClient, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """False holds where there are none: special tokens are left out, or the tokenizer puts none there."""
    complete(client, spaces_between_special_tokens=True)
    complete(client, spaces_between_special_tokens=False)
    complete(client, spaces_between_special_tokens=False, skip_special_tokens=False)
    monkeypatch.setattr(FakeTokenizer, "spaces_special_tokens", True)
    complete(client, spaces_between_special_tokens=False)
    complete(client, spaces_between_special_tokens=True, skip_special_tokens=False)
    error = refused(client, spaces_between_special_tokens=False, skip_special_tokens=False)
    assert error["param"] == "spaces_between_special_tokens"


def test_large_answers_are_the_same(client: TestClient) -> None:
    """They are written on another thread."""
    small = complete(client, prompt=[200] * 200, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    large = complete(client, prompt=[200] * 200, prompt_logprobs=20, max_tokens=1)["choices"][0]["prompt_logprobs"]
    assert len(large) == 200
    assert small == [one and dict(list(one.items())[:2]) for one in large]
    assert json.dumps(large).count("logprob") == 199 * 21
