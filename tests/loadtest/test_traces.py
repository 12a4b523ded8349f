"""Traces: what is written is read, what profiles write too, and what is wrong is named by its line and field."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import workload
from loadgen.errors import TraceError
from loadgen.profiles import PROFILES, requests_of
from loadgen.traces import TracedRequest, parse_line, read_trace, write_trace

GOOD = {"at_s": 0.5, "model": "a", "max_tokens": 8, "prompt_tokens": 16}


def test_round_trip(tmp_path: Path) -> None:
    requests = [
        TracedRequest(0.0, "a", 8, prompt="Hällo\n"),
        TracedRequest(0.25, "org/b", 1, prompt=(1000, 0, 7), ignore_eos=False),
        TracedRequest(1.5, "c", 64, "chat", prompt_tokens=32, prefix_tokens=16, prompt_seed=2**40),
        TracedRequest(1.5, "d", 64, prompt_tokens=32, extra={"guided_regex": "a+", "temperature": 0.5}),
        *requests_of(PROFILES["burst"], ["x", "y"], "base"),
    ]
    path = tmp_path / "t.jsonl"
    assert write_trace(path, sorted(requests, key=lambda r: r.at_s)) == len(requests)
    assert read_trace(path) == sorted(requests, key=lambda r: r.at_s)


def test_a_profiles_trace_is_the_same_to_the_byte(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_trace(tmp_path / name, requests_of(PROFILES["ramp"], ["x", "y"], None))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() != b""


def test_lines_are_put_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [{**GOOD, "at_s": at, "model": name} for at, name in ((2, "late"), (1, "first"), (1, "second"))]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert [request.model for request in read_trace(path)] == ["first", "second", "late"]


def test_bodies() -> None:
    chat = parse_line(
        '{"at_s": 0, "model": "m", "kind": "chat", "prompt": "Hi", "max_tokens": 3, "extra": {"top_p": 0.5}}'
    )
    assert chat.body() == {
        "model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "top_p": 0.5,
    }  # fmt: skip
    ids = parse_line('{"at_s": 0, "model": "m", "prompt": [5, 6], "max_tokens": 3, "ignore_eos": false}').body()
    assert ids["prompt"] == (5, 6)
    assert "ignore_eos" not in ids


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"at_s": None}, "at_s", "number"),
        ({"at_s": -1}, "at_s", "-1"),
        ({"at_s": True}, "at_s", "number"),
        ({"at_s": float("nan")}, "at_s", "nan"),
        ({"at_s": 1e9}, "at_s", "86400"),
        ({"model": ""}, "model", "text"),
        ({"model": ...}, "model", "missing"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": ...}, "max_tokens", "missing"),
        ({"kind": "poem"}, "kind", "poem"),
        ({"prompt_tokens": 0}, "prompt_tokens", "from 1"),
        ({"prompt_tokens": ...}, "prompt", "missing"),
        ({"prompt": "x"}, "prompt", "not together"),
        ({"prompt_tokens": ..., "prompt": []}, "prompt", "token ids"),
        ({"prompt_tokens": ..., "prompt": [1, True]}, "prompt", "token ids"),
        ({"prompt_tokens": ..., "prompt": [1], "kind": "chat"}, "prompt", "completions"),
        ({"prompt_tokens": ..., "prompt": [1], "prompt_seed": 1}, "prompt", "not together"),
        ({"ignore_eos": 1}, "ignore_eos", "true or false"),
        ({"extra": []}, "extra", "object"),
        ({"extra": {"max_tokens": 9}}, "extra", "max_tokens"),
        ({"adapter": "a"}, "adapter", "no such field"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, change: dict[str, object], field: str, says: str) -> None:
    line = {name: value for name, value in {**GOOD, **change}.items() if value is not ...}
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    where, _, rest = str(caught.value).partition(": ")
    assert where == f"{path}:2"
    assert rest.startswith(f"{field}: ")
    assert says in rest


@pytest.mark.parametrize(
    ("text", "says"), [("{", ":1: not JSON"), ("[1]", ":1: expected a JSON object"), ("\n", "no requests")]
)
def test_what_is_no_trace(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError, match=says):
        read_trace(path)
    with pytest.raises(TraceError, match="nowhere"):
        read_trace(tmp_path / "nowhere")


@pytest.mark.parametrize("case", workload.CASES, ids=str)
def test_the_benchmarks_cases_are_traces(tmp_path: Path, case: workload.Case) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in case.trace("base")))
    requests = read_trace(path)
    assert [(r.model, r.prompt, r.max_tokens) for r in requests] == [
        (case.adapter(row) or "base", tuple(case.prompt(row)), workload.OUTPUT_TOKENS) for row in range(case.rows)
    ]
