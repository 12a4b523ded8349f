"""One request over HTTP, read as it comes, perhaps left half-way; and what came."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

ANSWER_S = 120.0
"""Far more than any answer of a soak takes, on however busy a machine: what a hang is told by."""
PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Leave:
    """When a client goes away: ``after_s`` seconds without a byte of the answer, or after ``events`` events of it."""

    after_s: float | None = None
    events: int | None = None


@dataclass
class Choice:
    """Of a completion the tokens are ids, of a chat their texts."""

    tokens: list[int | str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish: str = ""


@dataclass
class Answer:
    """``status`` 0: none came. ``left``: the client went away, as it meant to. ``broken``: why the answer is no whole
    answer, though the client stayed."""

    status: int = 0
    left: bool = False
    broken: str = ""
    fingerprints: set[str] = field(default_factory=set)
    choices: dict[int, Choice] = field(default_factory=dict)
    error: str = ""
    events: int = 0

    def choice(self, index: int) -> Choice:
        return self.choices.setdefault(index, Choice())

    def fields(self) -> dict[str, Any]:
        """For a JSON line."""
        return {
            "status": self.status, "left": self.left, "broken": self.broken, "error": self.error[:1000],
            "fingerprints": sorted(self.fingerprints), "events": self.events,
            "choices": {index: vars(choice) for index, choice in self.choices.items()},
        }  # fmt: skip


def ask(client: httpx.Client, kind: str, body: Mapping[str, Any], leave: Leave | None = None) -> Answer:
    """Never raises for what the server does: the answer says."""
    answer = Answer()
    patience = ANSWER_S if leave is None or leave.after_s is None else leave.after_s
    try:
        with client.stream("POST", PATHS[kind], json=body, timeout=httpx.Timeout(ANSWER_S, read=patience)) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                answer.error = response.read().decode(errors="replace")
            elif body.get("stream"):
                _read_events(response, answer, leave)
            else:
                _take(json.loads(response.read()), answer)
    except httpx.ReadTimeout:
        answer.left = leave is not None and leave.after_s is not None
        if not answer.left:
            answer.broken = f"nothing came for {ANSWER_S:g} s"
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        answer.broken = repr(error)[:500]
    return answer


def _read_events(response: httpx.Response, answer: Answer, leave: Leave | None) -> None:
    for line in response.iter_lines():
        if not line:
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            answer.error = json.dumps(event["error"])
            answer.broken = "an error event"
            return
        _take(event, answer)
        answer.events += 1
        if leave is not None and leave.events is not None and answer.events >= leave.events:
            answer.left = True
            return
    answer.broken = "the stream ended without [DONE]"


def _take(fields: Mapping[str, Any], answer: Answer) -> None:
    """A whole answer, or one event of a stream."""
    answer.fingerprints.add(str(fields["system_fingerprint"]))
    for one in fields["choices"]:
        choice = answer.choice(int(one["index"]))
        choice.finish = one["finish_reason"] or choice.finish
        message = one.get("delta") or one.get("message")
        choice.text += (message.get("content") or "") if message is not None else one.get("text") or ""
        logprobs = one.get("logprobs")
        if "text" in one:
            choice.tokens += one.get("token_ids") or ()
            choice.logprobs += (logprobs or {}).get("token_logprobs") or ()
        else:
            for token in (logprobs or {}).get("content") or ():
                choice.tokens.append(token["token"])
                choice.logprobs.append(token["logprob"])
