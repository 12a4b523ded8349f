"""The official client, unchanged, against a real server with the demo base and three adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.e2e.adapters import write_adapter
from tests.e2e.server_process import ANSWER_S, BASE, Server, demo_flags, serving

pytestmark = pytest.mark.timeout(900)

KEY = "key-of-the-tests"
ADAPTERS = ("ada", "ben", "org/cleo")
PROMPT = "The best way to cook an egg is"
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("openai")
    flags = [*demo_flags(base_cache), "--port", "0", "--api-key", KEY]
    for seed, name in enumerate(ADAPTERS):
        flags += ["--adapter", f"{name}={write_adapter(root / str(seed), seed)}"]
    with serving(root / "server.log", *flags, api_key=KEY) as server:
        yield server


def connect(server: Server, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, timeout=ANSWER_S, max_retries=0)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with connect(server) as client:
        yield client


def stream_completion(client: openai.OpenAI, **fields: Any) -> tuple[str, Any]:
    """The concatenated text of a stream, and the usage that its last chunk had."""
    text, usage = "", None
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **fields):
        assert usage is None, "usage comes last"
        usage = chunk.usage
        text += "".join(choice.text for choice in chunk.choices)
    return text, usage


def stream_chat(client: openai.OpenAI, **fields: Any) -> tuple[str, Any]:
    text, usage = "", None
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **fields):
        assert usage is None, "usage comes last"
        usage = chunk.usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return text, usage


@pytest.mark.parametrize("model", [BASE, "ada", f"{BASE}:org/cleo"])
def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**fields)
    text, usage = stream_completion(client, **fields)
    assert text == whole.choices[0].text != ""
    assert usage == whole.usage
    assert (usage.completion_tokens, whole.model, whole.choices[0].finish_reason) == (12, model, "length")
    assert usage.total_tokens == usage.prompt_tokens + 12


@pytest.mark.parametrize("model", [BASE, "ben"])
def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    text, usage = stream_chat(client, **fields)
    assert text == whole.choices[0].message.content != ""
    # The second finds the first one's prompt cached.
    assert whole.usage is not None
    assert usage.prompt_tokens_details is not None
    assert 0 < (usage.prompt_tokens_details.cached_tokens or 0) < usage.prompt_tokens
    assert usage.model_copy(update={"prompt_tokens_details": None}) == whole.usage.model_copy(
        update={"prompt_tokens_details": None}
    )
    assert usage.completion_tokens <= 12
    assert whole.choices[0].message.role == "assistant"


def test_the_base_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=MESSAGES, max_tokens=96, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, *ADAPTERS]
    for name in (BASE, *ADAPTERS):
        model = client.models.retrieve(name)
        assert (model.id, model.object) == (name, "model")
        assert model.to_dict()["parent"] == (None if name == BASE else BASE)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_choices_differ_and_a_seed_brings_them_back(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.completions.create(model="ada", prompt=PROMPT, max_tokens=10, n=2, seed=seed, temperature=1)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 20
        return [choice.text for choice in answer.choices]

    first = texts(7)
    assert first[0] != first[1]
    assert texts(7) == first
    assert texts(1007) != first

    streamed = ["", ""]
    for chunk in client.completions.create(
        model="ada", prompt=PROMPT, max_tokens=10, n=2, seed=7, temperature=1, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == first


def test_logprobs(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="ada", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert logprob == top[token] == max(top.values()) <= 0  # greedy: the likeliest is taken

    chat = client.chat.completions.create(
        model=BASE, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert "".join(one.token for one in content) == chat.choices[0].message.content
    for one in content:
        assert next(other.token for other in one.top_logprobs) == one.token
        assert len(one.top_logprobs) == 2
        assert bytes(one.bytes or []).decode() == one.token


def test_four_streams_at_once_are_each_the_text_of_their_own_adapter(client: openai.OpenAI) -> None:
    models = (BASE, *ADAPTERS)

    def fields(model: str) -> dict[str, Any]:
        return {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}

    alone = {model: client.completions.create(**fields(model)).choices[0].text for model in models}
    assert len(set(alone.values())) == 4, alone

    together = Barrier(len(models))

    def stream(model: str) -> str:
        together.wait(60)
        return stream_completion(client, **fields(model))[0]

    with ThreadPoolExecutor(len(models)) as pool:
        assert dict(zip(models, pool.map(stream, models), strict=True)) == alone


class Egg(pydantic.BaseModel):
    """Short whatever the model says, so that it is whole before the tokens run out."""

    kind: Literal["soft", "hard"]
    minutes: Literal[4, 7, 10]


@pytest.mark.parametrize("model", [BASE, "ben"])
def test_an_answer_is_parsed(client: openai.OpenAI, model: str) -> None:
    fields: Any = {"model": model, "messages": MESSAGES, "response_format": Egg, "max_tokens": 300, "temperature": 1}
    answer = client.chat.completions.parse(seed=1, **fields)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(answer.choices[0].message.parsed, Egg)
    with client.chat.completions.stream(seed=1, **fields) as stream:
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.parsed == answer.choices[0].message.parsed


Ask = Callable[[openai.OpenAI], Any]


def asking(**fields: Any) -> Ask:
    return lambda client: client.completions.create(**{"model": BASE, "prompt": PROMPT, "max_tokens": 1, **fields})


@pytest.mark.parametrize(
    ("ask", "kind", "param"),
    [
        (asking(model="nobody"), openai.NotFoundError, "model"),
        (asking(model=f"{BASE}:nobody"), openai.NotFoundError, "model"),
        (asking(temperature=-1), openai.BadRequestError, "temperature"),
        (asking(extra_body={"tempurature": 1}), openai.BadRequestError, "tempurature"),
        (asking(extra_body={"web_search_options": {}}), openai.BadRequestError, "web_search_options"),
        (asking(suffix="."), openai.BadRequestError, "suffix"),
        (asking(max_tokens=100_000), openai.BadRequestError, "max_tokens"),
    ],
    ids=["no such model", "no such adapter", "range", "unknown field", "unserved field", "unserved value", "too long"],
)
def test_errors_are_typed_and_name_the_field(
    client: openai.OpenAI, ask: Ask, kind: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(kind) as caught:
        ask(client)
    assert caught.value.param == param
    assert param.split(".")[0] in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_key(server: Server, stream: bool) -> None:
    with connect(server, "another-key") as stranger:
        with pytest.raises(openai.AuthenticationError):
            asking(stream=stream)(stranger)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
