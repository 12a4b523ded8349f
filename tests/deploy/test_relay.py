from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from manylora.deploy.ray_serve import relay as relay_module
from manylora.deploy.ray_serve.relay import (
    BrokenOff,
    Elsewhere,
    Overcrowded,
    Part,
    Patience,
    ReplicaLost,
    Taken,
    TooLate,
    Unanswered,
    relay,
)
from manylora.deploy.ray_serve.routes import Body, Message, Route, Scope

SCOPE: Scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"x-request-id", b"id-1")]}
PATIENCE = Patience(lost=3, wait_s=5.0)

Step = Part | Exception


def start(kind: str = "text/event-stream; charset=utf-8", status: int = 200) -> Message:
    headers = [(b"content-type", kind.encode()), (b"x-request-id", b"id-1"), (b"retry-after", b"7")]
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(text: str, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Scripted:
    """Each ask gets the next script; what was asked is kept."""

    def __init__(self, *scripts: list[Step]) -> None:
        self.scripts = list(scripts)
        self.routes: list[Route] = []
        self.closed = 0

    async def ask(self, route: Route, scope: Scope, body: Body) -> AsyncGenerator[Part, None]:
        self.routes.append(route)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            for step in script:
                if isinstance(step, Exception):
                    raise step
                yield step
        finally:
            self.closed += 1


def run(replicas: Scripted, **settings: Any) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(relay(replicas, ("a",), SCOPE, Body(b"{}"), send, settings.pop("patience", PATIENCE), **settings))
    return sent


def text_of(sent: list[Message]) -> str:
    return "".join(message.get("body", b"").decode() for message in sent)


GOOD: list[Step] = [Taken("r1"), [start(), body("data: 1\n\n")], [body("data: [DONE]\n\n", more=False)]]


def test_an_answer_passes_as_it_is_but_for_the_replica_s_id() -> None:
    replicas = Scripted(GOOD)
    sent = run(replicas)
    assert sent[0]["status"] == 200
    assert sent[0]["headers"] == [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"retry-after", b"7"),
        (b"x-manylora-replica", b"r1"),
    ]
    assert sent[1:] == [body("data: 1\n\n"), body("data: [DONE]\n\n", more=False)]
    assert replicas.routes == [Route(("a",))]


def test_another_id_than_the_request_s_is_kept() -> None:
    other = start()
    other["headers"] = [(b"x-request-id", b"made up by the server")]
    sent = run(Scripted([Taken("r1"), [other, body("", more=False)]]))
    assert sent[0]["headers"][0] == (b"x-request-id", b"made up by the server")


def test_a_stream_goes_out_as_it_comes() -> None:
    seen: list[int] = []
    sent: list[Message] = []

    class Slow(Scripted):
        async def ask(self, route: Route, scope: Scope, body: Body) -> AsyncGenerator[Part, None]:
            async for part in super().ask(route, scope, body):
                yield part
                seen.append(len(sent))

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(relay(Slow(GOOD), (), SCOPE, Body(), send, PATIENCE))
    assert seen == [0, 2, 3]


@pytest.mark.parametrize("before", [[], [Taken("r1")], [Taken("r1"), [start("application/json")]]])
def test_a_replica_lost_before_anything_was_sent_is_replaced_unseen(before: list[Step]) -> None:
    replicas = Scripted([*before, ReplicaLost("died")], GOOD)
    assert text_of(run(replicas)) == "data: 1\n\ndata: [DONE]\n\n"
    assert len(replicas.routes) == 2


def test_a_json_answer_is_sent_whole_or_from_another_replica() -> None:
    half: list[Step] = [Taken("r1"), [start("application/json"), body('{"a": ')], ReplicaLost("died")]
    whole: list[Step] = [Taken("r2"), [start("application/json"), body('{"a": ')], [body("2}", more=False)]]
    sent = run(Scripted(half, whole))
    assert text_of(sent) == '{"a": 2}'
    assert sent[0]["headers"][-1] == (b"x-manylora-replica", b"r2")


