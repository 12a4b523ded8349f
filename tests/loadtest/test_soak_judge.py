"""The soak's judge: what it must see, on answers made up by hand; and that it passes nothing unseen."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from loadgen.soak.answers import Answer, Choice, Leave, ask
from loadgen.soak.judge import Judge
from loadgen.soak.questions import QUESTIONS, Ask, Reference, random_ask, suffix_of
from loadgen.soak.session import Soak, SoakSettings
from loadgen.soak.verdict import EXPECTED, Limits, console_text, summary
from loadgen.soak.vitals import MIB, Sample
from loadgen.soak.world import ABSENT, Uses, World, composition
from loadgen.soak.wrong_requests import Wrong, problem_of

OLD, NEW, SQL = "a" * 12, "b" * 12, "c" * 12
SHORT, STRUCTURED = QUESTIONS[0], QUESTIONS[-1]
NAME: Uses = (("name", 1.0),)
BOTH: Uses = (("name", 0.5), ("sql", 1.0))


@pytest.fixture
def judge() -> Judge:
    """``name`` means OLD; there are references for it, for NEW, and for OLD merged."""
    world = World(
        {"sql": SQL + "0" * 52}, ["name"], {composition([OLD, SQL], [0.5, 1.0]): "d" * 12},
    )  # fmt: skip
    world.names["name"].changed(OLD)
    references = {
        (suffix, SHORT.name): Reference((first, 2, 3, 4), (-0.5, -1.5, -2.5, -3.5), "text", is_whole=False)
        for first, suffix in enumerate([OLD, NEW, f"{OLD}-exact", "d" * 12, "base"])
    }
    references[OLD, STRUCTURED.name] = Reference((7, 8), (-0.1, -0.2), "{}", is_whole=True)
    return Judge(references, world)


def asked(uses: Uses = NAME, *, question: Any = SHORT, leave: Leave | None = None, **fields: Any) -> Ask:
    return Ask(question, uses, {"max_tokens": 4, "return_token_ids": True, **fields}, leave)


def answer(suffix: str, tokens: list[int | str], *, logprobs: tuple[float, ...] = (), **fields: Any) -> Answer:
    choice = Choice(tokens, list(logprobs), "text", "length")
    return Answer(200, fingerprints={f"fp_12345678_{suffix}"}, choices={0: choice}, **fields)


def judged(judge: Judge, what: Ask, got: Answer, between: Callable[[], None] = lambda: None) -> dict[str, int]:
    """What failed; ``between`` happens while the request runs."""
    moments = judge.world.moments(what.uses)
    between()
    judge.answered(what, moments, got)
    return dict(judge.failed)


def test_a_right_answer_is_checked(judge: Judge) -> None:
    assert judged(judge, asked(logprobs=1), answer(OLD, [0, 2, 3, 4], logprobs=(-0.5, -1.5, -2.5, -3.5))) == {}
    assert judged(judge, asked(max_tokens=2), answer(OLD, [0, 2])) == {}
    assert judge.checked == 2


@pytest.mark.parametrize(
    "suffix", [NEW, SQL, "base", f"{OLD}-exact", f"{OLD}-compact", "d" * 12], ids=lambda suffix: suffix[-8:]
)
def test_weights_that_the_name_did_not_mean(judge: Judge, suffix: str) -> None:
    assert judged(judge, asked(), answer(suffix, [0, 2, 3, 4])) == {"wrong version": 1}
    assert judge.checked == 0
    assert judge.failures[0]["asked"]["max_tokens"] == 4


def test_the_right_digest_over_the_other_weights_tokens(judge: Judge) -> None:
    assert judged(judge, asked(), answer(OLD, [1, 2, 3, 4])) == {"wrong answer": 1}
    assert "[1, 2, 3, 4] are not [0, 2, 3, 4]" in judge.failures[0]["why"]


def test_a_last_bit_of_a_log_probability(judge: Judge) -> None:
    got = answer(OLD, [0, 2, 3, 4], logprobs=(-0.5, -1.5, -2.5, -3.5000000000000004))
    assert judged(judge, asked(logprobs=1), got) == {"wrong answer": 1}


@pytest.mark.parametrize(
    ("tokens", "logprobs"), [([0, 2, 3], ()), ([0, 2, 3, 4, 5], ()), ([], ()), ([0, 2, 3, 4], (-0.5,))]
)
def test_too_little_and_too_much(judge: Judge, tokens: list[int | str], logprobs: tuple[float, ...]) -> None:
    fields = {"logprobs": 1} if logprobs else {}
    assert judged(judge, asked(**fields), answer(OLD, tokens, logprobs=logprobs)) == {"wrong answer": 1}


def test_every_choice_is_looked_at(judge: Judge) -> None:
    good, both = answer(OLD, [0, 2, 3, 4]), answer(OLD, [0, 2, 3, 4])
    both.choices[1] = Choice([0, 2, 9, 4], finish="length")
    assert judged(judge, asked(n=2), both) == {"wrong answer": 1}
    assert judged(judge, asked(n=2), good) == {"wrong answer": 2}


def test_an_answer_that_ends_by_itself(judge: Judge) -> None:
    what = asked(question=STRUCTURED, max_tokens=9)
    whole = answer(OLD, [7, 8])
    whole.choices[0].finish = "stop"
    assert judged(judge, what, whole) == {}
    assert judged(judge, what, answer(OLD, [7, 8, 9])) == {"wrong answer": 1}
    assert judged(judge, what, answer(OLD, [7])) == {"wrong answer": 2}
    assert judged(judge, what, answer(OLD, [7, 8])) == {"wrong answer": 3}, "it ends by stop, not by length"


def test_a_stream_that_was_left_is_compared_as_far_as_it_came(judge: Judge) -> None:
    what = asked(leave=Leave(events=2), max_tokens=64, stream=True)
    assert judged(judge, what, answer(OLD, [0, 2], left=True, events=2)) == {}
    assert judge.checked == 1
    assert judged(judge, what, answer(OLD, [0, 3], left=True, events=2)) == {"wrong answer": 1}
    assert judged(judge, what, Answer(left=True)) == {"wrong answer": 1}
    assert judge.checked == 1, "nothing came, so nothing was checked"
    assert judge.done["left before the first token"] == 1


def test_while_a_name_changes_both_versions_may_answer(judge: Judge) -> None:
    name = judge.world.names["name"]
    assert judged(judge, asked(), answer(NEW, [1, 2, 3, 4]), lambda: name.changing(NEW)) == {}
    assert judged(judge, asked(), answer(OLD, [0, 2, 3, 4]), lambda: name.changed(NEW)) == {}
    assert judged(judge, asked(), answer(OLD, [0, 2, 3, 4])) == {"wrong version": 1}, "it was acknowledged before"


def test_a_merged_version_must_be_answered_merged(judge: Judge) -> None:
    merge = judge.world.merge
    assert judged(judge, asked(), answer(f"{OLD}-exact", [2, 2, 3, 4]), lambda: merge.changing((OLD, "exact"))) == {}
    merge.changed((OLD, "exact"))
    assert judged(judge, asked(), answer(f"{OLD}-exact", [2, 2, 3, 4])) == {}
    assert judged(judge, asked(), answer(OLD, [0, 2, 3, 4])) == {"wrong version": 1}
    assert judged(judge, asked(BOTH), answer("d" * 12, [3, 2, 3, 4])) == {"wrong version": 1}, "compositions are not"


def test_404_only_where_the_name_may_be_gone(judge: Judge) -> None:
    gone = Answer(404, error="{}")
    assert judged(judge, asked(), gone) == {"refused": 1}
    assert judged(judge, asked(BOTH), gone, lambda: judge.world.names["name"].changing(ABSENT)) == {"refused": 1}
    assert judge.done["404 while a name was absent"] == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_every_5xx_is_a_failure_and_429_is_not(judge: Judge, status: int) -> None:
    assert judged(judge, asked(), Answer(429, error="{}")) == {}
    assert judged(judge, asked(), Answer(status, error="{}")) == {"5xx": 1}
    judge.status(status, "a scrape")
    assert judge.failed == {"5xx": 2}
    assert judge.statuses == {429: 1, status: 2}


def test_no_reference_is_no_pass(judge: Judge) -> None:
    judge.world.names["name"].changed("e" * 12)
    assert judged(judge, asked(), answer("e" * 12, [0, 2, 3, 4])) == {"no reference": 1}
    assert judge.checked == 0


def test_two_versions_or_two_bases_in_one_answer(judge: Judge) -> None:
    two = answer(OLD, [0, 2, 3, 4])
    two.fingerprints.add(f"fp_12345678_{NEW}")
    assert judged(judge, asked(), two) == {"wrong version": 1}
    assert judged(judge, asked(), answer(OLD, [0, 2, 3, 4])) == {"wrong version": 1}
    other = answer(OLD, [0, 2, 3, 4])
    other.fingerprints = {f"fp_87654321_{OLD}"}
    assert judged(judge, asked(), other) == {"wrong version": 2}
    assert suffix_of(f"fp_12345678_{OLD}-exact") == f"{OLD}-exact"


# --- reading what came -----------------------------------------------------------------------------------------------


def client_of(*lines: str, status: int = 200) -> httpx.Client:
    """Whose every answer has these lines."""

    def body() -> Iterator[bytes]:
        for line in lines:
            yield line.encode() + b"\n\n"

    return httpx.Client(
        base_url="http://soak", transport=httpx.MockTransport(lambda _: httpx.Response(status, content=body()))
    )


def event(token: int) -> str:
    choice = {"index": 0, "text": "x", "token_ids": [token], "logprobs": None, "finish_reason": None}
    return "data: " + json.dumps({"system_fingerprint": f"fp_1_{OLD}", "choices": [choice]})


def test_streams_whole_cut_and_left() -> None:
    whole = ask(client_of(event(1), event(2), "data: [DONE]"), "completion", {"stream": True})
    assert (whole.broken, whole.left, whole.choice(0).tokens) == ("", False, [1, 2])
    cut = ask(client_of(event(1)), "completion", {"stream": True})
    assert cut.broken == "the stream ended without [DONE]"
    left = ask(client_of(event(1), event(2), "data: [DONE]"), "completion", {"stream": True}, Leave(events=1))
    assert (left.broken, left.left, left.choice(0).tokens) == ("", True, [1])
    failed = ask(client_of(event(1), 'data: {"error": {"message": "it failed"}}'), "completion", {"stream": True})
    assert failed.broken == "an error event"
    assert "it failed" in failed.error


def test_connections_that_the_client_did_not_end() -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    def stall(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("nothing came")

    stalled = httpx.Client(base_url="http://soak", transport=httpx.MockTransport(stall))
    refused = httpx.Client(base_url="http://soak", transport=httpx.MockTransport(refuse))
    assert "refused" in ask(refused, "completion", {}).broken
    assert "refused" in ask(refused, "completion", {}, Leave(after_s=0.1)).broken
    assert "nothing came for" in ask(stalled, "completion", {}).broken
    patient = ask(stalled, "completion", {}, Leave(after_s=0.1))
    assert (patient.broken, patient.left) == ("", True)


def test_a_wrong_request_must_be_refused_as_documented() -> None:
    wrong = Wrong("x", 400, "POST", "/", b"", also=409)

    def problem(status: int, body: Any) -> str:
        return problem_of(wrong, httpx.Response(status, json=body))

    assert problem(400, {"error": {"code": 400, "message": "no"}}) == ""
    assert problem(409, {"error": {"code": 409, "message": "no"}}) == ""
    assert problem(200, {"choices": []}) == "HTTP 200, not 400"
    assert problem(404, {"error": {"code": 404, "message": "no"}}) == "HTTP 404, not 400"
    assert "shape" in problem(400, {"detail": "no"})
    assert "shape" in problem(400, {"error": {"code": 404, "message": "no"}})


# --- the verdict -----------------------------------------------------------------------------------------------------

LIMITS = Limits(max_slope=64, warm_up_s=60)


@pytest.fixture
def soak(judge: Judge, tmp_path: Path) -> Soak:
    """20 minutes in which everything went well."""
    made = Soak(SoakSettings(20, 0, tmp_path))
    made.judge = judge
    made.exit_code, made.integrity, made.soaked_s = 0, "integrity check passed", 1200.0
    made.samples = [Sample(2.0 * i, 500 * MIB, 30, 40) for i in range(600)]
    for kind in EXPECTED:
        judge.count(kind)
    judge.answered(asked(), judge.world.moments(NAME), answer(OLD, [0, 2, 3, 4]))
    return made


def problems(soak: Soak) -> list[str]:
    found = summary(soak, LIMITS)
    assert ("FAILED" in console_text(found, soak.settings.out)) is bool(found["problems"])
    assert found["passed"] is (not found["problems"])
    return list(found["problems"])


def test_a_good_soak_passes(soak: Soak) -> None:
    assert problems(soak) == []


def test_nothing_checked_is_no_pass(soak: Soak) -> None:
    soak.judge.checked_by.clear()
    assert problems(soak) == ["not a single answer was checked"]


def test_what_never_happened_was_not_soaked(soak: Soak) -> None:
    del soak.judge.done["merges, exact"]
    assert problems(soak) == ["nothing of this happened: merges, exact"]


def test_one_failure_is_enough(soak: Soak) -> None:
    soak.judge.answered(asked(), soak.judge.world.moments(NAME), answer(NEW, [1, 2, 3, 4]))
    assert problems(soak) == ["1 x wrong version"]


def test_memory_that_grows(soak: Soak) -> None:
    soak.samples = [Sample(2.0 * i, (500 + i) * MIB, 30, 40) for i in range(600)]
    assert problems(soak) == ["RSS grows by 1800 ± 0 MiB an hour"]


def test_threads_and_files_that_grow(soak: Soak) -> None:
    soak.samples = [Sample(2.0 * i, 500 * MIB, 30 + i // 60, 40 + i // 10) for i in range(600)]
    assert problems(soak) == ["threads: 6 more at the end", "files: 38 more at the end"]


@pytest.mark.parametrize(
    ("code", "log", "expected"),
    [
        (0, "INFO x: integrity check passed: nothing", []),
        (0, "INFO x: bye", ["1 x integrity"]),
        (1, "ERROR x: integrity check failed: 3 pages", ["1 x the server", "1 x integrity"]),
        (0, "x ERROR x: integrity check failed\nintegrity check passed", ["1 x integrity", "1 x errors in the log"]),
        (0, "integrity check passed\nx CRITICAL y: the step loop has stopped", ["1 x errors in the log"]),
        (-9, "integrity check passed", ["1 x the server"]),
    ],
)
def test_the_servers_end(soak: Soak, code: int, log: str, expected: list[str]) -> None:
    soak.exit_code = code
    soak._read_log(log)
    assert problems(soak) == expected


def test_every_question_can_be_asked_in_every_way() -> None:
    rng = random.Random(3)
    asks = [random_ask(rng, "base", NAME) for _ in range(2000)]
    assert {one.question.name for one in asks} == {question.name for question in QUESTIONS}
    assert {one.body["stream"] for one in asks} == {True, False}
    left = [one for one in asks if one.leave is not None]
    assert 0.15 < len(left) / len(asks) < 0.35
    # What is compared of a chat are its tokens with their log-probabilities, or else the text of just so many tokens.
    assert all(one.body.get("logprobs") for one in left if one.question.kind == "chat")
    assert asks == [random_ask(again, "base", NAME) for again in [random.Random(3)] for _ in range(2000)]
