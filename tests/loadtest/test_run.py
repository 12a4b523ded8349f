"""The load test as its users start it: a process, against scripted streams and against the real application."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from loadgen.profiles import PROFILES, requests_of
from loadgen.thresholds import OF_RUN, Threshold
from loadgen.traces import read_trace

from manylora.server.api.app import create_app
from manylora.server.config import ApiConfig
from tests.api.fakes import finish, make_serving, token
from tests.loadtest.scripted_server import SLOW_S, Seen, scripted_server

# Not importorskip: locust patches the standard library of the process that imports it.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed")

ROOT = Path(__file__).resolve().parents[2]
GOOD = ("--mix", "good=1")


@pytest.fixture
def scripted() -> Iterator[tuple[str, Seen]]:
    with scripted_server() as server:
        yield server


# Most runs go without matplotlib, which is optional, and takes longer to draw than they take to run.
WITHOUT_PICTURES = "import runpy, sys; sys.modules['matplotlib'] = None; sys.argv = sys.argv[1:]; "
WITHOUT_PICTURES += "runpy.run_path(sys.argv[0], run_name='__main__')"


def run(*arguments: object, out: Path, pictures: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", *([] if pictures else ["-c", WITHOUT_PICTURES]), str(ROOT / "loadtest" / "run.py")]
    command += ["--out", str(out), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=out.parent)


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def trace(path: Path, *requests: tuple[float, str, int]) -> Path:
    """(time, model, tokens) each, chats and completions in turn."""
    lines = [
        {"at_s": at, "model": model, "max_tokens": n, "prompt": "Hi", "kind": ("completion", "chat")[i % 2]}
        for i, (at, model, n) in enumerate(requests)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


KINDS = {
    "busy": "http_429", "error_event": "error_event", "broken": "broken_stream", "no_done": "no_done",
    "empty": "no_tokens", "slow": "timeout", "long": "timeout", "not_json": "malformed_event",
}  # fmt: skip
"""Models of the scripted server, and how their streams fail."""


def test_every_way_a_stream_can_fail_is_told_apart(scripted: tuple[str, Seen], tmp_path: Path) -> None:
    url, seen = scripted
    models = [*KINDS, "good", "double", "no_usage"]
    n = 2 * len(models) + 1
    # Each as a chat and as a completion.
    replayed = trace(
        tmp_path / "<b>.jsonl",
        *((i / 32, m, 60 if m == "long" else 6) for i, m in ((i, models[i % len(models)]) for i in range(n))),
    )
    out = tmp_path / "out"
    found = run("--host", url, "--trace", replayed, "--timeout", SLOW_S / 2, out=out, pictures=True)
    assert found.returncode == 1, found.stderr
    summary = summary_of(out)
    assert len(seen.bodies) == n
    failed = {model: kind for kind, one in summary["failures"].items() for model in one["models"]}
    assert failed == KINDS
    assert all(count >= 2 for one in summary["failures"].values() for count in one["models"].values())
    assert "try later" in summary["failures"]["http_429"]["example"]
    assert "it failed" in summary["failures"]["error_event"]["example"]
    assert "FAILED fail if failures>0" in found.stdout
    # An event may carry several tokens: they are counted by the usage, and by events only where there is none.
    per_event = {name: summary["adapters"][name]["tokens_per_event"] for name in ("good", "double", "no_usage")}
    assert per_event == {"good": 1, "double": 2, "no_usage": 1}
    counted = {name: summary["adapters"][name]["tokens_counted_by_server"] for name in per_event}
    assert counted == {"good": True, "double": True, "no_usage": False}
    assert "counted as events" in found.stdout
    # What was sent is what the trace says, and what is left behind replays it.
    assert Counter(body["path"] for body in seen.bodies) == {"/v1/completions": 12, "/v1/chat/completions": 11}
    again = read_trace(out / "trace.jsonl")
    assert [(r.at_s, r.model, r.kind) for r in again] == [(r.at_s, r.model, r.kind) for r in read_trace(replayed)]
    records = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert sum(record["failure"] != "" for record in records) == summary["total"]["requests"]["failed"]
    _is_self_contained((out / "report.html").read_text())


def _is_self_contained(page: str) -> None:
    assert page.count("<svg") == page.count("</svg>") == 4
    assert "<script" not in page
    assert "<link" not in page
    assert "<?xml" not in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", page)
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    clips = [one for one in ids if re.fullmatch(r"p[0-9a-f]{10}", one)]
    assert len(clips) == len(set(clips)) > 0, "pictures that share an id clip each other"
    assert "&lt;b&gt;.jsonl" in page
    for text in ("good", "double", "first token (TTFT)", "Failed", "try later"):
        assert text in page


def test_an_open_loop_does_not_wait_for_answers(scripted: tuple[str, Seen], tmp_path: Path) -> None:
    """Ten requests a tenth of a second apart, to a server that takes much longer for each."""
    url, seen = scripted
    out = tmp_path / "out"
    replayed = trace(tmp_path / "t.jsonl", *((0.1 * i, "slow", 2) for i in range(10)))
    found = run("--host", url, "--trace", replayed, "--fail-if", "ttft_p50_ms<300", out=out)
    assert found.returncode == 0, found.stdout
    gaps = [b - a for a, b in zip(seen.times, seen.times[1:], strict=False)]
    assert sum(gaps) == pytest.approx(0.9, abs=0.25)
    summary = summary_of(out)
    assert summary["generator"]["send_delay_ms"]["p50"] < 30
    assert summary["generator"]["waited_for_max_open"] == 0
    assert max(summary["timeline"]["in_flight"]) >= 3


def test_an_open_loop_that_lags_says_so(scripted: tuple[str, Seen], tmp_path: Path) -> None:
    """With one request open at a time the schedule cannot be kept: waiting counts, from when each was due."""
    out = tmp_path / "out"
    replayed = trace(tmp_path / "t.jsonl", *((0.1 * i, "slow", 2) for i in range(5)))
    found = run(
        "--host", scripted[0], "--trace", replayed, "--max-open", 1, "--fail-if", "generator_bottleneck>0", out=out
    )
    assert found.returncode == 1
    assert "THE GENERATOR DID NOT KEEP UP" in found.stdout
    assert "FAILED fail if generator_bottleneck>0: it is 1" in found.stdout
    page = (out / "report.html").read_text()
    assert "did not keep up" in page
    assert "matplotlib is not installed" in page
    summary = summary_of(out)
    # The last is due after 0.4 s and sent when four answers of 0.4 s have ended.
    late = 4 * SLOW_S - 0.4
    assert summary["generator"]["waited_for_max_open"] == 4
    assert summary["generator"]["send_delay_ms"]["max"] == pytest.approx(late * 1e3, rel=0.35)
    assert summary["total"]["ttft_ms"]["max"] == pytest.approx((late + SLOW_S) * 1e3, rel=0.35)


def test_what_the_end_cuts_off_is_counted(scripted: tuple[str, Seen], tmp_path: Path) -> None:
    out = tmp_path / "out"
    replayed = trace(tmp_path / "t.jsonl", *((0.0, "slow", 500) for _ in range(6)), (0.1, "good", 2))
    began = time.monotonic()
    found = run("--host", scripted[0], "--trace", replayed, "--max-open", 4, "--grace", 0.9, out=out)
    assert time.monotonic() - began < 15
    assert found.returncode == 1
    summary = summary_of(out)
    assert summary["total"]["requests"]["due"] == 7
    assert summary["failures"]["unfinished"]["count"] == 7
    assert summary["generator"]["never_sent"] == 3
    assert any("never sent" in reason for reason in summary["generator"]["reasons"])


def test_an_interrupted_run_still_reports(scripted: tuple[str, Seen], tmp_path: Path) -> None:
    url, seen = scripted
    command = [sys.executable, "-P", "-c", WITHOUT_PICTURES, str(ROOT / "loadtest" / "run.py"), "--host", url]
    command += [*GOOD, "--rate", "20", "--seconds", "600", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 30
        while len(seen.bodies) < 10:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1, text
    summary = summary_of(tmp_path / "out")
    assert summary["run"]["interrupted"] is True
    assert summary["run"]["seconds"] < 60
    assert 5 <= summary["total"]["requests"]["answered"] <= len(seen.bodies)
    assert summary["total"]["tokens_per_s"] > 20  # over the time that it lasted, not over the 600 s


def test_a_closed_loop_has_as_many_clients_as_it_says(scripted: tuple[str, Seen], tmp_path: Path) -> None:
    url, seen = scripted
    out = tmp_path / "out"
    # A key in the environment, too: it is sent, and kept nowhere.
    found = run(
        "--host", url, *GOOD, "--clients", 3, "--seconds", 1.2, "--output-tokens", 5, "--warmup", 0.3,
        "--bearer", "s3cret", "--fail-if", "good:failures>0", "--fail-if", "send_delay_p95_ms>1", out=out,
    )  # fmt: skip
    summary = summary_of(out)
    # A closed loop has no schedule, hence no delay, hence no pass.
    assert [one["passed"] for one in summary["thresholds"]] == [True, False], found.stdout
    assert found.returncode == 1
    records = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    # Not the timeline's, which looks once a second and may meet a client between two answers.
    assert max(sum(r["sent_s"] <= at["sent_s"] < r["end_s"] for r in records) for at in records) == 3
    assert max(summary["timeline"]["in_flight"]) <= 3
    assert seen.connections <= 3 + 2  # kept alive, each client its own
    assert seen.keys == {"Bearer s3cret"}
    assert all("s3cret" not in path.read_text() for path in out.iterdir())
    assert summary["window_s"] == [0.3, 1.2]
    # About 3 x 20 answers a second of 50 ms; a busy machine makes fewer.
    assert 5 <= len(seen.bodies) <= 3 * 24
    assert summary["total"]["requests"]["due"] < len(seen.bodies)
    assert all(body["max_tokens"] == 5 for body in seen.bodies)
    assert len(read_trace(out / "trace.jsonl")) == len(seen.bodies)


def test_swaps_while_traffic_goes_on(scripted: tuple[str, Seen], tmp_path: Path) -> None:
    url, seen = scripted
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"lora_alpha": 8}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    out = tmp_path / "out"
    found = run(
        "--host", url, *GOOD, "--clients", 1, "--seconds", 1.3, "--swap-every", 0.2, "--swap-upload", adapter,
        "--swap-actions", "replace,unload", "--admin-bearer", "boss", out=out,
    )  # fmt: skip
    assert found.returncode == 1, found.stderr
    assert [what for what, _ in seen.swaps] == ["put", "delete", "put", "delete", "put", "delete"]
    assert {key for _, key in seen.swaps} == {"Bearer boss"}
    summary = summary_of(out)
    assert summary["swaps"]["actions"]["replace"]["n"] == summary["swaps"]["actions"]["unload"]["n"] == 3
    missing = [name for name in OF_RUN if Threshold(name, ">", 0).check(summary)["value"] is None]
    assert missing == ["send_delay_p95_ms", "send_delay_max_ms"]  # a closed loop's
    # All answers are by weights named feedfeed, but what the server says that it loaded last is another version.
    assert summary["swaps"]["failures"] == summary["swaps"]["first_request"]["failures"]["wrong_version"]["count"] == 1
    assert "swap_failures>0: it is 1" in found.stdout


def test_locust_itself_runs_the_same(scripted: tuple[str, Seen], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless"]
    command += ["--host", scripted[0], "--out", str(out)]
    command += ["--profile", "closed", "--mix", "good=1,double=1", "--clients", "2", "--seconds", "1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert summary_of(out)["total"]["requests"]["answered"] > 0
    assert {"POST", "TTFT", "TPOT"} <= set(re.findall(r"^(POST|TTFT|TPOT)\b", found.stdout + found.stderr, re.M))


def test_no_server_and_no_such_model(scripted: tuple[str, Seen], tmp_path: Path) -> None:
    for host, arguments, says in (
        (scripted[0], ["--mix", "good=1,nobody=1"], "does not list nobody"),
        ("http://127.0.0.1:1", ["--wait", "0"], "does not answer"),
    ):
        found = run("--host", host, *arguments, out=tmp_path / "out")
        assert found.returncode == 3
        assert says in found.stderr
        assert "Traceback" not in found.stderr
    assert scripted[1].bodies == []


def test_a_trace_is_written_without_a_server(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    found = run("--profile", "burst", "--adapters", "a,b", "--seed", 5, "--write-trace", path, out=tmp_path / "out")
    assert found.returncode == 0, found.stderr
    assert read_trace(path) == list(requests_of(replace(PROFILES["burst"], seed=5), ["a", "b"], None))
    assert not (tmp_path / "out").exists()


# --- the real application --------------------------------------------------------------------------------------------


@pytest.fixture
def application(tmp_path: Path) -> Iterator[str]:
    """The real HTTP layer and registry over the fake engine, on a port; its adapters are ``alice`` and ``org/bob``."""
    serving = make_serving(tmp_path)
    engine: Any = serving.engine

    def two_at_a_time(request: Any) -> Any:
        """Events of two tokens each, but perhaps the last, up to ``max_tokens``."""
        n = request.params.max_tokens
        steps: list[Any] = [[token("ab"[: n - i])] for i in range(0, n, 2)]
        steps[-1].append(finish(request, "length", n=n))
        return steps

    engine.script = two_at_a_time
    config = ApiConfig(adapter_roots=(tmp_path,), upload_dir=tmp_path / "uploads")
    # uvicorn's own configuration of logging would outlive the test.
    server = uvicorn.Server(uvicorn.Config(create_app(serving, config), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_against_the_real_application(application: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(
        "--host", application, "--profile", "swaps", "--popularity", "distinct", "--base-share", 0.3, "--rate", 30,
        "--seconds", 2, "--swap-every", 0.3, "--output-tokens", "3-9", "--prompt-tokens", "2-4", out=out,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    summary = summary_of(out)
    assert set(summary["adapters"]) == {"base", "alice", "org/bob"}
    assert summary["run"]["server_models"] == ["base", "alice", "org/bob"]
    assert 1.5 <= summary["total"]["tokens_per_event"] <= 2
    assert summary["total"]["tokens_counted_by_server"] is True
    assert summary["total"]["output_tokens"] == sum(r.max_tokens for r in read_trace(out / "trace.jsonl"))
    swaps = summary["swaps"]
    assert {name: one["n"] for name, one in swaps["actions"].items()} == {"load": 2, "replace": 2, "unload": 2}
    assert (swaps["failures"], swaps["first_request"]["n"]) == (0, 4)