@pytest.mark.parametrize("lost", [ReplicaLost("died"), BrokenOff("bug")])
@pytest.mark.parametrize(("last", "gap"), [("data: 1\n\n", ""), ("data: 1", "\n\n")])
def test_a_stream_whose_replica_is_lost_ends_with_an_error_event(lost: Exception, last: str, gap: str) -> None:
    replicas = Scripted([Taken("r1"), [start(), body(last)], lost])
    sent = run(replicas)
    assert len(replicas.routes) == 1
    assert sent[-1]["more_body"] is False
    assert sum(not message.get("more_body", True) for message in sent) == 1
    events = text_of(sent).removeprefix(last + gap)
    assert events.startswith("data: ")
    assert events.endswith("\n\n")
    error = json.loads(events.removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)


def test_an_answer_without_an_end_is_no_answer() -> None:
    sent = run(Scripted([Taken("r1"), [start(), body("data: 1\n\n")]]))
    assert "error" in text_of(sent)
    with pytest.raises(BrokenOff):
        run(Scripted([Taken("r1"), [start("application/json"), body("{")]]))


def test_a_request_under_which_replica_after_replica_dies_is_given_up() -> None:
    replicas = Scripted([ReplicaLost("died")])
    with pytest.raises(Unanswered, match="3 replicas were lost while they worked on this request"):
        run(replicas)
    assert len(replicas.routes) == 3


def test_a_bug_is_not_tried_elsewhere() -> None:
    replicas = Scripted([Taken("r1"), BrokenOff("bug")])
    with pytest.raises(BrokenOff):
        run(replicas)
    assert len(replicas.routes) == 1


def test_who_sends_a_request_away_is_not_asked_again_while_others_may_answer() -> None:
    replicas = Scripted([Elsewhere("r1", "not here")], [Elsewhere("r2", "not here")], GOOD)
    assert text_of(run(replicas)).endswith("[DONE]\n\n")
    assert [route.avoid for route in replicas.routes] == [frozenset(), {"r1"}, {"r1", "r2"}]


def test_when_all_send_it_away_they_are_asked_again_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += 1

    monkeypatch.setattr(relay_module.asyncio, "sleep", sleep)
    replicas = Scripted([Elsewhere("r1", "adapter a: its files are gone")])
    with pytest.raises(Unanswered, match="adapter a: its files are gone") as error:
        run(replicas, clock=lambda: now)
    assert error.value.retry_after > 0
    assert len(replicas.routes) == 11, "twice in each round, and once more"


def test_what_no_replica_has_is_told_as_soon_as_all_were_asked() -> None:
    here, there = Elsewhere("r1", "gone", is_passing=False), Elsewhere("r2", "gone", is_passing=False)
    replicas = Scripted([here], [there], [here], GOOD)
    with pytest.raises(Unanswered, match="gone"):
        run(replicas)
    assert len(replicas.routes) == 3


def test_an_answer_that_does_not_begin_in_time_is_given_up_and_one_that_has_begun_is_not() -> None:
    class Slow(Scripted):
        def __init__(self, pauses: list[float]) -> None:
            super().__init__(GOOD)
            self.pauses = pauses

        async def ask(self, route: Route, scope: Scope, body: Body) -> AsyncGenerator[Part, None]:
            async with contextlib.aclosing(super().ask(route, scope, body)) as parts:
                async for part in parts:
                    await asyncio.sleep(self.pauses.pop(0))
                    yield part

    replicas = Slow([0.0, 5.0])
    with pytest.raises(TooLate):
        run(replicas, patience=Patience(begin_s=0.05))
    assert replicas.closed == 1
    assert text_of(run(Slow([0.0, 0.0, 0.2]), patience=Patience(begin_s=0.1))).endswith("[DONE]\n\n")


def test_too_many_requests_are_told_so_with_nothing_sent() -> None:
    with pytest.raises(Overcrowded):
        run(Scripted([Overcrowded("full")]))


def test_a_client_that_leaves_ends_the_replica_s_work() -> None:
    replicas = Scripted(GOOD)

    async def main(send: Callable[[Message], Any]) -> None:
        await relay(replicas, (), SCOPE, Body(), send, PATIENCE)

    async def send(_message: Message) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        asyncio.run(main(send))
    assert replicas.closed == 1
