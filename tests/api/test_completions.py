"""/v1/completions without streaming: what is asked reaches the engine, and the answer has OpenAI's shape."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from manylora.server.api.state import Serving
from manylora.server.engine.request import Request, SamplingParams
from tests.api.fakes import BOS, FakeEngine, Step, finish, token


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "base", "prompt": "Hi", **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_answer_has_openais_shape(client: TestClient, engine: FakeEngine) -> None:
    answer = complete(client)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_600_000_000
    assert answer == {
        "object": "text_completion",
        "model": "base",
        "system_fingerprint": "fp_ba5eba5e_base",
        "choices": [
            {
                "index": 0,
                "text": " Hello world",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15},
    }
    [request] = engine.requests
    assert request.prompt_token_ids == [BOS, *b"Hi"]
    assert request.params == SamplingParams(max_tokens=16)
    assert request.adapters == ()


def test_every_sampling_field_reaches_the_engine(client: TestClient, engine: FakeEngine) -> None:
    complete(
        client,
        max_tokens=7,
        min_tokens=2,
        temperature=0.25,
        top_p=0.5,
        top_k=40,
        min_p=0.125,
        seed=-3,
        presence_penalty=-2,
        frequency_penalty=2,
        repetition_penalty=1.5,
        logit_bias={"7": -100, "8": 1.5},
        logprobs=3,
        stop=["\n", "END"],
        stop_token_ids=[9, 10],
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
        priority=5,
    )
    [request] = engine.requests
    assert request.priority == 5
    assert request.params == SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.25,
        top_p=0.5,
        top_k=40,
        min_p=0.125,
        seed=-3,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        repetition_penalty=1.5,
        logit_bias={7: -100.0, 8: 1.5},
        logprobs=3,
        stop=("\n", "END"),
        stop_token_ids=(9, 10),
        include_stop_str_in_output=True,
        ignore_eos=True,
        skip_special_tokens=False,
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["only"], [[BOS, *b"only"]]),
    ],
)
def test_prompts_come_in_four_forms(
    client: TestClient, engine: FakeEngine, prompt: Any, expected: list[list[int]]
) -> None:
    answer = complete(client, prompt=prompt)
    assert [request.prompt_token_ids for request in engine.requests] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_special_tokens_can_be_left_out(client: TestClient, engine: FakeEngine) -> None:
    complete(client, add_special_tokens=False)
    assert engine.requests[0].prompt_token_ids == list(b"Hi")


def test_stop_may_be_a_string_and_top_k_minus_one(client: TestClient, engine: FakeEngine) -> None:
    complete(client, stop="X", top_k=-1)
    assert engine.requests[0].params.stop == ("X",)
    assert engine.requests[0].params.top_k == 0


def test_choices_of_several_prompts_keep_their_order(client: TestClient, engine: FakeEngine) -> None:
    def slow_first(request: Request) -> list[Step]:
        name = request.request_id.rpartition("-")[2]
        return [[]] * (5 - int(name)) + [[token(name), finish(request, "length", n=1)]]

    engine.script = slow_first
    answer = complete(client, prompt=["a", "b"], n=2, seed=10)
    assert [choice["text"] for choice in answer["choices"]] == ["0", "1", "2", "3"]
    # A prompt's choices differ; the same choice of another prompt has the same seed, as if it were alone.
    assert [request.params.seed for request in engine.requests] == [10, 11, 10, 11]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


def test_seeds_stay_within_64_bits(client: TestClient, engine: FakeEngine) -> None:
    complete(client, n=2, seed=2**63 - 1)
    assert [request.params.seed for request in engine.requests] == [2**63 - 1, -(2**63)]


def test_stop_reason_is_the_string_or_the_id(client: TestClient, engine: FakeEngine) -> None:
    for reason in ("END", 9):
        engine.script = lambda request, reason=reason: [[finish(request, "stop", stop_reason=reason)]]  # type: ignore[misc]
        [choice] = complete(client)["choices"]
        assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", reason, "")


def test_echo_puts_the_prompt_first(client: TestClient) -> None:
    answer = complete(client, prompt=["Say", "it"], echo=True, n=2)
    assert [choice["text"] for choice in answer["choices"]] == ["Say Hello world"] * 2 + ["it Hello world"] * 2
    [choice] = complete(client, prompt=[BOS, *b"ids"], echo=True)["choices"]
    assert choice["text"] == "ids Hello world"


def test_truncation_keeps_the_last_tokens(client: TestClient, engine: FakeEngine) -> None:
    complete(client, prompt="abcdef", truncate_prompt_tokens=2)
    complete(client, prompt=[7] * 600, truncate_prompt_tokens=-1, max_tokens=12)
    complete(client, prompt="abc", truncate_prompt_tokens=100)
    assert [request.prompt_token_ids for request in engine.requests] == [
        list(b"ef"),
        [7] * 500,
        [BOS, *b"abc"],
    ]
    [choice] = complete(client, prompt="abcdef", truncate_prompt_tokens=2, echo=True)["choices"]
    assert choice["text"] == "ef Hello world"


def test_the_default_length_is_cut_to_the_context(client: TestClient, engine: FakeEngine) -> None:
    complete(client, prompt=[1] * 508)
    assert engine.requests[0].params.max_tokens == 4


@pytest.mark.parametrize(
    ("fields", "param", "numbers"),
    [
        ({"prompt": [1] * 512}, "prompt", ("512 tokens", "length is 512")),
        ({"prompt": [1] * 600, "max_tokens": 1}, "prompt", ("600 tokens", "512")),
        ({"prompt": [1] * 500, "max_tokens": 13}, "max_tokens", ("13", "512", "500", "12")),
    ],
)
def test_too_long_is_refused_with_both_numbers(
    client: TestClient, fields: dict[str, Any], param: str, numbers: tuple[str, ...]
) -> None:
    response = client.post("/v1/completions", json={"model": "base", **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert all(number in error["message"] for number in numbers)


def test_long_prompts_are_tokenised_all_the_same(client: TestClient, serving: Serving, engine: FakeEngine) -> None:
    complete(client, prompt="x" * 5000, truncate_prompt_tokens=3)
    assert engine.requests[0].prompt_token_ids == list(b"xxx")


def test_logprobs_have_the_legacy_shape(client: TestClient, engine: FakeEngine) -> None:
    engine.script = lambda request: [
        [token("ab", logprobs=2)],
        [token("é", logprobs=2), finish(request, "length", n=4)],
    ]
    [choice] = complete(client, logprobs=2)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [
            {"a": -0.5, "b": -1.5},
            {"b": -0.5, "c": -1.5},
            {"bytes:\\xc3": -0.5, "bytes:\\xc4": -1.5},
            {"bytes:\\xa9": -0.5, "bytes:\\xaa": -1.5},
        ],
        # "é" is character 2 of the text, and the second of its bytes completes it.
        "text_offset": [0, 1, 2, 2],
    }


def test_logprobs_0_has_the_sampled_token_only(client: TestClient) -> None:
    [choice] = complete(client, logprobs=0)["choices"]
    assert choice["logprobs"]["top_logprobs"][0] == {" ": -0.5}
    assert len(choice["logprobs"]["tokens"]) == len(" Hello world")
