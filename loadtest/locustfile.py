"""Streamed completions over a weighted mix of adapters, with the two latencies that users of an LLM feel.

    locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 --users 8 --spawn-rate 8 --run-time 30s \
        --mix smollm2=4,pirate=2,sql=1,json=1

Statistics, by adapter and in milliseconds: ``POST`` is the whole request, ``TTFT`` the time to its first token, ``ITL``
the time between two tokens. A stream that ends without [DONE], with an error event or with no token counts as failed.
Without --mix every model that the server lists is asked equally often.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import requests
from geventhttpclient.response import HTTPParseError
from locust import FastHttpUser, constant_pacing, events, task
from locust.env import Environment

PROMPTS = (
    "Tell me about the weather today.",
    "How do I boil an egg?",
    "Show all customers from Berlin ordered by name.",
    "Anna Schmidt, 34, lives in Hamburg and works as a nurse.",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    parser.add_argument("--mix", default="", help="name=weight,name=weight; default: all models alike")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens of each answer (default 48)")
    parser.add_argument("--pace", type=float, default=0.0, help="least seconds between a user's requests (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of adapters and prompts (default 0)")
    parser.add_argument("--bearer", default="", help="API key, if the server wants one")


def parse_mix(text: str) -> dict[str, float]:
    """``a=2,b=1`` as weights. ValueError for anything else."""
    mix = {}
    for part in filter(None, text.split(",")):
        name, separator, weight = part.rpartition("=")
        if not separator or not name or float(weight) <= 0:
            raise ValueError(f"--mix: expected name=weight with a positive weight, got {part!r}")
        mix[name] = float(weight)
    return mix


@events.test_start.add_listener
def choose_mix(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    headers = {"Authorization": f"Bearer {options.bearer}"} if options.bearer else {}
    mix = parse_mix(options.mix)
    if not mix:
        listed = requests.get(f"{environment.host}/v1/models", headers=headers, timeout=10).json()["data"]
        mix = {model["id"]: 1.0 for model in listed}
    CompletionUser.mix, CompletionUser.headers = mix, headers
    CompletionUser.random = random.Random(options.seed)


def sse_events(stream: Any) -> Iterator[dict[str, Any] | None]:
    """The events of a response as they come, None for [DONE]. ``stream`` is geventhttpclient's.

    Line by line: locust's ``iter_content`` returns only when it has a whole block, so that the tokens of a second
    would seem to come at once.
    """
    while line := stream.readline(b"\n"):
        if line.startswith(b"data: "):
            data = line.removeprefix(b"data: ").strip()
            yield None if data == b"[DONE]" else json.loads(data)


class CompletionUser(FastHttpUser):
    """One client: asks, reads the stream to its end, asks again."""

    mix: ClassVar[dict[str, float]] = {}
    headers: ClassVar[dict[str, str]] = {}
    random: ClassVar[random.Random] = random.Random(0)
    network_timeout = 120.0

    def wait_time(self) -> float:
        pace = self.environment.parsed_options.pace
        return float(constant_pacing(pace)(self)) if pace else 0.0

    def record(self, kind: str, name: str, milliseconds: float, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=kind, name=name, response_time=milliseconds, response_length=0, exception=error, context={}
        )

    @task
    def stream(self) -> None:
        name = self.random.choices(list(self.mix), weights=list(self.mix.values()))[0]
        body = {
            "model": name,
            "messages": [{"role": "user", "content": self.random.choice(PROMPTS)}],
            "max_tokens": self.environment.parsed_options.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        start = last = time.perf_counter()
        tokens, done = 0, False
        with self.client.post(
            "/v1/chat/completions", json=body, headers=self.headers, stream=True, catch_response=True, name=name
        ) as response:
            if response.status_code != 200:
                if response.status_code != 0:  # 0: no connection, which locust reports itself
                    response.failure(f"HTTP {response.status_code}: {(response.text or '')[:200]}")
                return
            try:
                for event in sse_events(response.stream):
                    if event is None:
                        done = True
                        continue
                    if "error" in event:
                        response.failure(str(event["error"])[:200])
                        return
                    if not event["choices"] or not event["choices"][0]["delta"].get("content"):
                        continue
                    now = time.perf_counter()
                    self.record("TTFT" if tokens == 0 else "ITL", name, (now - last) * 1e3)
                    last, tokens = now, tokens + 1
            except (HTTPParseError, OSError) as error:
                response.failure(f"the stream broke after {tokens} tokens: {error!r}")
                return
            # locust's own number ends with the response's head, which comes with the first token.
            response.request_meta["response_time"] = (time.perf_counter() - start) * 1e3
            if not done or tokens == 0:
                response.failure(f"the stream ended after {tokens} tokens, {'with' if done else 'without'} [DONE]")
