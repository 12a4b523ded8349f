"""The command line: flags to configuration, help, exit codes, and `adapters` against a server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from manylora.server import admin_client, cli
from manylora.server.config import AdapterSpec, ConfigError, ServeConfig
from manylora.server.engine.auto_merge import AutoMerge

COMMANDS = [
    [],
    ["serve"],
    ["plan"],
    ["quantize"],
    ["merge"],
    ["inspect"],
    ["adapters"],
    ["keys"],
    *[["keys", action] for action in ("add", "list", "revoke")],
    *[["adapters", action] for action in ("list", "load", "unload", "pin", "merge", "unmerge")],
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MANYLORA_API_KEY", "MANYLORA_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


def config(*flags: str) -> ServeConfig:
    return cli.serve_config(cli._parser().parse_args(["serve", *flags]))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "example:" in text
    assert "manylora " + " ".join(command) in " ".join(text.split())


@pytest.mark.parametrize("line", ["", "dance", "serve --rank 7", "serve --port x", "adapters", "quantize src"])
def test_a_wrong_command_line_is_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(line.split())
    assert exit_.value.code == 2
    assert "usage: manylora" in capsys.readouterr().err


def test_help_needs_nothing_heavy() -> None:
    """`--help` imports the standard library only, so it is there at once."""
    code = (
        "import sys; from manylora.server import cli; cli._parser(); "
        "heavy = {'torch', 'numpy', 'fastapi', 'pydantic', 'httpx', 'uvicorn', 'transformers'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_flag_arrives(tmp_path: Path) -> None:
    adapters, roots, state = (tmp_path / name for name in ("adapters", "roots", "state"))
    keys = tmp_path / "keys.toml"
    keys.write_text("")
    adapters.mkdir()
    roots.mkdir()
    got = config(
        *("--model", "m", "--served-model-name", "base", "--cache-dir", str(tmp_path)),
        *("--adapter", "a=x", "--adapter", "b=y", "--adapter-dir", str(adapters), "--adapter-root", str(roots)),
        *("--state-dir", str(state), "--host", "0.0.0.0", "--port", "81", "--api-key", "k1", "--api-key", "k2"),
        *("--admin-key", "root", "--max-body", "1MiB", "--max-upload", "2MiB", "--shutdown-grace", "1.5"),
        *("--allow-request-chat-template", "--log-level", "debug", "--device", "cpu", "--threads", "2"),
        *("--max-rows", "4", "--max-batch-tokens", "64", "--max-context", "128", "--max-queue", "9"),
        *("--max-device-adapters", "3", "--max-rank", "32", "--kv-memory", "64MiB"),
        *("--max-host-adapters", "7", "--host-memory", "1GiB", "--table-memory", "0"),
        *("--watch", "2.5", "--adapters-on-demand", "50", "--auto-merge", "0.8:60:compact"),
        *("--keys", str(keys), "--protect-metrics", "--request-timeout", "20", "--client-timeout", "7.5"),
        *("--log-format", "json", "--otlp-endpoint", "http://localhost:4318", "--cpu-kernels", "torch"),
        *("--lora-dtype", "bfloat16", "--no-playground"),
    )
    assert (got.model, got.served_model_name, got.cache_dir, got.log_level) == ("m", "base", tmp_path, "debug")
    assert got.adapters == (AdapterSpec("a", "x"), AdapterSpec("b", "y"))
    assert (got.adapter_dir, got.state_dir) == (adapters, state)
    api, engine = got.api, got.engine
    assert (api.host, api.port, api.api_keys, api.admin_key) == ("0.0.0.0", 81, ("k1", "k2"), "root")
    assert (api.adapter_roots, api.upload_dir) == ((roots, adapters), state / "uploads")
    assert (api.max_body_bytes, api.max_upload_bytes, api.shutdown_grace) == (1 << 20, 2 << 20, 1.5)
    assert api.allow_request_chat_template
    assert (engine.device, engine.threads, engine.max_rows, engine.max_batch_tokens) == ("cpu", 2, 4, 64)
    assert (engine.cpu_kernels, engine.lora_dtype) == ("torch", "bfloat16")
    assert (engine.max_context, engine.max_queue, engine.max_device_adapters) == (128, 9, 3)
    assert (engine.max_rank, engine.kv_memory) == (32, 64 << 20)
    assert (engine.max_host_adapters, engine.host_memory, engine.table_memory) == (7, 1 << 30, 0)
    assert (got.watch, api.adapters_on_demand) == (2.5, 50)
    assert got.auto_merge == AutoMerge(0.8, 60.0, "compact")
    assert (api.keys_file, api.protect_metrics, api.playground) == (keys, True, False)
    assert (api.request_timeout, api.client_timeout) == (20.0, 7.5)
    assert config("--model", "m", "--request-timeout", "0").api.request_timeout is None
    assert (got.log_format, api.otlp_endpoint) == ("json", "http://localhost:4318")


def test_watching_and_loading_on_demand_have_numbers_of_their_own(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    where = ("--adapter-dir", str(tmp_path / "first"), "--adapter-root", str(tmp_path / "second"))
    got = config("--model", "m", *where, "--watch", "--adapters-on-demand")
    assert (got.watch, got.api.adapters_on_demand) == (5.0, 1000)
    got = config("--model", "m", *where)
    assert (got.watch, got.api.adapters_on_demand) == (None, 0)
    assert got.auto_merge is None


@pytest.mark.parametrize("given", ["0.8", "80:60", "0.8:60:fast"])
def test_a_bad_automatic_merge_names_its_flag(given: str) -> None:
    with pytest.raises(ConfigError, match=r"^--auto-merge: ") as error:
        config("--model", "m", "--auto-merge", given)
    assert error.value.flag == "--auto-merge"


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    got = config("--model", "org/m")
    assert got == ServeConfig(
        model="org/m", state_dir=Path("/state/manylora/m-8000"), api=got.api, engine=ServeConfig(model="m").engine
    )
    assert (got.api.host, got.api.port, got.api.adapter_roots) == ("127.0.0.1", 8000, ())
    assert got.api.playground
    assert got.api.upload_dir == Path("/state/manylora/m-8000/uploads")
    none = config("--model", "m", "--state-dir", "none")
    assert (none.state_dir, none.api.upload_dir) == (None, None)


def test_keys_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_API_KEY", "k")
    monkeypatch.setenv("MANYLORA_ADMIN_KEY", "root")
    got = config("--model", "m").api
    assert (got.api_keys, got.admin_key) == (("k",), "root")
    got = config("--model", "m", "--api-key", "other", "--admin-key", "else").api
    assert (got.api_keys, got.admin_key) == (("other",), "else")


def test_the_demo_base_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "demo_base_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "DEMO_PACKAGE", "demo_base_package")
    assert config().model == str(package / "model.gguf")


def test_without_a_model_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "DEMO_PACKAGE", "no_such_package")
    assert cli.main(["serve"]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["--max-rows 0", "--kv-memory lots", "--adapter x", "--adapter-root /not/there", "--adapter-dir /not/there"]
)
def test_a_bad_value_is_refused_by_its_flag(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--model", "m", *line.split()]) == 2
    assert f"manylora: {line.split()[0]}: " in capsys.readouterr().err


def test_bad_flags_raise_before_anything_is_imported() -> None:
    with pytest.raises(ConfigError):
        config("--model", "m", "--port", "70000")


# --- adapters --------------------------------------------------------------------------------------------------------

ALICE = {
    "object": "adapter",
    "name": "alice",
    "version": "0123456789abcdef",
    "state": "ready",
    "tier": "device",
    "pinned": True,
    "ranks": [8, 16],
    "bytes": 3 << 20,
    "requests_in_flight": 2,
    "generation_tokens": 77,
    "warnings": ["careful"],
}

Handler = Callable[[httpx.Request], httpx.Response]


class FakeServer:
    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answer: Handler = lambda _request: httpx.Response(200, json=ALICE)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        return self.answer(request)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    fake, real = FakeServer(), admin_client.AdminClient

    def client(url: str, key: str | None) -> admin_client.AdminClient:
        return real(url, key, transport=httpx.MockTransport(fake))

    monkeypatch.setattr(admin_client, "AdminClient", client)
    return fake  # type: ignore[return-value]


def run(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    code = cli.main(["adapters", *line])
    out, err = capsys.readouterr()
    return code, out, err


def test_list(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda _request: httpx.Response(200, json={"object": "list", "data": [ALICE]})
    code, out, _ = run(capsys, "list", "--url", "http://host:1/", "--admin-key", "root")
    assert code == 0
    head, line = (text.split() for text in out.splitlines())
    assert head == ["NAME", "VERSION", "STATE", "TIER", "MERGED", "PINNED", "RANKS", "MIB", "RUNNING", "TOKENS"]
    assert line == ["alice", "0123456789ab", "ready", "device", "no", "yes", "8,16", "3.0", "2", "77"]
    [request] = server.requests
    assert str(request.url) == "http://host:1/v1/adapters"
    assert request.headers["authorization"] == "Bearer root"
    code, out, _ = run(capsys, "list", "--json")
    assert json.loads(out)["data"] == [ALICE]
    assert "authorization" not in server.requests[1].headers


def test_load(server: FakeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "load", "team/alice", str(tmp_path))
    assert code == 0
    assert "warning: careful" in out
    run(capsys, "load", "alice", "org/lora", "--replace", "--pin")
    first, second = server.requests
    assert (first.method, first.url.path) == ("PUT", "/v1/adapters/team/alice")
    assert json.loads(first.content) == {"source": str(tmp_path), "replace": False, "pinned": None}
    assert json.loads(second.content) == {"source": "org/lora", "replace": True, "pinned": True}


def test_the_list_shows_what_is_merged_and_what_is_an_alias(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    bob = ALICE | {"name": "bob", "tier": "disk", "merged": "compact", "alias_of": "alice", "ranks": []}
    server.answer = lambda _request: httpx.Response(
        200, json={"object": "list", "data": [ALICE | {"merged": None}, bob]}
    )
    _, out, _ = run(capsys, "list")
    head, first, second = out.splitlines()
    assert head.endswith("ALIAS OF")
    assert [line[head.index("MERGED") :].split()[0] for line in (first, second)] == ["no", "compact"]
    assert [line[head.index("TIER") :].split()[0] for line in (first, second)] == ["device", "disk"]
    assert [line.split()[-1] for line in (first, second)] == ["-", "alice"]


def test_alias(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "load", "bob", "--alias-of", "alice", "--replace")[0] == 0
    [request] = server.requests
    assert (request.method, request.url.path) == ("PUT", "/v1/adapters/bob")
    assert json.loads(request.content) == {"alias_of": "alice", "replace": True, "pinned": None}
    for line in (["load", "bob"], ["load", "bob", "somewhere", "--alias-of", "alice"]):
        code, _, err = run(capsys, *line)
        assert code == 2
        assert "--alias-of" in err
    assert len(server.requests) == 1


def test_merge_and_unmerge(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    merged = {"object": "adapter.merge", "name": "a b", "version": "0123456789abcdef", "mode": "compact"}
    merged |= {"bytes": 5 << 20, "drift": {"max": 0.25, "mean": 0.0123}}
    server.answer = lambda _request: httpx.Response(200, json=merged)
    code, out, _ = run(capsys, "merge", "a b", "--mode", "compact")
    assert code == 0
    assert out.splitlines() == [
        "a b (version 0123456789ab) is merged, compact: 5.0 MiB of weights besides the base's.",
        "Drift of its logits from the unmerged adapter's, on a probe: at most 0.25, on average 0.0123.",
    ]
    run(capsys, "merge", "alice")
    server.answer = lambda _request: httpx.Response(200, json={"object": "adapter.unmerge", "name": "a b"})
    code, out, _ = run(capsys, "unmerge")
    assert (code, out.split(" is no longer merged")[0]) == (0, "a b")
    assert [(r.method, r.url.raw_path, r.content and json.loads(r.content)) for r in server.requests] == [
        ("POST", b"/v1/adapters/a%20b/merge", {"mode": "compact"}),
        ("POST", b"/v1/adapters/alice/merge", {"mode": "exact"}),
        ("POST", b"/v1/adapters/unmerge", b""),
    ]


def test_what_a_terminal_would_obey_is_shown_as_escapes(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    evil = ALICE | {"warnings": ["\x1b]0;owned\x07 \ud800 and a line\nmore \u00fc"]}
    server.answer = lambda _request: httpx.Response(200, content=json.dumps(evil))
    code, out, _ = run(capsys, "pin", "alice")
    assert code == 0
    assert "warning: \\x1b]0;owned\\x07 \\ud800 and a line\nmore \u00fc\n" in out


def test_an_answer_of_another_kind_of_server(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda _request: httpx.Response(200, json={"object": "model", "id": "gpt"})
    code, out, err = run(capsys, "pin", "alice")
    assert (code, out) == (1, "")
    assert "something else" in err


def test_upload(server: FakeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "load", "alice", str(tmp_path), "--upload")[0] == 2
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("not sent")
    assert run(capsys, "load", "alice", str(tmp_path), "--upload", "--pin")[0] == 0
    [request] = server.requests
    assert request.headers["content-type"].startswith("multipart/form-data")
    assert b"weights" in request.content
    assert b"not sent" not in request.content


def test_unload_and_pin(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "pin", "alice")
    run(capsys, "pin", "alice", "--off")
    server.answer = lambda _request: httpx.Response(
        200, json={"object": "adapter.deleted", "name": "a b", "deleted": True}
    )
    assert run(capsys, "unload", "a b") == (0, "a b is unloaded.\n", "")
    assert [(r.method, r.url.raw_path, r.content and json.loads(r.content)) for r in server.requests] == [
        ("PATCH", b"/v1/adapters/alice", {"pinned": True}),
        ("PATCH", b"/v1/adapters/alice", {"pinned": False}),
        ("DELETE", b"/v1/adapters/a%20b", b""),
    ]


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (httpx.Response(404, json={"error": {"message": "No adapter named `x` is loaded."}}), 2, "No adapter named"),
        (httpx.Response(401, json={"error": {"message": "No key."}}), 2, "No key."),
        (httpx.Response(503, json={"error": {"message": "Shutting down."}}), 1, "Shutting down."),
        (httpx.Response(200, text="<html>"), 1, "answered 200"),
        (httpx.Response(502, text="<html>"), 1, "answered 502"),
    ],
)
def test_errors_of_the_server(
    server: FakeServer, capsys: pytest.CaptureFixture[str], answer: httpx.Response, code: int, message: str
) -> None:
    server.answer = lambda _request: answer
    got, out, err = run(capsys, "unload", "x")
    assert (got, out) == (code, "")
    assert message in err


def test_no_server(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(request: httpx.Request) -> Any:
        raise httpx.ConnectError("connection refused", request=request)

    server.answer = refuse
    code, _, err = run(capsys, "list")
    assert code == 1
    assert "http://127.0.0.1:8000 cannot be reached" in err
